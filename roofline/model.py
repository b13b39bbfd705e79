"""The roofline model of a layer: its bytes, its intensity, its threshold, its least time.

Units: FLOPs (1 multiply-add = 2), bytes, seconds; peaks in FLOP/s (INT8: operations/s), bandwidth in
bytes/s. A layer is a dict {"name", "kind", "shape", "calls", …} as layers.py lists them; B is the
batch size, L the length in tokens, T = B·L.

Sources: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009, for the model (a kernel of intensity I runs at most at
min(peak, I · bandwidth)); NVIDIA, "GPU Performance Background User's Guide" (DU-09798), for its use
on a network's layers: each input, weight and output is moved once.
"""

import csv
import difflib
import math
import re
import sys
from collections import namedtuple
from fractions import Fraction
from itertools import pairwise

from core.files import ASSETS
from core.record import gpu_record

HARDWARE = ASSETS / "hardware.csv"
DEFAULT_GPU = "T4"

# bytes per element: of a quantizable Linear's inputs, weights, outputs; of every other layer.
# INT8 is that of BEST: FP16 leaves the Linear and is what the layers without Q/DQ work in.
Element = namedtuple("Element", "input weight output other")
PRECISIONS = {
    "FP32": Element(4, 4, 4, 4),
    "TF32": Element(4, 4, 4, 4),  # stored as FP32
    "FP16": Element(2, 2, 2, 2),
    "INT8": Element(1, 1, 2, 2),
}
# what a matmul that stays outside Q/DQ is computed in
OUTSIDE_QDQ = {"INT8": "FP16"}

ID_BYTES = 8  # token ids are int64
FLOPS_PER_ELEMENT = {"softmax": 5, "GELU": 8, "LayerNorm": 5, "add": 1}  # conventions, not instructions
PRACTICAL_BATCH = 1024  # a threshold beyond it is solved, and of no use

Cost = namedtuple("Cost", "flops inputs weights outputs")


def cost(layer, batch, length):
    """FLOPs of one call of a layer, and the elements that it reads and writes, each once.

    With T = B·L tokens: a Linear K→N has 2TKN FLOPs (its bias is left out); QKᵀ and AV have 2BL²D each,
    D = heads · size of a head, scores are [B, heads, L, L]; LayerNorm, GELU and adds have the constants of
    FLOPS_PER_ELEMENT; a gather has none and moves one row per token. Raises KeyError for an unknown shape.
    """
    tokens, shape = batch * length, layer["shape"]
    match layer["op"]:
        case "linear":
            k, n = shape["inputs"], shape["outputs"]
            return Cost(2 * tokens * k * n, tokens * k, k * n, tokens * n)
        case "scores":  # QKᵀ
            d, h = shape["width"], shape["heads"]
            return Cost(2 * tokens * length * d, 2 * tokens * d, 0, tokens * length * h)
        case "context":  # AV
            d, h = shape["width"], shape["heads"]
            return Cost(2 * tokens * length * d, tokens * length * h + tokens * d, 0, tokens * d)
        case "softmax":
            n = tokens * length * shape["heads"]
            return Cost(FLOPS_PER_ELEMENT["softmax"] * n, n, 0, n)
        case "activation":
            n = tokens * shape["width"]
            return Cost(shape["flops_per_element"] * n, n, 0, n)
        case "norm":
            n = tokens * shape["width"]
            return Cost(FLOPS_PER_ELEMENT["LayerNorm"] * n, n, shape["parameters"], n)
        case "add":
            n = tokens * shape["width"]
            return Cost(n, 2 * n, 0, n)
        case "gather":
            n = tokens * shape["width"]
            return Cost(0, n, 0, n)
        case "bias gather":  # one value per pair of positions and head, whatever the batch
            n = length * length * shape["heads"]
            return Cost(0, n, 0, n)
        case "bias add":
            n = tokens * length * shape["heads"]
            return Cost(n, n, length * length * shape["heads"], n)
    raise KeyError(layer["op"])


def element_bytes(layer, precision):
    """Bytes per element (input, weight, output) of a layer in a precision."""
    e = PRECISIONS[precision]
    if layer["op"] == "linear":
        return e.input, e.weight, e.output
    return e.other, e.other, e.other


def bytes_moved(layer, batch, length, precision):
    """Bytes of one call: s_x · inputs + s_w · weights + s_y · outputs, each moved once; ids for a gather."""
    c = cost(layer, batch, length)
    s_x, s_w, s_y = element_bytes(layer, precision)
    ids = ID_BYTES * batch * length if layer["op"] == "gather" else 0
    return s_x * c.inputs + s_w * c.weights + s_y * c.outputs + ids


def intensity(layer, batch, length, precision):
    """Arithmetic intensity in FLOP/byte."""
    return cost(layer, batch, length).flops / bytes_moved(layer, batch, length, precision)


def limiting_intensity(layer, length, precision):
    """What the intensity tends to as the batch grows, in FLOP/byte: the weights' bytes no longer count.

    A Linear: 2KN / (s_x·K + s_y·N). A layer without weights has this intensity at every batch.
    """
    c = cost(layer, 1, length)
    _, s_w, _ = element_bytes(layer, precision)
    return c.flops / (bytes_moved(layer, 1, length, precision) - s_w * c.weights)


# --- a GPU ---------------------------------------------------------------------------


def is_matmul(layer):
    """Whether the layer runs on the tensor cores; all others run on the vector units."""
    return layer["op"] in ("linear", "scores", "context")


def peak_flops(gpu, layer, precision):
    """FLOP/s that bound a layer: the tensor cores' for matmuls, the vector units' FP32 for the rest; None if the
    GPU has no such precision. In FP32 a matmul runs on the vector units too."""
    if not is_matmul(layer):
        return gpu["peak_flops"]["FP32"]
    if layer["op"] != "linear":
        precision = OUTSIDE_QDQ.get(precision, precision)
    return gpu["peak_flops"][precision]


def ridge_point(peak, bandwidth):
    """FLOP/byte from which on arithmetic, not memory, is the bound (Williams et al. 2009)."""
    return peak / bandwidth


def threshold(layer, length, precision, peak, bandwidth):
    """The batch from which on arithmetic bounds a layer, solved.

    I(T) = R with R = peak / bandwidth gives for a Linear K→N
        T* = R·s_w·K·N / (2KN − R·(s_x·K + s_y·N)),  B* = T* / L,
    which exists only where the limit 2KN / (s_x·K + s_y·N) is above R. A layer without weights has one intensity
    for every batch: "always" or "never". Solved in rational numbers, so that a batch exactly on the ridge counts.
    Returns {"verdict": "from"|"always"|"never", "batch_real", "batch", "limiting_intensity", "ridge_point"}.
    """
    ridge = Fraction(str(peak)) / Fraction(str(bandwidth))
    c = cost(layer, 1, length)
    _, s_w, _ = element_bytes(layer, precision)
    weights = s_w * c.weights
    rest = bytes_moved(layer, 1, length, precision) - weights  # grows with the batch, as the FLOPs do
    found = {"limiting_intensity": c.flops / rest, "ridge_point": float(ridge), "batch_real": None, "batch": None}
    gain = c.flops - ridge * rest
    if weights == 0:
        return found | {"verdict": "always" if gain >= 0 else "never"}
    if gain <= 0:
        return found | {"verdict": "never"}
    batch = ridge * weights / gain
    return found | {"verdict": "from", "batch_real": float(batch), "batch": max(1, math.ceil(batch))}


def bound(layer, batch, length, precision, gpu):
    """ "arithmetic" or "memory": what bounds a layer at a batch; None where the GPU lacks the precision."""
    peak = peak_flops(gpu, layer, precision)
    if peak is None:
        return None
    above = intensity(layer, batch, length, precision) >= ridge_point(peak, gpu["bandwidth"])
    return "arithmetic" if above else "memory"


def least_time(layers, batch, length, precision, gpu):
    """Seconds below which the layers cannot run one after the other: the sum of max(FLOPs/peak, bytes/bandwidth).

    None where the GPU lacks the precision.
    """
    total = 0.0
    for layer in layers:
        peak = peak_flops(gpu, layer, precision)
        if peak is None:
            return None
        seconds = max(
            cost(layer, batch, length).flops / peak, bytes_moved(layer, batch, length, precision) / gpu["bandwidth"]
        )
        total += layer["calls"] * seconds
    return total


# --- what fusion changes -------------------------------------------------------------

# chains whose inner results TensorRT keeps on the chip: scores, FFN 1's output before GELU, sums before LayerNorm
CHAINS = (("QKᵀ", "softmax", "AV"), ("FFN 1", "GELU"), ("residual add", "LayerNorm"))


def fuse(layers, batch, length):
    """Layers by kind -> groups: the chains of CHAINS whose members fit one another, every other layer alone."""
    by_kind = {}
    for layer in layers:
        by_kind.setdefault(layer["kind"], []).append(layer)
    groups, used = [], set()
    for chain in CHAINS:
        members = [by_kind[kind][0] for kind in chain if len(by_kind.get(kind, [])) == 1]
        costs = [cost(m, batch, length) for m in members]
        fits = len(members) == len(chain) and len({m["calls"] for m in members}) == 1
        if fits and all(a.outputs <= b.inputs for a, b in pairwise(costs)):
            groups.append(members)
            used |= set(chain)
    return groups + [[layer] for layer in layers if layer["kind"] not in used]


def fused_bytes(group, batch, length, precision):
    """Bytes of a group: those of its members, less each inner result's one write and one read."""
    total = sum(bytes_moved(layer, batch, length, precision) for layer in group)
    for before, after in pairwise(group):
        inner = cost(before, batch, length).outputs
        total -= inner * (element_bytes(before, precision)[2] + element_bytes(after, precision)[0])
    return total


def fused_intensity(group, batch, length, precision):
    """FLOP/byte of a group; matmuls alone in fused attention: 4BL²D / (4·s·BLD) = L / s."""
    matmuls = [layer for layer in group if is_matmul(layer)] or group
    flops = sum(cost(layer, batch, length).flops for layer in matmuls)
    return flops / fused_bytes(group, batch, length, precision)


def least_time_fused(layers, batch, length, precision, gpu):
    """least_time with the groups of fuse: tensor cores, vector units and memory work at once within a group."""
    total = 0.0
    for group in fuse(layers, batch, length):
        units = {True: 0.0, False: 0.0}
        for layer in group:
            peak = peak_flops(gpu, layer, precision)
            if peak is None:
                return None
            units[is_matmul(layer)] += cost(layer, batch, length).flops / peak
        seconds = max(*units.values(), fused_bytes(group, batch, length, precision) / gpu["bandwidth"])
        total += group[0]["calls"] * seconds
    return total


# --- the hardware table --------------------------------------------------------------


def read_hardware(path=HARDWARE):
    """{name: gpu} of assets/hardware.csv; a gpu is {"name", "pattern", "peak_flops", "bandwidth", "l2_bytes", "source"}."""
    gpus = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            columns = {"FP32": "fp32_tflops", "TF32": "tf32_tflops", "FP16": "fp16_tflops", "INT8": "int8_tops"}
            gpus[row["gpu"]] = {
                "name": row["gpu"],
                "pattern": row["name_pattern"],
                "peak_flops": {p: float(row[c]) * 1e12 if row[c] else None for p, c in columns.items()},
                "bandwidth": float(row["bandwidth_gb_s"]) * 1e9,
                "l2_bytes": float(row["l2_mb"]) * 1e6,
                "source": row["source"],
            }
    return gpus


def find_gpu(name, gpus):
    """The row of a GPU: by name, else the one in this machine, else DEFAULT_GPU; exits for an unknown name."""
    if name is None:
        found = (gpu_record() or {}).get("name", "")
        known = [g for g in gpus.values() if re.search(g["pattern"], found, re.IGNORECASE)]
        if found and not known:
            print(f"{found}: not in {HARDWARE.name}, {DEFAULT_GPU} is taken; see --peak-tflops", file=sys.stderr)
        return known[0] if known else gpus[DEFAULT_GPU]
    key = plain(name)
    by_key = {plain(n): n for n in gpus}
    if key in by_key:
        return gpus[by_key[key]]
    near = [n for k, n in by_key.items() if key and (key in k or k in key)]
    near += [by_key[k] for k in difflib.get_close_matches(key, by_key, n=4, cutoff=0.4) if by_key[k] not in near]
    raise SystemExit(
        f"--gpu: expected a GPU of {HARDWARE.name}, found {name}; near it: {', '.join(near or gpus)}; "
        "their peaks: --list-gpus; one of your own: --peak-tflops, --bandwidth-gb-s"
    )


def plain(name):
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", ""))


def own_gpu(peaks, bandwidth_gb_s, name):
    """A row of the user's own. peaks: "8.1" for every precision, or several of "FP16=65", in TFLOP/s."""
    found = dict.fromkeys(PRECISIONS)
    for text in peaks:
        precision, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf or (precision and precision.upper() not in PRECISIONS):
            raise SystemExit(
                f"--peak-tflops: expected a number above 0, or PRECISION=NUMBER with {', '.join(PRECISIONS)}, found {text}"
            )
        found |= dict.fromkeys([precision.upper()] if precision else PRECISIONS, number * 1e12)
    if found["FP32"] is None:
        raise SystemExit(f"--peak-tflops: expected FP32=NUMBER too, the vector units' peak, found {' '.join(peaks)}")
    if not 0 < bandwidth_gb_s < math.inf:
        raise SystemExit(f"--bandwidth-gb-s: expected a number above 0, found {bandwidth_gb_s:g}")
    return {
        "name": name or "own",
        "pattern": None,
        "peak_flops": found,
        "bandwidth": bandwidth_gb_s * 1e9,
        "l2_bytes": None,
        "source": "--peak-tflops, --bandwidth-gb-s",
    }
