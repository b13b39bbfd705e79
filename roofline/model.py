"""The roofline model of a layer: its bytes, its intensity, its threshold, its least time.

Units: FLOPs (1 multiply-add = 2), bytes, seconds; peaks in FLOP/s (INT8: operations/s), bandwidth in
bytes/s. A layer is a dict {"name", "kind", "shape", "calls", …} as layers.py lists them; B is the
batch size, L the length in tokens, T = B·L.

Sources: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009, for the model (a kernel of intensity I runs at most at
min(peak, I · bandwidth)); NVIDIA, "GPU Performance Background User's Guide" (DU-09798), for its use
on a network's layers: each input, weight and output is moved once.
"""

import math
from collections import namedtuple
from fractions import Fraction
from itertools import pairwise

from core.tables import PRECISIONS

ID_BYTES = 8  # token ids are int64
# conventions, not instructions; an activation's are in its shape
FLOPS_PER_ELEMENT = {"softmax": 5, "norm": 5, "rms norm": 4, "add": 1, "bias add": 1, "rotary": 3}
FLOPS_PER_ELEMENT |= dict.fromkeys(("gather", "score gather", "table"), 0)
MATMULS = ("linear", "conv", "scores", "context", "position scores")
PRACTICAL_BATCH = 1024  # a threshold beyond it is solved, and of no use

Cost = namedtuple("Cost", "flops inputs weights outputs")


def elements(shape, batch, length):
    """Elements of a tensor [B, L, width], or [B, heads, L, L] where the shape has no width."""
    if "width" in shape:
        return batch * length * shape["width"]
    return batch * length * length * shape["heads"]


def cost(layer, batch, length):
    """FLOPs of one call of a layer, and the elements that it reads and writes, each once; masks are left out.

    Raises KeyError for an unknown operation.
    """
    of_op = matmul_cost if is_matmul(layer) else elementwise_cost
    return of_op(layer["op"], layer["shape"], batch, length)


def matmul_cost(op, shape, batch, length):
    """With T = B·L tokens: a Linear K→N has 2TKN FLOPs (its bias is left out), and fixed `rows` in T's place where it
    projects a table; a convolution is a Linear of K·kernel/groups inputs; QKᵀ and AV have 2BL²D each, D = heads · size
    of a head, scores are [B, heads, L, L]; scores against P positions, which a batch shares, have 2TPD.
    """
    tokens = shape.get("rows", batch * length)
    if op in ("linear", "conv"):
        k, n = shape["inputs"], shape["outputs"]
        inner = k * shape.get("kernel", 1) // shape.get("groups", 1)
        return Cost(2 * tokens * inner * n, tokens * k, inner * n, tokens * n)
    d, keys = shape["width"], shape.get("positions", length)
    flops, scores = 2 * tokens * keys * d, tokens * keys * shape["heads"]
    if op == "context":
        return Cost(flops, scores + tokens * d, 0, tokens * d)
    if op == "position scores":
        return Cost(flops, tokens * d, keys * d, scores)
    return Cost(flops, 2 * tokens * d, 0, scores)


def elementwise_cost(op, shape, batch, length):
    """FLOPS_PER_ELEMENT of each output; a gather has none and moves what it picks. A table is gathered once for the
    whole batch, which shares a norm's parameters, the biases that are added to scores, and the angles of a rotation.
    """
    if op == "table":
        batch = 1
    n = shape["rows"] * shape["width"] if "rows" in shape else elements(shape, batch, length)
    flops = (shape["flops_per_element"] if op == "activation" else FLOPS_PER_ELEMENT[op]) * n
    shared = shape.get("parameters", 0)
    if op == "bias add":
        shared = elements(shape, 1, length)
    elif op == "rotary":  # a sine and a cosine per position and element of a head
        shared = 2 * length * shape["size"]
    return Cost(flops, 2 * n if op == "add" else n, shared, n)


def element_bytes(layer, precision):
    """Bytes per element (input, weight, output) of a layer in a precision."""
    e = PRECISIONS[precision].element
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


# --- a GPU ---------------------------------------------------------------------------


def is_matmul(layer):
    """Whether the layer runs on the tensor cores; all others run on the vector units."""
    return layer["op"] in MATMULS


def peak_flops(gpu, layer, precision):
    """FLOP/s that bound a layer: the tensor cores' for matmuls, the vector units' FP32 for the rest; None if the
    GPU has no such precision. In FP32 a matmul runs on the vector units too."""
    if not is_matmul(layer):
        return gpu["peak_flops"]["FP32"]
    row = PRECISIONS[precision]
    return gpu["peak_flops"].get(row.peak if layer["op"] == "linear" else row.other_peak)


def threshold(layer, length, precision, peak, bandwidth):
    """The batch from which on arithmetic bounds a layer, solved.

    I(T) = R with R = peak / bandwidth gives for a Linear K→N
        T* = R·s_w·K·N / (2KN − R·(s_x·K + s_y·N)),  B* = T* / L,
    which exists only where the limit 2KN / (s_x·K + s_y·N) is above R. A layer without weights, or on rows that do
    not grow with the batch, has one intensity for every batch: "always" or "never". Solved in rational numbers, so that a batch exactly on the ridge counts.
    Returns {"verdict": "from"|"always"|"never", "batch_real", "batch", "limiting_intensity", "ridge_point"}.
    """
    ridge = Fraction(str(peak)) / Fraction(str(bandwidth))
    c = cost(layer, 1, length)
    _, s_w, _ = element_bytes(layer, precision)
    weights = 0 if "rows" in layer["shape"] else s_w * c.weights
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
    """ "arithmetic" or "memory": what bounds a layer at a batch; None where the GPU lacks the precision.

    Arithmetic is it from the ridge point on, peak / bandwidth in FLOP/byte (Williams et al. 2009).
    """
    peak = peak_flops(gpu, layer, precision)
    if peak is None:
        return None
    above = intensity(layer, batch, length, precision) >= peak / gpu["bandwidth"]
    return "arithmetic" if above else "memory"


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
    return groups + alone(layer for layer in layers if layer["kind"] not in used)


def alone(layers):
    """Every layer as a group of its own, as least_time takes it."""
    return [[layer] for layer in layers]


def fused_bytes(group, batch, length, precision):
    """Bytes of a group: those of its members, less each inner result's one write and one read."""
    total = sum(bytes_moved(layer, batch, length, precision) for layer in group)
    for before, after in pairwise(group):
        inner = cost(before, batch, length).outputs
        total -= inner * (element_bytes(before, precision)[2] + element_bytes(after, precision)[0])
    return total


def least_time(groups, batch, length, precision, gpu):
    """Seconds below which groups of layers, as fuse or alone make them, cannot run one after the other.

    The sum of max(FLOPs/peak, bytes/bandwidth): tensor cores, vector units and memory work at once within a group.
    None where the GPU lacks the precision.
    """
    total = 0.0
    for group in groups:
        units = {True: 0.0, False: 0.0}
        for layer in group:
            peak = peak_flops(gpu, layer, precision)
            if peak is None:
                return None
            units[is_matmul(layer)] += cost(layer, batch, length).flops / peak
        seconds = max(*units.values(), fused_bytes(group, batch, length, precision) / gpu["bandwidth"])
        total += group[0]["calls"] * seconds
    return total
