"""Sections on complexity: FLOPs, bounds, threshold batches, least latencies, and the layers' measured times."""

import re
from itertools import product

from core.tables import PRECISIONS, model_key
from reporting.markdown import NOT_MEASURED, caption, columns, fold, listing, number, on_gpu, table
from reporting.speed import levels

BATCHES = ("1", "8")  # keys of complexity.json
SHOWN = ("FP32", "FP16")  # precisions of the table of intensities: half the bytes, twice the intensity
NO_PRECISION = "no such precision"


def precisions_of(record):
    """Those that the GPU has what multiplies in a Linear for."""
    return [p for p in record["least_latency_s"] if record["gpu"]["peak_flops"].get(PRECISIONS[p].peak)]


def summary(model):
    """The section in the report: totals, the two lists, threshold batches, least latencies."""
    record = model["complexity"]
    if not record:
        return [f"Complexity: {NOT_MEASURED}."]
    measured = [agreement_line(record["measured"])] if record["measured"] else [f"Times of the layers: {NOT_MEASURED}."]
    sections = (totals_line, gpu_line, bound_lists, threshold_table)
    return [*(section(record) for section in sections), latency_table(model), *measured]


def details(model):
    """What is left for the tables of one model."""
    record = model["complexity"]
    if not record:
        return []
    parts = [counters_line(record), kinds_table(record), gpu_table(record), fusion_table(record)]
    return parts + (measured_parts(record) if record["measured"] else [])


def totals_line(record):
    t = record["totals"]
    weights = listing(f"{size / 1e6:.1f} MB in {p}" for p, size in t["weight_bytes"].items())
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
        f"LayerNorms. The operations that fvcore has no rule for: {unsupported}."
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
    spec = {
        "layer": lambda k: k["kind"],
        "count": lambda k: k["calls"],
        "MFLOPs, batch 1": lambda k: f"{k['flops'] / 1e6:.2f}",
        "share": lambda k: f"{k['share']:.2%}",
    }
    for what, unit, scale, form in (("bytes", "MB", 1e6, ".2f"), ("intensity", "FLOP/byte", 1, ".4g")):
        for p, b in product(SHOWN, BATCHES):
            key = f"{unit} {p}, batch {b}"
            spec[key] = lambda k, p=p, b=b, w=what, s=scale, f=form: format(k["precisions"][p][w][b] / s, f)
    return (
        f"Each kind of layer; several names in one row have the same figures each:\n\n{columns(record['kinds'], spec)}"
    )


def bound_lists(record):
    """Which layers arithmetic bounds, and which memory, at each precision and batch."""
    rows = []
    for precision in precisions_of(record):
        for batch in BATCHES:
            lists = {"arithmetic": [], "memory": [], None: []}  # None: no peak for its products
            for kind in record["kinds"]:
                lists[kind["precisions"][precision]["bound"][batch]].append(kind["kind"])
            rows.append(
                [f"{precision} batch {batch}", *(", ".join(lists[b]) or "none" for b in ("arithmetic", "memory"))]
            )
    return table(["precision and batch", "bound by arithmetic", "bound by memory"], fold(rows))


def threshold_cell(found, practical):
    """Batch rounded up and as solved, or never."""
    if found is None:
        return NO_PRECISION
    if found["verdict"] != "from":
        return found["verdict"]
    return f"{found['batch']} ({found['batch_real']:.2f}{', not in practice' if found['batch'] > practical else ''})"


def threshold_table(record):
    """Threshold batch of every kind of layer in every precision."""
    precisions, practical = precisions_of(record), record["practical_batch"]
    rows = [
        [k["kind"], *(threshold_cell(k["precisions"][p]["threshold"], practical) for p in precisions)]
        for k in record["kinds"]
    ]
    lead = f"The batch from which on arithmetic is the bound on {record['gpu']['name']}, rounded up, and as solved:"
    return f"{lead}\n\n{table(['layer', *precisions], fold(rows))}"


def gpu_table(record):
    """Threshold batch of FFN 1 and of the output projection on every GPU."""
    precisions = list(next(iter(record["thresholds_by_gpu"].values())))
    shown = [k for k in ("FFN 1", "output projection") if any(kind["kind"] == k for kind in record["kinds"])]
    rows = []
    for gpu, found in record["thresholds_by_gpu"].items():
        batches = ([found[p][k] for k in shown] if found[p] else [] for p in precisions)
        cells = (" / ".join("never" if b is None else str(b) for b in row) or NO_PRECISION for row in batches)
        rows.append([gpu, *cells])
    lead = f"The same threshold on other GPUs, {' / '.join(shown)}:"
    return f"{lead}\n\n{table(['GPU', *precisions], fold(rows))}"


def fusion_table(record):
    """Intensity of fused chains beside that of their members apart."""
    header = ["chain", *(f"{p}, batch {b}: apart → fused" for p in SHOWN for b in BATCHES)]
    rows = []
    for row in record["fusion"]:
        cells = []
        for p, b in product(SHOWN, BATCHES):
            found, ridge = row["precisions"][p], record["gpu"]["ridge_points"][p]
            bound = NO_PRECISION if not ridge else "arithmetic" if found["fused"][b] >= ridge else "memory"
            cells.append(f"{found['apart'][b]:.3g} → {found['fused'][b]:.3g}: {bound}")
        rows.append([" + ".join(row["chain"]), *cells])
    return f"What fusion changes, in FLOP/byte, and what then bounds the chain:\n\n{table(header, rows)}"


def least_us(record, precision, batch, how="fused"):
    """Least latency in µs, or None where the GPU has no such precision."""
    seconds = record["least_latency_s"][precision][batch][how]
    return seconds and seconds * 1e6


def latency_table(model):
    """Least latency per precision, fused and not, beside a plan's measured one."""
    record = model["complexity"]
    rows = []
    for p in precisions_of(record):
        cells = [number(least_us(record, p, b, how), ".0f") for b in BATCHES for how in ("apart", "fused")]
        rows.append([p, *cells, *(number(plan_us(model["perf"], record["gpu"], p, b), ".0f") for b in BATCHES)])
    header = ["precision", *(f"batch {b}: {how}" for b in BATCHES for how in ("layer by layer", "chains fused"))]
    header += [f"batch {b}: measured p50 of the plan" for b in BATCHES]
    lead = f"The least latency on {record['gpu']['name']} in µs, by arithmetic and memory alone:"
    return f"{lead}\n\n{table(header, rows)}"


def plan_us(perf, gpu, precision, batch):
    """p50 of the plan at concurrency 1 in µs, if TensorRT executed it on that GPU at that batch."""
    if not perf or not on_gpu(perf) or not PRECISIONS[precision].served or str(perf["settings"]["batch_size"]) != batch:
        return None
    row, name = levels(perf).get((model_key(precision), 1)), (perf["environment"]["gpu"] or {}).get("name", "")
    known = gpu["pattern"] and re.search(gpu["pattern"], name, re.IGNORECASE)
    return row["latency_p50_ms"] * 1e3 if row and known else None


def measured_parts(record):
    """The layers' own times on the machine that measured them."""
    m = record["measured"]
    machine, (precision, peak) = m["machine"], next(iter(m["machine"]["peak_flops"].items()))
    lead = (
        f"**Measured** on {caption(m)}; {m['device'].upper()}, {m['threads']} threads, {m['library']}. A GEMM in {precision} reaches "
        f"{peak / 1e9:.0f} GFLOP/s, a triad {machine['bandwidth'] / 1e9:.1f} GB/s: the ridge point is "
        f"{peak / machine['bandwidth']:.1f} FLOP/byte. The last cache has {m['cache_bytes'] / 2**20:.0f} MiB."
    )
    spec = {"layer": lambda r: r["kind"], "batch": lambda r: r["batch"]}
    for heading, key in (
        ("all in cache", "warm_s"), ("weights from memory", "cold_s"), ("all from memory", "memory_s"),
        ("to move its bytes", "move_s"), ("a call on nothing", "overhead_s"),
    ):  # fmt: skip
        spec[f"µs, {heading}"] = lambda r, key=key: f"{r[key] * 1e6:.1f}" if r.get(key) else ""
    spec |= {
        "GFLOP/s": lambda r: f"{r['achieved_flops'] / 1e9:.1f}",
        "share of the roofline": lambda r: f"{r['roofline_share']:.0%}",
        "predicted bound": lambda r: r["predicted"],
        "measured bound": lambda r: r["measured"],
    }
    sums = {"batch": lambda r: r["batch"]}
    for heading, key in (("whole model", "seconds"), ("sum of its layers", "sum_of_layers_s"), ("roofline", "least_s")):
        sums[f"{heading}, ms"] = lambda r, key=key: f"{r[key] * 1e3:.2f}"
    return [lead, columns(m["layers"], spec), columns(m["models"], sums)]


def agreement_line(measured):
    """In how many layers prediction and measurement agree, and where they do not."""
    rows = measured["layers"]
    lost = {}
    for r in rows:
        if not r["agree"]:
            lost.setdefault((r["predicted"], r["measured"]), []).append(f"{r['kind']} at batch {r['batch']}")
    text = (
        f"Each kind of layer was also timed ({measured['device'].upper()}; {caption(measured)}). The roofline of that machine predicts the bound "
        f"that was measured in {sum(r['agree'] for r in rows)} of {len(rows)} cases."
    )
    return text + "".join(
        f" It predicts {predicted} but {found} was measured for {listing(names)}."
        for (predicted, found), names in lost.items()
    )
