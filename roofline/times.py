"""Time each layer of an encoder by itself, and find what bounds it without asking its intensity.

Comparing a measured intensity with a measured ridge would only repeat the prediction. Instead a layer's time is
held against two other times: that of the same call on next to nothing (call overhead), and that of reading and
writing as many bytes (memory). Whichever is at least half of the layer's time is its bound; if neither, it is
arithmetic. Both run under the roofline's own premise, that every operand comes from memory.
"""

import itertools
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm

from core.record import environment_record
from roofline.model import alone, bound, bytes_moved, cost, least_time

BATCHES = (1, 8)
GEMM_SIZE = 2048
TRIAD_ELEMENTS = 1 << 26  # 256 MiB an array: far beyond any cache
ROTATED_BYTES_MAX = 1 << 30
ROTATED_COPIES_MAX = 1 << 12
LEAST_BLOCKS = 5  # one block may be a stall
PRECISION = "FP32"
BUSY = 1.3  # median over least time of a GEMM; about 1.05 on a machine of one's own


def repeat(run, min_run_time_s):
    """Seconds of a call, block by block, measured with torch's own timer, which warms up and waits for a GPU."""
    timer, times = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()), []
    while len(times) < LEAST_BLOCKS:
        times += timer.blocked_autorange(min_run_time=min_run_time_s).times
    return times


def least_seconds(run, min_run_time_s):
    """The least of the repeated measurements of a call, since noise only adds."""
    return min(repeat(run, min_run_time_s))


def cache_bytes(device):
    """Size of the last cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        p.read_text(encoding="utf-8").strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1] in units), default=32 << 20)


def measure_ridge(kinds, length, device, min_run_time_s):
    """Peak FLOP/s of an FP32 GEMM and bandwidth of a triad a = b + s·c (three arrays moved), through torch.

    The peak is the best of a square GEMM and of the model's own Linears at the largest batch, operands in cache.
    """
    a, b = (torch.rand(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(2))
    times = repeat(lambda: torch.mm(a, b), 10 * min_run_time_s)
    seconds, median = min(times), statistics.median(times)
    if median > BUSY * seconds:
        print(
            f"WARNING: expected a quiet machine, found a GEMM's median time {median / seconds:.1f} times its least; "
            "others compute here too: measure again without them",
            file=sys.stderr,
        )
    peak = 2 * GEMM_SIZE**3 / seconds
    for layer in (k for k in kinds if k["op"] == "linear"):
        function, inputs, weights = make_call(layer, BATCHES[-1], length, device)
        seconds = least_seconds(lambda: function(*inputs, *weights), 2 * min_run_time_s)  # noqa: B023
        peak = max(peak, cost(layer, BATCHES[-1], length).flops / seconds)
    out, b, c = (torch.rand(TRIAD_ELEMENTS, device=device) for _ in range(3))
    seconds = least_seconds(lambda: torch.add(b, c, alpha=3.0, out=out), 4 * min_run_time_s)
    return peak, 3 * 4 * TRIAD_ELEMENTS / seconds


def make_call(layer, batch, length, device):
    """(function, activations, weights) of a layer in the shapes of the model; the function takes both."""
    shape, op = layer["shape"], layer["op"]
    heads, width = shape.get("heads"), shape.get("width")
    size = max(1, width // heads) if width and heads else None  # of a head

    def rand(*dims):
        return torch.rand(*dims, device=device) - 0.5

    tokens = (shape["rows"],) if "rows" in shape else (batch, length)
    # [B, L, width], or [B, heads, L, L] where the shape has no width
    whole = (*tokens, width) if width else (batch, heads, length, length)
    match op:
        case "linear":
            k, n = shape["inputs"], shape["outputs"]
            return F.linear, (rand(*tokens, k),), (rand(n, k), rand(n))
        case "conv":
            k, n, kernel, groups = (shape[x] for x in ("inputs", "outputs", "kernel", "groups"))
            function = partial(F.conv1d, padding=kernel // 2, groups=groups)
            return function, (rand(batch, k, length),), (rand(n, k // groups, kernel), rand(n))
        case "scores":
            q, k = (rand(batch, heads, length, size) for _ in range(2))
            return torch.matmul, (q, k.transpose(2, 3)), ()
        case "position scores":
            return torch.matmul, (rand(batch, heads, length, size),), (rand(heads, size, shape["positions"]),)
        case "context":
            return torch.matmul, (rand(batch, heads, length, length), rand(batch, heads, length, size)), ()
        case "softmax":
            return partial(F.softmax, dim=-1), (rand(*whole),), ()
        case "activation":
            return {"GELU": F.gelu, "ReLU": F.relu, "Tanh": torch.tanh}[layer["kind"]], (rand(*whole),), ()
        case "norm":
            return lambda x, w: F.layer_norm(x, (width,), w, w), (rand(*whole),), (rand(width),)
        case "rms norm":
            return lambda x, w: F.rms_norm(x, (width,), w), (rand(*whole),), (rand(width),)
        case "add":
            return torch.add, (rand(*whole), rand(*whole)), ()
        case "bias add":
            return torch.add, (rand(*whole),), (rand(heads, length, length),)
        case "rotary":
            size = shape["size"]
            return rotate_halves, (rand(batch, width // size, length, size),), (rand(length, size), rand(length, size))
        case "score gather":
            index = torch.randint(length, whole, device=device)
            return lambda x, i: x.gather(-1, i), (rand(*whole), index), ()
        case "gather" | "table":
            rows = 30522  # of a word table; which rows is what counts, not how many there are
            count = (batch, length) if op == "gather" else (length,) if width else (length, length)
            return F.embedding, (torch.randint(rows, count, device=device),), (rand(rows, width or heads),)
    raise KeyError(op)


def rotate_halves(x, cosine, sine):
    """A rotary embedding, as transformers computes it."""
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine


def tiny(layer):
    """The same operation on next to nothing: its time is the overhead of a call."""
    small = {"inputs": 8, "outputs": 8, "width": 8, "size": 8, "rows": 1, "positions": 8, "parameters": 16}
    return layer | {"shape": {key: small.get(key, 1) for key in layer["shape"]}}


def rotate(tensors, device):
    """Endless copies of the tensors, together beyond the cache: as the model's other layers push them out."""
    size = max(1, sum(t.numel() * t.element_size() for t in tensors))
    most = max(2, min(ROTATED_COPIES_MAX, ROTATED_BYTES_MAX // size))
    copies = max(2, min(math.ceil(2 * cache_bytes(device) / size), most))
    return itertools.cycle([tuple(t.clone() for t in tensors) for _ in range(copies)])


def rotate_rows(ids, table, moved, device):
    """rotate for a gather: endless lists of other rows, together beyond the cache, of the one table."""
    copies = max(2, min(math.ceil(2 * cache_bytes(device) / moved), ROTATED_COPIES_MAX))
    return itertools.cycle([(torch.randint_like(ids, len(table)), table) for _ in range(copies)])


def make_move(layer, batch, length, device):
    """A function that reads and writes as many bytes as the layer: reads from memory, its result where it was before.

    As the layer's own result, which the allocator puts where the last one was.
    """
    c = cost(layer, batch, length)
    reads, writes = c.inputs + c.weights, c.outputs
    both = min(reads, writes)
    turns, target = rotate((torch.rand(reads, device=device),), device), torch.empty(writes, device=device)

    def move():
        (source,) = next(turns)
        target[:both].copy_(source[:both])
        if reads > both:
            source[both:].sum()
        elif writes > both:
            target[both:].zero_()

    return move


def measure_layer(layer, batch, length, device, min_run_time_s):
    """Seconds of one call of a layer, and of the two things that may bound it.

    warm_s: all operands in cache; cold_s: weights from memory, activations in cache, as in the model (None without
    weights); memory_s: all operands from memory, as the roofline assumes; move_s: reading and writing as many bytes
    from there; overhead_s: the call on next to nothing.
    """
    function, inputs, weights = make_call(layer, batch, length, device)
    warm = least_seconds(lambda: function(*inputs, *weights), min_run_time_s)
    cold = None
    if layer["op"] in ("gather", "table"):
        everything = rotate_rows(*inputs, *weights, bytes_moved(layer, batch, length, PRECISION), device)
    else:
        everything = rotate((*inputs, *weights), device)
        if weights:
            turns = rotate(weights, device)
            cold = least_seconds(lambda: function(*inputs, *next(turns)), min_run_time_s)
    memory = least_seconds(lambda: function(*next(everything)), min_run_time_s)
    moved = least_seconds(make_move(layer, batch, length, device), min_run_time_s)
    function, inputs, weights = make_call(tiny(layer), 1, 1, device)
    overhead = least_seconds(lambda: function(*inputs, *weights), min_run_time_s / 4)
    return {"warm_s": warm, "cold_s": cold, "memory_s": memory, "move_s": moved, "overhead_s": overhead}


def bound_of(times):
    """What bounds a measured layer: "call overhead", "memory" or "arithmetic"."""
    if times["overhead_s"] >= times["memory_s"] / 2:
        return "call overhead"
    return "memory" if times["move_s"] >= times["memory_s"] / 2 else "arithmetic"


def measure_layers(embedder, kinds, length, min_run_time_s, device=None):
    """Times of every kind of layer at batch 1 and 8 and of the whole model, beside the roofline of this machine.

    embedder: the model in FP32; kinds: layers.by_kind. device None: CUDA where torch finds a GPU, else the CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: expected a GPU that torch can use, found none; take --device cpu, or leave it out"
        )
    with torch.inference_mode():
        peak, bandwidth = measure_ridge(kinds, length, device, min_run_time_s)
        machine = {"peak_flops": {PRECISION: peak}, "bandwidth": bandwidth}
        rows, models = [], []
        with tqdm(total=len(BATCHES) * (len(kinds) + 1), desc="layers", unit="layer", mininterval=1) as bar:
            for batch in BATCHES:
                for layer in kinds:
                    times = measure_layer(layer, batch, length, device, min_run_time_s)
                    rows.append(describe_layer(layer, batch, length, times, machine))
                    bar.update()
                models.append(measure_model(embedder, kinds, batch, length, device, machine, rows, min_run_time_s))
                bar.update()
    return {
        "environment": environment_record(),
        "device": device,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "library": f"torch {torch.__version__}",
        "cache_bytes": cache_bytes(device),
        "layers": rows,
        "models": models,
    }


def describe_layer(layer, batch, length, times, machine):
    """One row: achieved FLOP/s, share of the roofline, predicted and measured bound."""
    seconds = times["memory_s"]
    predicted = bound(layer, batch, length, PRECISION, machine)
    found = bound_of(times)
    return {
        "kind": layer["kind"],
        "batch": batch,
        "calls": layer["calls"],
        **times,
        "achieved_flops": cost(layer, batch, length).flops / seconds,
        "roofline_share": least_time([[layer | {"calls": 1}]], batch, length, PRECISION, machine) / seconds,
        "predicted": predicted,
        "measured": found,
        "agree": predicted == found,
    }


def measure_model(embedder, kinds, batch, length, device, machine, rows, min_run_time_s):
    """Seconds of the whole model, the sum of its layers', and the roofline's lower bound."""
    embedder = embedder.to(device)
    ids = torch.full((batch, length), 5, dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    seconds = least_seconds(lambda: embedder(ids, mask), 10 * min_run_time_s)
    total = sum(r["calls"] * (r["cold_s"] or r["warm_s"]) for r in rows if r["batch"] == batch)
    return {
        "batch": batch,
        "seconds": seconds,
        "sum_of_layers_s": total,
        "least_s": least_time(alone(kinds), batch, length, PRECISION, machine),
    }
