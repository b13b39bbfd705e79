"""The report's section on complexity: FLOPs, bounds, thresholds, least latencies, and the layers' measured times."""

import re

from reporting.tables import NOT_MEASURED, caption, number, on_cpu, relative, table, title

BATCHES = ("1", "8")  # keys of complexity.json
SHOWN = ("FP32", "FP16")  # precisions of the table of intensities: half the bytes, twice the intensity
# the plan that a precision's least latency is held against; INT8 here is INT8 with FP16 around it
PLANS = {"FP32": "TRT_FP32", "TF32": None, "FP16": "TRT_FP16", "INT8": "TRT_BEST"}


def block_complexity(models):
    """Every model's section."""
    parts = []
    for model in models:
        record = model["complexity"]
        parts.append(f"### {title(model)}")
        if not record:
            parts.append(f"Complexity: {NOT_MEASURED}.")
            continue
        parts += [totals_line(record), gpu_line(record), kinds_table(record), bound_lists(record)]
        parts += [threshold_table(record), gpu_table(record), fusion_table(record), latency_table(model)]
        parts.append(f"![Intensity and roofline of every kind of layer]({relative(model, 'complexity.png')})")
        parts += measured_parts(record) if record["measured"] else [f"Times of the layers: {NOT_MEASURED}."]
        parts.append(
            f"Data: [complexity.json]({relative(model, 'complexity.json')}), a row per layer in "
            f"[complexity.csv]({relative(model, 'complexity.csv')})"
        )
    return "\n\n".join(parts)


def totals_line(record):
    """Totals with their convention, and the counters' own figures."""
    t, c = record["totals"], record["counts"]
    weights = ", ".join(f"{p} {size / 1e6:.1f}" for p, size in t["weight_bytes"].items())
    return (
        f"One text of {record['length']} tokens: **{t['flops'] / 1e9:.3f} GFLOPs**, {t['flops_per_token'] / 1e6:.1f} MFLOPs per token "
        f"({record['convention']}), {t['matmul_flops']:,} FLOPs of them in matmuls; {t['parameters']:,} parameters; weights in MB: {weights}.\n\n"
        f"fvcore's raw total is {c['fvcore_raw']:,}: {c['fvcore_macs']:,} multiply-adds and {c['fvcore_layer_norm']:,} for LayerNorms. "
        f"Doubled without the LayerNorms it is the closed form's count of matmul FLOPs, and torch's FlopCounterMode's, to the last FLOP. "
        f"fvcore has no rule for: {', '.join(f'{op} ({n})' for op, n in c['fvcore_unsupported_ops'].items())}."
    )


def gpu_line(record):
    """The GPU that the bounds are for: peaks, bandwidth, ridge points."""
    gpu = record["gpu"]
    peaks = ", ".join(f"{p} {v / 1e12:g}" if v else f"no {p}" for p, v in gpu["peak_flops"].items())
    ridges = ", ".join(f"{p} {v:.1f}" for p, v in gpu["ridge_points"].items() if v)
    return (
        f"**Computed for {gpu['name']}** from its data sheet: TFLOP/s (INT8: TOP/s) {peaks}; {gpu['bandwidth'] / 1e9:g} GB/s; "
        f"ridge points in FLOP/byte: {ridges} for matmuls, that of FP32 for all others, which the vector units compute. Source: {gpu['source']}."
    )


def kinds_table(record):
    """One row per kind of layer."""
    header = ["layer", "count", "MFLOPs, batch 1", "share"]
    header += [f"MB {p}, batch {b}" for p in SHOWN for b in BATCHES]
    header += [f"FLOP/byte {p}, batch {b}" for p in SHOWN for b in BATCHES]
    rows = []
    for kind in record["kinds"]:
        found = kind["precisions"]
        row = [kind["kind"], kind["calls"], f"{kind['flops'] / 1e6:.2f}", f"{kind['share']:.2%}"]
        row += [f"{found[p]['bytes'][b] / 1e6:.2f}" for p in SHOWN for b in BATCHES]
        row += [f"{found[p]['intensity'][b]:.4g}" for p in SHOWN for b in BATCHES]
        rows.append(row)
    return table(header, rows)


def bound_lists(record):
    """Which layers arithmetic bounds, and which memory, at each batch and precision."""
    rows = []
    for precision in record["least_latency_s"]:
        for batch in BATCHES:
            lists = {"arithmetic": [], "memory": [], None: []}
            for kind in record["kinds"]:
                lists[kind["precisions"][precision]["bound"][batch]].append(kind["kind"])
            missing = record["gpu"]["peak_flops"][precision] is None
            cells = [
                "no such precision" if missing else ", ".join(lists[b]) or "none" for b in ("arithmetic", "memory")
            ]
            rows.append([f"{precision}, batch {batch}", *cells])
    return table(["precision, batch", "bound by arithmetic", "bound by memory"], rows)


def threshold_cell(found, peak, practical):
    """Batch real and rounded up, or never and the intensity that no batch exceeds."""
    if found is None or not peak:
        return "no such precision"
    if found["verdict"] != "from":
        return f"{found['verdict']} ({found['limiting_intensity']:.3g})"
    remark = ", not in practice" if found["batch"] > practical else ""
    return f"{found['batch']} ({found['batch_real']:.2f}{remark})"


def threshold_table(record):
    """Threshold batch of every kind of layer in every precision."""
    precisions = list(record["least_latency_s"])
    rows = []
    for kind in record["kinds"]:
        peaks = record["gpu"]["peak_flops"]
        cells = (
            threshold_cell(kind["precisions"][p]["threshold"], peaks[p], record["practical_batch"]) for p in precisions
        )
        rows.append([kind["kind"], *cells])
    return (
        f"Batch from which on arithmetic is the bound on {record['gpu']['name']}, rounded up (and as solved); "
        "or the intensity in FLOP/byte that no batch exceeds:\n\n" + table(["layer", *precisions], rows)
    )


def gpu_table(record):
    """Threshold batch of FFN 1 and of the output projection on every GPU."""
    precisions = list(record["least_latency_s"])
    shown = [k for k in ("FFN 1", "output projection") if any(kind["kind"] == k for kind in record["kinds"])]
    rows = []
    for gpu, found in record["thresholds_by_gpu"].items():
        cells = []
        for p in precisions:
            batches = [found[p][k] for k in shown] if found[p] else None
            cells.append(
                " / ".join("never" if b is None else str(b) for b in batches) if batches else "no such precision"
            )
        rows.append([gpu, *cells])
    lead = f"The same threshold on other GPUs, {' / '.join(shown)}:"
    return f"{lead}\n\n{table(['GPU', *precisions], rows)}"


def fusion_table(record):
    """Intensity of fused chains beside that of their members apart."""
    header = ["chain", *(f"{p}, batch {b}: apart → fused" for p in SHOWN for b in BATCHES)]
    rows = []
    for row in record["fusion"]:
        cells = []
        for p in SHOWN:
            found, ridge = row["precisions"][p], record["gpu"]["ridge_points"][p]
            for b in BATCHES:
                bound = "no such precision" if not ridge else "arithmetic" if found["fused"][b] >= ridge else "memory"
                cells.append(f"{found['apart'][b]:.3g} → {found['fused'][b]:.3g}: {bound}")
        rows.append([" + ".join(row["chain"]), *cells])
    return f"What fusion changes, in FLOP/byte, and what then bounds the chain:\n\n{table(header, rows)}"


def latency_table(model):
    """Least latency per precision, fused and not, beside a plan's measured one."""
    record, perf = model["complexity"], model["perf"]
    rows = []
    for precision, by_batch in record["least_latency_s"].items():
        for batch, found in by_batch.items():
            cells = [
                number(found[k] and found[k] * 1e6, ".0f") if found[k] else "no such precision"
                for k in ("apart", "fused")
            ]
            rows.append(
                [f"{precision}, batch {batch}", *cells, measured_latency(perf, record["gpu"], precision, batch)]
            )
    header = ["precision, batch", "least µs, layer by layer", "least µs, chains fused", "measured p50 µs of the plan"]
    return f"Least latency on {record['gpu']['name']}, by arithmetic and memory alone:\n\n{table(header, rows)}"


def measured_latency(perf, gpu, precision, batch):
    """p50 of the plan at concurrency 1 in µs, if TensorRT executed it on that GPU at that batch."""
    if not perf or on_cpu(perf) or not PLANS[precision] or str(perf["settings"]["batch_size"]) != batch:
        return NOT_MEASURED
    rows = [r for r in perf["rows"] if (r["model"], r["concurrency"]) == (PLANS[precision], 1) and "error" not in r]
    name = (perf["environment"]["gpu"] or {}).get("name", "")
    if not rows or not gpu["pattern"] or not re.search(gpu["pattern"], name, re.IGNORECASE):
        return NOT_MEASURED
    return f"{rows[0]['latency_p50_ms'] * 1e3:.0f}"


def measured_parts(record):
    """The layers' own times on the machine that measured them."""
    m = record["measured"]
    machine, peak = m["machine"], next(iter(m["machine"]["peak_flops"].items()))
    lead = (
        f"**Measured** on {caption(m)}; {m['device'].upper()}, {m['threads']} threads, {m['library']}: {peak[0]} GEMM {peak[1] / 1e9:.0f} GFLOP/s, "
        f"triad {machine['bandwidth'] / 1e9:.1f} GB/s, ridge point {peak[1] / machine['bandwidth']:.1f} FLOP/byte, last cache {m['cache_bytes'] / 2**20:.0f} MiB."
    )
    rows = []
    for r in m["layers"]:
        times = [
            f"{r[k] * 1e6:.1f}" if r.get(k) else "" for k in ("warm_s", "cold_s", "memory_s", "move_s", "overhead_s")
        ]
        speed = (f"{r['achieved_flops'] / 1e9:.1f}", f"{r['roofline_share']:.0%}")
        rows.append(
            [r["kind"], r["batch"], *times, *speed, r["predicted"], r["measured"], "yes" if r["agree"] else "no"]
        )
    header = [
        "layer",
        "batch",
        "µs, all in cache",
        "µs, weights from memory",
        "µs, all from memory",
        "µs to move its bytes",
        "µs of a call on nothing",
    ]
    header += ["GFLOP/s", "share of the roofline", "predicted bound", "measured bound", "agree"]
    models = [
        [
            x["batch"],
            *(f"{x[k] * 1e3:.2f}" for k in ("seconds", "sum_of_layers_s", "least_s")),
            f"{x['sum_of_layers_s'] / x['seconds']:.2f}",
        ]
        for x in m["models"]
    ]
    whole = table(["batch", "whole model ms", "sum of its layers ms", "roofline ms", "sum / whole"], models)
    return [lead, table(header, rows), agreement_line(m), whole]


def agreement_line(measured):
    """In how many layers prediction and measurement agree, and where they do not."""
    parts = []
    for batch in map(int, BATCHES):
        rows = [r for r in measured["layers"] if r["batch"] == batch]
        matmuls = [r for r in rows if r["matmul"]]
        lost = [f"{r['kind']} (predicted {r['predicted']}, measured {r['measured']})" for r in rows if not r["agree"]]
        parts.append(
            f"Batch {batch}: prediction and measurement agree for {sum(r['agree'] for r in matmuls)} of {len(matmuls)} kinds of matmuls and "
            f"{sum(r['agree'] for r in rows) - sum(r['agree'] for r in matmuls)} of {len(rows) - len(matmuls)} others; not for: {', '.join(lost) or 'none'}."
        )
    return " ".join(parts)
