"""Tables of the report: each block_* turns measurements into the Markdown of one marked block.

A model is what report.py loads: {"card", "slug", "folder"} and one record per file of
results/<model>/, None where that was not measured.
"""

from core.tables import EMBEDDERS, REFERENCE, SERVED

NOT_MEASURED = "not measured"
SUMMARY_CONCURRENCIES = (1, 8)
TUNE_CONCURRENCIES = (1, 4, 8)


def title(model):
    """Name of the model, with a warning where its weights are random."""
    weights = model["card"]["weights"]
    return model["card"]["name"] + ("" if weights == "real" else f" (weights: {weights})")


def caption(record):
    """One line: machine, date, code."""
    e = record["environment"]
    gpu = f"{e['gpu']['name']}, driver {e['gpu']['driver']}" if e["gpu"] else "no GPU"
    commit = f"commit {e['commit'][:10]}{' + changes' if e['dirty'] else ''}" if e["commit"] else "no commit"
    return f"{e['cpu']}, {e['cores']} cores, {e['memory_gib']} GiB, {gpu}; {e['utc'][:10]}; {commit}"


def on_cpu(record):
    """Whether the TensorRT models were executed by ONNX Runtime on a CPU."""
    return any(
        "TensorRT" not in engine for suffix, engine in record["server"]["engines"].items() if suffix != REFERENCE
    )


def engines_of(model, suffix):
    """What executed an embedder; both where quality and speed were measured on different engines."""
    records = {kind: model[kind] for kind in ("quality", "perf") if model[kind]}
    engines = {kind: record["server"]["engines"][suffix] for kind, record in records.items()}
    if len(set(engines.values())) > 1:
        return "; ".join(f"{kind}: {engine}" for kind, engine in engines.items())
    return next(iter(engines.values()), NOT_MEASURED)


def gpu_statement(models):
    """Whether any plan was measured on a GPU."""
    measured = [title(m) for m in models if m["perf"] and not on_cpu(m["perf"])]
    return f"TensorRT on a GPU: {'measured for ' + ', '.join(measured) if measured else NOT_MEASURED}."


def relative(model, name):
    """Path of a result as report.md links it."""
    return f"results/{model['slug']}/{name}"


def table(header, rows):
    """Markdown table; the first column is left aligned, numbers are right aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def number(value, form):
    """A number, or "not measured"."""
    return NOT_MEASURED if value is None else format(value, form)


def quality_of(model, suffix):
    """Averages of one plan; empty where not measured."""
    return (model["quality"] or {}).get("averages", {}).get(suffix, {})


def level_of(model, suffix, concurrency):
    """The performance row of one embedder at one concurrency; empty where not measured."""
    rows = (model["perf"] or {}).get("rows", [])
    return next((r for r in rows if r["model"] == suffix and r["concurrency"] == concurrency), {})


def block_results(models):
    """The short table: one row per model and embedder."""
    parts = []
    for model in models:
        rows = []
        for suffix in EMBEDDERS:
            quality = quality_of(model, suffix)
            levels = [level_of(model, suffix, c) for c in SUMMARY_CONCURRENCIES]
            reference = suffix == REFERENCE
            rows.append(
                [
                    suffix,
                    engines_of(model, suffix),
                    "reference"
                    if reference
                    else quality.get("error") or number(quality.get("relative_l2_error"), ".2e"),
                    "reference" if reference else quality.get("error") or number(quality.get("mean_cosine"), ".5f"),
                    *(level.get("error") or number(level.get("throughput_infer_per_s"), ".1f") for level in levels),
                    levels[-1].get("error") or number(levels[-1].get("latency_p99_ms"), ".1f"),
                ]
            )
        header = ["embedder", "executed by", "relative L2 error", "mean cosine"]
        header += [f"infer/s, concurrency {c}" for c in SUMMARY_CONCURRENCIES]
        header += [f"p99 ms, concurrency {SUMMARY_CONCURRENCIES[-1]}"]
        captions = dict.fromkeys(caption(model[kind]) for kind in ("quality", "perf") if model[kind])
        lead = f"**{title(model)}**, length {model['card']['max_length']}. {' | '.join(captions)}"
        parts.append(f"{lead}\n\n{table(header, rows)}")
    parts.append(
        "Where the second column says ONNX Runtime, the graph that TensorRT is asked to compile was executed on a CPU: "
        f"its deviations are those of the arithmetic, its speed says nothing about TensorRT. {gpu_statement(models)}"
    )
    return "\n\n".join(parts)


def block_models(models):
    """Where each model comes from."""
    rows = []
    for model in models:
        c = model["card"]
        size = f"{c['parameters'] / 1e6:.1f} M"
        rows.append(
            [
                c["name"],
                c["source"],
                c["weights"],
                c["architecture"],
                size,
                c["max_length"],
                c["num_outputs"],
                number(c.get("max_abs_error_to_torch"), ".1e"),
            ]
        )
    header = [
        "model",
        "source",
        "weights",
        "architecture",
        "parameters",
        "length",
        "outputs per token",
        "max abs error ONNX Runtime to torch",
    ]
    return table(header, rows)


def block_environment(models):
    """Versions and machine of every measurement."""
    rows = []
    for model in models:
        for name in ("quality", "perf"):
            if model[name]:
                e, server = model[name]["environment"], model[name]["server"]
                versions = ", ".join(f"{package} {version}" for package, version in e["packages"].items() if version)
                rows.append(
                    [
                        f"{title(model)}: {name}",
                        caption(model[name]),
                        f"Python {e['python']}, {versions}",
                        f"{server['name']} {server['version']}",
                        server["protocol"],
                    ]
                )
    return table(["measurement", "machine, date, code", "versions", "server", "protocol"], rows)


def block_deviations(models):
    """Deviations of every plan from the reference, and their distribution."""
    parts = []
    for model in models:
        quality = model["quality"]
        head = f"### {title(model)}"
        if not quality:
            parts.append(f"{head}\n\n{NOT_MEASURED}")
            continue
        rows = []
        for plan, row in quality["averages"].items():
            engine = quality["server"]["engines"][plan]
            if "error" in row:
                rows.append([plan, engine, row["error"], "", "", "", "", ""])
                continue
            rows.append(
                [
                    plan,
                    engine,
                    *(
                        f"{row[k]:.2e}"
                        for k in ("max_abs_error", "mean_abs_error", "relative_l2_error", "worst_relative_l2_error")
                    ),
                    f"{row['mean_cosine']:.6f}",
                    f"{row['argmax_flip_share']:.2%}",
                ]
            )
        header = [
            "plan",
            "executed by",
            "max abs",
            "mean abs",
            "relative L2",
            "relative L2, worst text",
            "mean cosine",
            "argmax flips",
        ]
        texts = quality["texts"]
        lead = f"{caption(quality)}; {texts['count']} texts ({texts['file']}), averages over texts, real tokens only."
        picture = f"![Share of texts against relative L2 error, one line per plan]({relative(model, 'quality.png')})"
        data = f"Data: [quality.csv]({relative(model, 'quality.csv')})"
        parts.append("\n\n".join([head, lead, table(header, rows), picture, data]))
    return "\n\n".join(parts)


def block_performance(models):
    """Throughput and latency of every model alone, the best embedder, the server beside the bare session."""
    parts = []
    for model in models:
        perf = model["perf"]
        parts.append(f"### {title(model)}")
        if not perf:
            parts.append(NOT_MEASURED)
            continue
        s = perf["settings"]
        parts.append(
            f"{caption(perf)}{', completed later' if perf.get('resumed') else ''}; perf_analyzer, {s['protocol']}, batch size {s['batch_size']}, {s['inputs']}; {s['windows']} windows "
            f"of about {s['window_s']:g} s, stable within {s['stability_percent']:g} %{', quick run' if perf['quick'] else ''}."
        )
        if on_cpu(perf):
            parts.append(
                "**These are speeds of ONNX Runtime on a CPU executing the typed graphs. They allow no conclusion about TensorRT**, "
                f"whose speed on a GPU is {NOT_MEASURED} here."
            )
        parts.append(f"![Throughput against concurrency, latency against throughput]({relative(model, 'perf.png')})")
        if perf["server_memory_mib"]:
            parts.append(f"Memory of the server with all its models: {perf['server_memory_mib']:.0f} MiB.")
        parts.append(level_table(perf))
        parts.append(best_table(perf))
        if perf["bare_infer_per_s"]:
            parts += [bare_table(perf), target_table(perf)]
        parts.append(
            f"Data: [perf.json]({relative(model, 'perf.json')}), perf_analyzer's own output in [perf/](results/{model['slug']}/perf)."
        )
    return "\n\n".join(parts)


def level_table(perf):
    """Every level: client's latencies, server's split, what the server used."""
    header = ["model", "concurrency", "infer/s", "served / bare", "mean ms", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    header += ["queue ms", "compute ms", "mean batch", "server CPU cores", "stable"]
    rows = []
    measured = {(row["model"], row["concurrency"]): row for row in perf["rows"]}
    for model, concurrency in perf["planned"]:
        row = measured.get((model, concurrency))
        if not row:  # the run was cut off
            rows.append([model, concurrency, NOT_MEASURED, *[""] * (len(header) - 3)])
            continue
        if "error" in row:
            rows.append([row["model"], row["concurrency"], f"refused: {row['error']}", *[""] * (len(header) - 3)])
            continue
        latencies = (f"{row[f'latency_{k}_ms']:.1f}" for k in ("mean", "p50", "p90", "p95", "p99"))
        optional = {"served_to_bare": ".2f", "mean_batch_size": ".2f", "server_cpu_cores": ".2f"}
        ratio, batch, cores = (format(row[k], form) if k in row else "" for k, form in optional.items())
        stable = "yes" if row["stable"] else f"no, {row['spread_percent']:.0f} %"
        server = (f"{row['server_queue_ms']:.1f}", f"{row['server_compute_ms']:.1f}", batch, cores, stable)
        rows.append(
            [row["model"], row["concurrency"], f"{row['throughput_infer_per_s']:.1f}", ratio, *latencies, *server]
        )
    return table(header, rows)


def best_table(perf):
    """One row per embedder: its highest throughput, speed-up over ONNX, p99 alone and under load."""
    levels = {(r["model"], r["concurrency"]): r for r in perf["rows"] if "error" not in r}
    low, high = (f(c for _, c in levels) for f in (min, max)) if levels else (1, 1)
    peaks = {}
    for suffix in EMBEDDERS:
        own = [r for (name, _), r in levels.items() if name == suffix]
        if own:
            peaks[suffix] = max(own, key=lambda r: r["throughput_infer_per_s"])
    tails = {c: {s: levels[s, c]["latency_p99_ms"] for s in EMBEDDERS if (s, c) in levels} for c in (low, high)}

    def cell(value, form, best):
        return f"**{value:{form}}**" if value == best else f"{value:{form}}"

    fastest = max((r["throughput_infer_per_s"] for r in peaks.values()), default=None)
    rows = []
    for suffix, peak in peaks.items():
        speed, reference = peak["throughput_infer_per_s"], peaks.get(REFERENCE)
        ratio = f"{speed / reference['throughput_infer_per_s']:.2f}" if reference else NOT_MEASURED
        ends = [
            cell(tails[c][suffix], ".1f", min(tails[c].values())) if suffix in tails[c] else NOT_MEASURED
            for c in (low, high)
        ]
        executed = perf["server"]["engines"][suffix]
        rows.append([suffix, executed, cell(speed, ".1f", fastest), peak["concurrency"], ratio, *ends])
    header = [
        "embedder",
        "executed by",
        "highest infer/s",
        "at concurrency",
        "speed-up over ONNX",
        f"p99 ms, concurrency {low}",
        f"p99 ms, concurrency {high}",
    ]
    return f"The best of each column in bold.\n\n{table(header, rows)}"


def bare_table(perf):
    """The graphs without a server, and the ensemble beside the sum of its parts."""
    bare = perf["bare_infer_per_s"]
    batches = list(next(iter(bare.values())))
    rows = [[suffix, *(f"{speeds[b]:.1f}" for b in batches)] for suffix, speeds in bare.items()]
    text = "Bare sessions, the same graphs without a server, the better of ONNX Runtime's default and the server's setting, sequences/s:"
    text += f"\n\n{table(['graph', *(f'batch {b}' for b in batches)], rows)}"
    if ratio := ensemble_to_bare(perf):
        text += (
            "\n\nAll five in one request: the ensemble's mean latency at concurrency 1 is "
            f"{ratio:.2f} times the sum of the five bare runs at batch 1."
        )
    return text


def target_table(perf):
    """What the CPU server is meant to reach, and what it reached."""
    levels = {(r["model"], r["concurrency"]): r for r in perf["rows"] if "error" not in r}
    fp32 = (REFERENCE, "TRT_FP32")
    lone = [levels[m, 1]["served_to_bare"] for m in fp32 if (m, 1) in levels]
    loaded = [r["served_to_bare"] for (m, c), r in levels.items() if m in fp32 and c >= 4]
    tails = [levels[m, 8]["latency_p99_ms"] / levels[m, 8]["latency_p50_ms"] for m in fp32 if (m, 8) in levels]
    speeds = {
        m: max((r["throughput_infer_per_s"] for (n, _), r in levels.items() if n == m), default=None)
        for m in perf["server"]["engines"].keys() | {"tokenizer"}
    }
    embedders = [speeds[m] for m in EMBEDDERS if speeds.get(m)]
    tokenizer = [speeds["tokenizer"] / max(embedders)] if speeds["tokenizer"] and embedders else []
    ensemble = [ensemble_to_bare(perf)] if ensemble_to_bare(perf) else []
    targets = (
        ("FP32 graphs, concurrency 1: served / bare at least", 0.90, lone, min),
        ("FP32 graphs, concurrency 4 and above: served / bare at least", 0.97, loaded, min),
        ("FP32 graphs, concurrency 8: p99 / p50 at most", 2.0, tails, max),
        ("tokenizer / fastest embedder at least", 20.0, tokenizer, min),
        ("ensemble / sum of five bare runs at most", 1.1, ensemble, max),
    )
    rows = []
    for what, target, values, worst in targets:
        found = worst(values) if values else None
        met = found is not None and (found >= target if worst is min else found <= target)
        rows.append(
            [what, f"{target:g}", number(found, ".2f"), NOT_MEASURED if found is None else "yes" if met else "no"]
        )
    return f"What the server on a CPU is meant to cost, the worst level of each:\n\n{table(['target', 'value', 'measured', 'met'], rows)}"


def ensemble_to_bare(perf):
    """Mean latency of the ensemble at concurrency 1 over the sum of the bare runs at batch 1; None if not measured."""
    bare = perf["bare_infer_per_s"]
    row = next(
        (r for r in perf["rows"] if r["model"] == "ensemble" and r["concurrency"] == 1 and "error" not in r), None
    )
    if not row or len(bare) < len(EMBEDDERS):
        return None
    return row["latency_mean_ms"] / sum(1e3 / next(iter(speeds.values())) for speeds in bare.values())


def block_tuning(models):
    """What each setting of the CPU server gives."""
    parts = []
    for model in models:
        record = model["tune"]
        if not record:
            continue
        rows = []
        for name, found in record["settings"].items():
            levels = {(r["model"], r["concurrency"]): r for r in found["rows"] if "error" not in r}
            bare = max(found["bare_infer_per_s"].get(REFERENCE, {}).values(), default=None)
            speeds = [
                number(levels.get((REFERENCE, c), {}).get("throughput_infer_per_s"), ".1f") for c in TUNE_CONCURRENCIES
            ]
            tail = levels.get((REFERENCE, 8))
            tail = f"{tail['latency_p99_ms'] / tail['latency_p50_ms']:.2f}" if tail else NOT_MEASURED
            ensemble = number(levels.get(("ensemble", 1), {}).get("latency_mean_ms"), ".1f")
            rows.append([name, *speeds, number(bare, ".1f"), tail, ensemble])
        header = [
            "setting",
            *(f"ONNX infer/s, concurrency {c}" for c in TUNE_CONCURRENCIES),
            "bare",
            "p99 / p50, concurrency 8",
            "ensemble mean ms",
        ]
        parts.append(f"**{title(model)}**. {caption(record)}\n\n{table(header, rows)}")
    return "\n\n".join(parts) or NOT_MEASURED


def block_tensorrt(models):
    """TensorRT on a GPU: the measured ones, or that there is none."""
    if any(m["perf"] and not on_cpu(m["perf"]) for m in models):
        return f"{gpu_statement(models)} See Performance."
    plans = [suffix for suffix in EMBEDDERS if suffix != REFERENCE]
    return table(
        ["plan", "infer/s", "p50 ms", "p99 ms", "deviation on a GPU"], [[p, *[NOT_MEASURED] * 4] for p in plans]
    )


def block_plans(models):
    """What is in each plan, and what the compile check says of each graph."""
    parts = []
    for model in models:
        parts.append(f"### {title(model)}")
        plans = (model["plans"] or {}).get("plans", {})
        if model["plans"]:
            parts.append(caption(model["plans"]))
        rows = []
        for precision in SERVED:
            m = plans.get(precision)
            if not m:
                rows.append([precision, *[NOT_MEASURED] * 8])
                continue
            counts = [", ".join(f"{n} {p}" for p, n in m["counts"][k].items()) for k in ("layers", "weight_matmuls")]
            how = m["built_as"] + (", plain INT8" if m["plain_int8"] else "")
            target = f"TensorRT {m['tensorrt_version']}, {m['gpu']} ({m['compute_capability']}), driver {m['driver']}"
            size = f"{m['plan_bytes'] / 1e6:.1f}"
            rows.append([precision, m["graph"], how, *counts, size, f"{m['build_s']:.0f}", m["tf32"], target])
        header = [
            "plan",
            "graph",
            "precision by",
            "layers",
            "weight MatMuls",
            "MB",
            "build s",
            "TF32",
            "built with, on",
        ]
        parts.append(table(header, rows))
        parts.append(compile_table(model))
    return "\n\n".join(parts)


def block_sensitivity(models):
    """What the search for INT8 found: the choice, the curve, each MatMul's own effect."""
    parts = []
    for model in models:
        record = model["sensitivity"]
        if not record:
            continue
        texts, target = record["texts"], record["target"]
        parts.append(f"### {title(model)}")
        parts.append(
            f"{caption(record)}; {texts['calibration']} texts calibrated, {texts['selection']} others selected ({texts['file']}), "
            f"seed {record['seed']}; {record['seconds']:.0f} s, {record['peak_memory_mib']} MiB at most"
            f"{'; stopped by --max-minutes' if record['time_was_over'] else ''}."
        )
        wanted = f"Target: mean cosine at least {target['mean_cosine']:g}, relative L2 error at most {target['relative_l2_error']:g}, share at least {target['int8_flops_share']:.0%}."
        parts.append(f"{wanted} {search_outcome(record)}")
        rows = [
            [f"{p['int8_flops_share']:.1%}", number(p["mean_cosine"], ".5f"), number(p["relative_l2_error"], ".4f")]
            for p in record["curve"]
        ]
        parts.append(table(["share of FLOPs in INT8", "mean cosine", "relative L2 error"], rows))
        picture = relative(model, "sensitivity.png")
        parts.append(f"![Quality against the share in INT8; error of each MatMul alone in INT8]({picture})")
        parts.append(sensitivity_table(record))
        parts.append(f"Data: [sensitivity.json]({relative(model, 'sensitivity.json')})")
    return "\n\n".join(parts) or NOT_MEASURED


def search_outcome(record):
    """One sentence: what the search chose and reached, or that nothing met the target."""
    if not record["reached"]:
        return "No graph met it."
    reached = "; ".join(
        f"{plan}: {number(row['mean_cosine'], '.4f')} and {number(row['relative_l2_error'], '.3f')}"
        for plan, row in record["reached"].items()
    )
    return f"Chosen: {record['int8_flops_share']:.1%} of the weight-MatMul FLOPs in INT8; on the selecting texts {reached}."


def sensitivity_table(record):
    """One row per MatMul, the largest error first."""
    rows = []
    for row in sorted(record["matmuls"], key=lambda r: -(r["relative_l2_error"] or 0)):
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}{' + offsets' if row['offsets'] else ''}"
        error, cosine = number(row["relative_l2_error"], ".4f"), number(row["mean_cosine"], ".5f")
        where = "INT8" if row["int8"] else "floating point"
        rows.append([f"`{row['matmul']}`", f"{row['flops_share']:.2%}", error, cosine, alpha, where, row["why"]])
    header = [
        "MatMul, alone in INT8",
        "share of FLOPs",
        "relative L2 error",
        "mean cosine",
        "smoothing α",
        "computed in",
    ]
    return table([*header, "why"], rows)


def block_sts(models):
    """Last hidden state and sentence similarity per plan."""
    parts = []
    for model in models:
        record = model["sts"]
        if not record:
            continue
        pairs = record["pairs"]
        said = f"{pairs['count']} pairs ({pairs['file']})" if pairs else "no sentence pairs given"
        rows = []
        for suffix, row in record["plans"].items():
            spearman = number(row["spearman"], ".4f")
            rows.append([suffix, f"{row['mean_cosine']:.6f}", f"{row['relative_l2_error']:.2e}", spearman])
        header = [
            "graph",
            "hidden state: mean cosine",
            "hidden state: relative L2 error",
            "sentence similarity: Spearman",
        ]
        lead = f"**{title(model)}**. {caption(record)}; {record['texts']} texts, {said}."
        parts.append(f"{lead}\n\n{table(header, rows)}")
    return "\n\n".join(parts) or NOT_MEASURED


def compile_table(model):
    """Result of compile_check.py as a table: graph by architecture."""
    record = model["compile"]
    if not record:
        return f"Compile check: {NOT_MEASURED}."
    architectures = list(dict.fromkeys(row["architecture"] for row in record["rows"]))
    cells = {(row["graph"], row["architecture"]): row for row in record["rows"]}
    rows = []
    for graph in dict.fromkeys(row["graph"] for row in record["rows"]):
        found = (cells[graph, a] for a in architectures)
        rows.append(
            [graph, *(f"refused: {c['error']}" if c["error"] else f"compiled, {c['seconds']:.1f} s" for c in found)]
        )
    lead = f"Compile check with TensorRT for RTX {record['tensorrt_rtx']}, without a GPU. {caption(record)}"
    return f"{lead}\n\n{table(['graph', *architectures], rows)}"


BLOCKS = {
    "results": block_results,
    "models": block_models,
    "environment": block_environment,
    "deviations": block_deviations,
    "performance": block_performance,
    "tuning": block_tuning,
    "plans": block_plans,
    "sensitivity": block_sensitivity,
    "sts": block_sts,
    "tensorrt": block_tensorrt,
}
