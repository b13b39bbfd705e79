"""Sections on complexity: FLOPs, bounds, threshold batches, least latencies, and the layers' measured times."""

import re
from itertools import product

from core.tables import PRECISIONS, model_key
from reporting.markdown import NOT_MEASURED, caption, listing, number, on_gpu, table
from reporting.speed import levels
from reporting.thresholds import predicted

BATCHES = ("1", "8")  # keys of complexity.json
SHOWN = tuple(product(("FP32", "FP16"), BATCHES))  # what the table of intensities shows
TIMES = {"all from memory": "memory_s", "to move its bytes": "move_s", "a call on nothing": "overhead_s"}


def precisions_of(record):
    """Those that the GPU has what multiplies in a Linear for."""
    return [p for p in record["least_latency_s"] if record["gpu"]["peak_flops"].get(PRECISIONS[p].peak)]


def summary(model):
    """The section in the report: totals, the two lists, threshold batches, least latencies."""
    record = model["complexity"]
    gpu, measured = record["gpu"]["name"], record["measured"]
    return [
        totals_line(record),
        gpu_line(record),
        bound_lists(record),
        f"The batch from which on arithmetic is the bound on {gpu}, rounded up, and in brackets as solved:",
        threshold_table(record),
        *least_latencies(model),
        agreement_line(measured) if measured else f"Times of the layers: {NOT_MEASURED}.",
    ]


def details(model):
    """What is left for the tables of one model."""
    record = model["complexity"]
    lead = "Each kind of layer; several names in one row have the same figures each:"
    parts = [counters_line(record), lead, kinds_table(record)]
    parts += predicted(record)
    return parts + (measured_parts(record["measured"]) if record["measured"] else [])


def totals_line(record):
    t = record["totals"]
    weights = listing(f"{t['weight_bytes'][p] / 1e6:.1f} MB in {p}" for p in precisions_of(record))
    return (
        f"One text of {record['length']} tokens costs **{t['flops'] / 1e9:.3f} GFLOPs**, {t['flops_per_token'] / 1e6:.1f} "
        f"MFLOPs per token ({record['convention']}); {t['matmul_flops'] / t['flops']:.1%} of them are in matmuls. The model "
        f"has {t['parameters']:,} parameters: {weights}."
    )


def counters_line(record):
    """The counters' own figures, and how they agree."""
    t, c = record["totals"], record["counts"]
    unsupported = listing(f"{op} ({n})" for op, n in c["fvcore_unsupported_ops"].items())
    return (
        f"{t['matmul_flops']:,} FLOPs are in matmuls, by the closed form and by torch's FlopCounterMode ({c['torch_flops']:,}). "
        f"fvcore's raw total is {c['fvcore_raw']:,}: {c['fvcore_macs']:,} multiply-adds and {c['fvcore_layer_norm']:,} for "
        f"LayerNorms. The operations that fvcore has no rule for: {unsupported}. Biases are left out. Softmax, GELU and LayerNorm "
        "count a fixed number of FLOPs per element, a convention. Every input, weight and output is moved once."
    )


def gpu_line(record):
    """The GPU that the bounds are for: peaks, bandwidth, ridge points."""
    gpu = record["gpu"]
    peaks = listing(f"{v / 1e12:g} in {p}" for p, v in gpu["peak_flops"].items() if v)
    lacking = [p for p, v in gpu["peak_flops"].items() if not v]
    ridges = listing(f"{v:.1f} in {p}" for p, v in gpu["ridge_points"].items() if v)
    return (
        f"The bounds are **computed for {gpu['name']}** from its data sheet ({gpu['source']}), not measured. Its peak in TFLOP/s "
        f"is {peaks}{f'; it has no {listing(lacking)}' if lacking else ''}. It moves {gpu['bandwidth'] / 1e9:g} GB/s. Its ridge "
        f"point in FLOP/byte is {ridges} for matmuls; the vector units compute all else, at the ridge point of FP32."
    )


def kinds_table(record):
    """A row per kind of layer, alike ones together."""
    return table(
        {
            "layer": k["kind"],
            "count": k["calls"],
            "MFLOPs, batch 1": f"{k['flops'] / 1e6:.2f}",
            "share": f"{k['share']:.2%}",
            **{f"MB {p}, batch {b}": f"{k['precisions'][p]['bytes'][b] / 1e6:.2f}" for p, b in SHOWN},
            **{f"FLOP/byte {p}, batch {b}": f"{k['precisions'][p]['intensity'][b]:.4g}" for p, b in SHOWN},
        }
        for k in record["kinds"]
    )


def bound_lists(record):
    """Which layers arithmetic bounds at each precision and batch; memory bounds all others."""
    rows = []
    for p, b in product(precisions_of(record), BATCHES):
        bounds = {k["kind"]: k["precisions"][p]["bound"][b] for k in record["kinds"]}
        found = ", ".join(k for k in bounds if bounds[k] == "arithmetic") or "none"
        rows.append({"precision and batch": f"{p} batch {b}", "bound by arithmetic (all others: by memory)": found})
    return table(rows)


def threshold_cell(found, practical):
    """Batch rounded up and as solved, or never."""
    if found is None or found["verdict"] != "from":
        return found["verdict"] if found else "no such precision"
    return f"{found['batch']} ({found['batch_real']:.2f}{', not in practice' if found['batch'] > practical else ''})"


def threshold_table(record):
    """Threshold batch of every kind of layer in every precision."""
    precisions, practical = precisions_of(record), record["practical_batch"]
    return table(
        {"layer": k["kind"]} | {p: threshold_cell(k["precisions"][p]["threshold"], practical) for p in precisions}
        for k in record["kinds"]
    )


def least_us(record, precision, batch, how="fused"):
    """Least latency in µs, or None where the GPU has no such precision."""
    seconds = record["least_latency_s"][precision][batch][how]
    return seconds and seconds * 1e6


def least_latencies(model):
    """Least latency per precision, fused and not, beside a plan's measured p50 where there is one."""
    record, hows = model["complexity"], {"layer by layer": "apart", "chains fused": "fused"}
    gpu, rows, measured = record["gpu"], [], False
    for p in precisions_of(record):
        cells = {f"batch {b}: {how}": number(least_us(record, p, b, hows[how]), ".0f") for b in BATCHES for how in hows}
        found = {f"batch {b}: measured": measured_latency(model["perf"], gpu, p, b) for b in BATCHES}
        measured = measured or set(found.values()) != {NOT_MEASURED}
        rows.append(({"precision": p} | cells, found))
    lead = (
        f"The least latency on {gpu['name']} in µs, by arithmetic and memory alone; fused: what lies inside a chain of layers is "
        f"never written{'' if measured else '; a plan was not measured there'}:"
    )
    return [lead, table(cells | found if measured else cells for cells, found in rows)]


def measured_latency(perf, gpu, precision, batch):
    """p50 of the plan at concurrency 1 in µs, if TensorRT executed it on that GPU at that batch."""
    if not perf or not on_gpu(perf) or not PRECISIONS[precision].served or str(perf["settings"]["batch_size"]) != batch:
        return NOT_MEASURED
    row, name = levels(perf).get((model_key(precision), 1)), (perf["environment"]["gpu"] or {}).get("name", "")
    known = gpu["pattern"] and re.search(gpu["pattern"], name, re.IGNORECASE)
    return f"{row['latency_p50_ms'] * 1e3:.0f}" if row and known else NOT_MEASURED


def measured_parts(measured):
    """The layers' own times on the machine that measured them."""
    m, machine = measured, measured["machine"]
    precision, peak = next(iter(machine["peak_flops"].items()))
    whole = "; ".join(
        f"At batch {r['batch']} the whole model takes {r['seconds'] * 1e3:.2f} ms, the sum of its layers is "
        f"{r['sum_of_layers_s'] * 1e3:.2f} ms, and the roofline allows {r['least_s'] * 1e3:.2f} ms"
        for r in m["models"]
    )
    lead = (
        f"**Measured** on {caption(m)}; {m['device'].upper()}, {m['threads']} threads, {m['library']}. A GEMM in {precision} reaches "
        f"{peak / 1e9:.0f} GFLOP/s, a triad {machine['bandwidth'] / 1e9:.1f} GB/s: the ridge point is "
        f"{peak / machine['bandwidth']:.1f} FLOP/byte. {whole}. The last cache has {m['cache_bytes'] / 2**20:.0f} MiB. A "
        "layer is timed with every operand from memory, and beside it the mere moving of as many bytes and the same call on "
        "almost nothing. If one of the two takes at least half of the layer's time, it is the measured bound; else arithmetic is."
    )
    layers = (
        {
            "layer": r["kind"],
            "batch": r["batch"],
            **{f"µs, {name}": f"{r[key] * 1e6:.1f}" if r.get(key) else "" for name, key in TIMES.items()},
            "GFLOP/s": f"{r['achieved_flops'] / 1e9:.1f}",
            "share of the roofline": f"{r['roofline_share']:.0%}",
            "predicted bound": r["predicted"],
            "measured bound": r["measured"],
        }
        for r in m["layers"]
    )
    return [lead, table(layers)]


def agreement_line(measured):
    """In how many layers prediction and measurement agree, and of which kinds they do not."""
    rows = measured["layers"]
    lost = list(dict.fromkeys(r["kind"] for r in rows if not r["agree"]))
    right = sum(r["agree"] for r in rows)
    return (
        f"Each kind of layer was also timed ({measured['device'].upper()}; {caption(measured)}). The roofline of that machine predicts "
        f"the bound that was measured in {right} of {len(rows)} cases{f'; the others are of {listing(lost)}' if lost else ''}."
    )
