"""Beyond the ridge: thresholds of fused layers, tiles and waves of a GEMM, and the batch that fills a GPU.

A GEMM's output is cut into tiles, one for a streaming multiprocessor (SM) at a time. A tile that is half padding and a
wave of tiles that fills half of the SMs take as long as full ones, so that a threshold is necessary and not sufficient.

Source: NVIDIA, "Matrix Multiplication Background User's Guide" (DU-09799), tile and wave quantization.
Batches and lengths may be arrays: what is returned has their shape.
"""

import math

import numpy as np

from roofline.model import PRACTICAL_BATCH, alone, cost, fuse, fused_bytes, is_matmul, peak_flops

TILE = 128  # rows and columns of a tile, of the sizes that libraries have the one with the best reuse on most GPUs
ROOF_SHARE = 0.8  # of the peak: what counts as having reached it
LENGTHS = (16, 32, 64, 128, 256, 512)  # of the picture over length and batch
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LONGEST = 1 << 16  # tokens up to which a threshold in length is looked for


def occupied(layer, batch, length, sms):
    """Share of the SMs' time that a matmul's tiles use; 1 where the number of SMs is not known."""
    if sms is None:
        return np.ones(np.broadcast(batch, length).shape)
    shape, products, rows = layer["shape"], 1, batch * length
    if layer["op"] in ("linear", "conv"):
        rows, columns = shape.get("rows", rows), shape["outputs"]
    else:  # a product for each head and text
        size = max(1, shape["width"] // shape["heads"])
        columns = size if layer["op"] == "context" else shape.get("positions", length)
        rows, products = length, batch * shape["heads"]
    width = np.minimum(columns, TILE)  # narrow outputs have narrow tiles
    down, across = -(-rows // TILE), -(-columns // width)
    waves = -(-products * down * across // sms)
    return products * rows * columns / (waves * sms * TILE * width)


def group_seconds(group, batch, length, precision, gpu, sms=None):
    """(tensor cores', vector units', memory's) seconds of one call of a group; the first with waves where sms is given."""
    matmul = vector = np.zeros(np.broadcast(batch, length).shape)
    for layer in group:
        seconds = cost(layer, batch, length).flops / peak_flops(gpu, layer, precision)
        if is_matmul(layer):
            matmul = matmul + seconds / occupied(layer, batch, length, sms)
        else:
            vector = vector + seconds
    moved = fused_bytes(group, batch, length, precision)
    return matmul, vector, moved / gpu["bandwidth"]


def has_precision(groups, precision, gpu):
    """Whether a GPU has a peak for every layer of the groups in a precision."""
    return all(peak_flops(gpu, layer, precision) for group in groups for layer in group)


def group_threshold(group, length, precision, gpu):
    """threshold of model.py for fused layers, whose seconds are linear in the batch: from where a unit takes longer than memory.

    Returns {"verdict", "batch_real", "batch", "tokens", "unit"}: tokens is batch_real · length, the same at every length
    for Linears; unit is what bounds the group then.
    """
    (matmul, vector, memory), (more, further, moved) = (
        [float(seconds) for seconds in group_seconds(group, batch, length, precision, gpu)] for batch in (1, 2)
    )
    unit = "tensor cores" if more >= further else "vector units"
    found = {"unit": unit, "batch_real": None, "batch": None, "tokens": None}
    grows, adds = max(more - matmul, further - vector), moved - memory  # a text more
    fixed = memory - adds  # the weights
    if fixed <= 1e-9 * memory or grows == 0:
        return found | {"verdict": "always" if max(more, further) >= moved else "never"}
    if grows <= adds:
        return found | {"verdict": "never"}
    batch = fixed / (grows - adds)
    return found | {
        "verdict": "from",
        "batch_real": batch,
        "batch": max(1, math.ceil(batch - 1e-9)),
        "tokens": math.ceil(batch * length - 1e-9),
    }


def length_threshold(group, precision, gpu):
    """Tokens of a text from which on a unit takes longer than memory at every batch; None up to LONGEST."""
    lengths = np.arange(1, LONGEST + 1)
    matmul, vector, memory = group_seconds(group, 1, lengths, precision, gpu)
    return first_from(np.maximum(matmul, vector) >= memory, lengths)


def first_from(holds, values):
    """The value from which on a condition holds up to the last; None where it does not hold there."""
    lost = np.flatnonzero(~holds)
    start = lost[-1] + 1 if len(lost) else 0
    return int(values[start]) if start < len(values) else None


def reached(groups, batch, length, precision, gpu):
    """Share of the tensor cores' peak that groups reach, one after the other, with tiles, waves, vector units and memory."""
    least = taken = 0.0
    for group in groups:
        calls = group[0]["calls"]
        least = least + calls * group_seconds(group, batch, length, precision, gpu)[0]
        taken = taken + calls * np.maximum.reduce(
            np.broadcast_arrays(*group_seconds(group, batch, length, precision, gpu, gpu.get("sms")))
        )
    return least / taken


def batch_reaching(groups, length, precision, gpu, share=ROOF_SHARE):
    """The batch from which on groups reach a share of the peak, up to PRACTICAL_BATCH; None where they do not."""
    batches = np.arange(1, PRACTICAL_BATCH + 1)
    return first_from(reached(groups, batches, length, precision, gpu) >= share, batches)


# --- the record ----------------------------------------------------------------------


def describe_groups(kinds, length, gpu, precisions):
    """[{"group", "precisions": {precision: threshold, length from which, batch that reaches the roof}}] of what has matmuls."""
    rows = []
    for group in fuse(kinds, 1, length):
        if not any(map(is_matmul, group)):
            continue
        row = {"group": " + ".join(layer["kind"] for layer in group), "precisions": {}}
        weights = any(cost(layer, 1, length).weights for layer in group if is_matmul(layer))
        for p in (p for p in precisions if has_precision([group], p, gpu)):
            found = group_threshold(group, length, p, gpu)
            found["length"] = None if weights else length_threshold(group, p, gpu)
            row["precisions"][p] = found | {"roof_batch": batch_reaching([group], length, p, gpu)}
        rows.append(row)
    return rows


def linears(kinds):
    """The Linears over tokens as groups: what holds most FLOPs of an encoder. The head is too narrow to fill anything."""
    return alone(k for k in kinds if k["op"] == "linear" and "rows" not in k["shape"] and k["kind"] != "head")


def describe_gpus(kinds, length, gpus, precisions):
    """{GPU: {precision: batch from which on all Linears together reach the roof, None beyond PRACTICAL_BATCH}}."""
    groups = linears(kinds)
    return {
        gpu["name"]: {p: batch_reaching(groups, length, p, gpu) for p in precisions if has_precision(groups, p, gpu)}
        for gpu in gpus
    }


def describe_surface(kinds, gpu, precisions):
    """{"lengths", "batches", "share": {precision: a row for each batch}}: share of the peak that the whole model reaches."""
    share = {}
    for p in (p for p in precisions if has_precision(alone(kinds), p, gpu)):
        share[p] = [
            [float(f"{reached(fuse(kinds, batch, length), batch, length, p, gpu):.4g}") for length in LENGTHS]
            for batch in BATCHES
        ]
    return {"lengths": LENGTHS, "batches": BATCHES, "share": share}
