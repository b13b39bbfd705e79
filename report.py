#!/usr/bin/env python3
"""Write what results/ holds into the marked blocks of report.md and README.md.

Reads:  results/<model>/quality.json, quality.csv, perf.json, plans.json,
        compile.json, tune.json.
Writes: the text between <!-- begin NAME --> and <!-- end NAME --> in report.md and
        README.md, pictures beside the data they show.
Run:    ./report.py
Prints: the table of results. --check writes nothing and fails if a text or picture is
        not what the data gives.
"""

import argparse
import csv
import hashlib
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from common import EMBEDDERS, PRECISIONS, REFERENCE, RESULTS, ROOT, replace_when_done

NOT_MEASURED = "not measured"
LINES = {
    "ONNX": (0, (5, 1)),
    "TRT_FP32": "-",
    "TRT_FP16": "--",
    "TRT_INT8": "-.",
    "TRT_BEST": ":",
}  # readable in black and white
SUMMARY_CONCURRENCIES = (1, 8)
TUNE_CONCURRENCIES = (1, 4, 8)
MARKERS = {"ONNX": "o", "TRT_FP32": "s", "TRT_FP16": "^", "TRT_INT8": "D", "TRT_BEST": "v"}


# --- data ----------------------------------------------------------------------------


def load_results(folder):
    """[{slug, quality, perf, plans, compile}] of every model, real weights first; a missing file is None."""
    models = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = {name: path / f"{name}.json" for name in ("quality", "perf", "plans", "compile", "tune")}
        data = {name: json.loads(file.read_text()) if file.exists() else None for name, file in files.items()}
        card = next((record["model"] for record in data.values() if record), None)
        exports = {record["model"]["reference_sha256"] for record in data.values() if record}
        if len(exports) > 1:
            raise SystemExit(
                f"{path}: expected all files of one export, found {len(exports)}; run client.py, perf.py and compile_check.py again"
            )
        if card:
            models.append({"slug": path.name, "folder": path, "card": card} | data)
    if not models:
        raise SystemExit(f"{folder}: expected results of at least one model, found none; run ./run.sh")
    return sorted(models, key=lambda m: m["card"]["weights"] != "real")


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


# --- tables --------------------------------------------------------------------------


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
        record = model["perf"] or model["quality"]
        rows = []
        for suffix in EMBEDDERS:
            quality = quality_of(model, suffix)
            levels = [level_of(model, suffix, c) for c in SUMMARY_CONCURRENCIES]
            reference = suffix == REFERENCE
            rows.append(
                [
                    suffix,
                    record["server"]["engines"][suffix],
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
        parts.append(
            f"**{title(model)}**, length {model['card']['max_length']}. {caption(record)}\n\n{table(header, rows)}"
        )
    if any(on_cpu(m["perf"] or m["quality"]) for m in models):
        parts.append(
            "Where the second column says ONNX Runtime, the graph that TensorRT is asked to compile was executed on a "
            f"CPU: its deviations are those of the arithmetic, its speed says nothing about TensorRT. TensorRT on a GPU: {NOT_MEASURED}."
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
                f"{c['max_abs_error_to_torch']:.1e}",
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
            f"{caption(perf)}; perf_analyzer, {s['protocol']}, batch size {s['batch_size']}, {s['inputs']}; {s['windows']} windows "
            f"of about {s['window_s']:g} s, stable within {s['stability_percent']:g} %{', quick run' if perf['quick'] else ''}."
        )
        if on_cpu(perf):
            parts.append(
                "**These are speeds of ONNX Runtime on a CPU executing the typed graphs. They allow no conclusion about TensorRT**, "
                f"whose speed on a GPU is {NOT_MEASURED} here."
            )
        parts.append(f"![Throughput against concurrency, latency against throughput]({relative(model, 'perf.png')})")
        parts.append(level_table(perf))
        parts.append(best_table(perf))
        if perf["bare_infer_per_s"]:
            parts.append(bare_table(perf))
        parts.append(
            f"Data: [perf.json]({relative(model, 'perf.json')}), perf_analyzer's own output in [perf/](results/{model['slug']}/perf)."
        )
    return "\n\n".join(parts)


def level_table(perf):
    """Every level: client's latencies, server's split, what the server used."""
    header = ["model", "concurrency", "infer/s", "served / bare", "mean ms", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    header += ["queue ms", "compute ms", "mean batch", "server CPU cores", "server MiB", "stable"]
    rows = []
    for row in perf["rows"]:
        if "error" in row:
            rows.append([row["model"], row["concurrency"], f"refused: {row['error']}", *[""] * (len(header) - 3)])
            continue
        latencies = (f"{row[f'latency_{k}_ms']:.1f}" for k in ("mean", "p50", "p90", "p95", "p99"))
        optional = {
            "served_to_bare": ".2f",
            "mean_batch_size": ".2f",
            "server_cpu_cores": ".2f",
            "server_memory_mib": ".0f",
        }
        ratio, batch, cores, memory = (format(row[k], form) if k in row else "" for k, form in optional.items())
        stable = "yes" if row["stable"] else f"no, {row['spread_percent']:.0f} %"
        server = (f"{row['server_queue_ms']:.1f}", f"{row['server_compute_ms']:.1f}", batch, cores, memory, stable)
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
    text = f"Bare sessions, the same graphs without a server, ONNX Runtime's own defaults, sequences/s:\n\n{table(['graph', *(f'batch {b}' for b in batches)], rows)}"
    ensemble = next(
        (r for r in perf["rows"] if r["model"] == "ensemble" and r["concurrency"] == 1 and "error" not in r), None
    )
    if ensemble and len(bare) == len(EMBEDDERS):
        total = sum(1e3 / speeds[batches[0]] for speeds in bare.values())
        text += (
            f"\n\nAll five in one request: the ensemble's mean latency at concurrency 1 is {ensemble['latency_mean_ms']:.1f} ms, "
            f"{ensemble['latency_mean_ms'] / total:.2f} times the sum of the five bare runs at batch 1 ({total:.1f} ms)."
        )
    return text


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
    measured = [title(m) for m in models if m["perf"] and not on_cpu(m["perf"])]
    if measured:
        return "Measured for: " + ", ".join(measured) + "; see Performance."
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
        for precision in PRECISIONS:
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
    "tensorrt": block_tensorrt,
}


# --- pictures ------------------------------------------------------------------------


def relative(model, name):
    """Path of a result as report.md links it."""
    return f"results/{model['slug']}/{name}"


def draw_deviations(model):
    """Empirical distribution of the relative L2 error over texts, one line per plan."""
    errors = {f"TRT_{precision}": [] for precision in PRECISIONS}
    with open(model["folder"] / "quality.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["relative_l2_error"]:
                errors[row["plan"]].append(float(row["relative_l2_error"]))
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for plan, values in errors.items():
        values.sort()
        exact = sum(v == 0 for v in values)
        label = f"{plan}: exact for {exact} of {len(values)} texts" if exact else plan
        shares = [(exact + i + 1) / len(values) for i in range(len(values) - exact)]
        axes.step(values[exact:], shares, linestyle=LINES[plan], where="post", linewidth=2.2, label=label)
    axes.set_xscale("log")
    axes.set(
        xlabel="relative L2 error of a text's EMBEDDING to the ONNX reference", ylabel="share of texts", ylim=(0, 1.02)
    )
    axes.set_title(f"{title(model)}: deviation per text", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def draw_performance(model):
    """Left: throughput against concurrency. Right: p50 and p99 against throughput."""
    perf = model["perf"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for suffix, marker in MARKERS.items():
        rows = sorted(
            (r for r in perf["rows"] if r["model"] == suffix and "error" not in r), key=lambda r: r["concurrency"]
        )
        if not rows:
            continue
        speeds = [r["throughput_infer_per_s"] for r in rows]
        style = {"linestyle": LINES[suffix], "marker": marker, "markersize": 5}
        (line,) = left.plot([r["concurrency"] for r in rows], speeds, label=suffix, **style)
        for percentile, alpha in (("p50", 0.45), ("p99", 1)):
            label = f"{suffix} {percentile}"
            right.plot(
                speeds,
                [r[f"latency_{percentile}_ms"] for r in rows],
                label=label,
                color=line.get_color(),
                alpha=alpha,
                **style,
            )
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="concurrency", ylabel="throughput, infer/s", ylim=(0, None))
    right.set_yscale("log")
    right.set(xlabel="throughput, infer/s", ylabel="latency, ms")
    for axes in (left, right):
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize=7)
    engines = ", ".join(dict.fromkeys(perf["server"]["engines"].values()))
    figure.suptitle(f"{title(model)}; executed by {engines}; {perf['environment']['cpu']}", fontsize=10)
    return figure


# picture -> (what it shows, how it is drawn, the file its data is in)
PICTURES = {
    "quality.png": ("quality", draw_deviations, "quality.csv"),
    "perf.png": ("perf", draw_performance, "perf.json"),
}


def digest(model, data):
    """SHA-256 of the data behind a picture; it is written into the picture."""
    return hashlib.sha256((model["folder"] / data).read_bytes()).hexdigest()


def save_picture(model, name):
    """Draw a picture and note in it which data it shows."""
    _, draw, data = PICTURES[name]
    figure = draw(model)
    with replace_when_done(model["folder"] / name) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Description": digest(model, data)})
    plt.close(figure)


def picture_is_current(model, name):
    """Whether a picture was drawn from the present data."""
    path = model["folder"] / name
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == digest(model, PICTURES[name][2])


# --- texts ---------------------------------------------------------------------------


def fill_blocks(path, texts):
    """Content of a Markdown file with its marked blocks replaced; exits on a missing end or an unknown name."""

    def replace(match):
        name = match[1]
        if name not in texts:
            raise SystemExit(f"{path}: expected a block of {', '.join(texts)}, found {name}; correct the marker")
        return f"<!-- begin {name} -->\n\n{texts[name]}\n\n<!-- end {name} -->"

    content = path.read_text(encoding="utf-8")
    begins = re.findall(r"<!-- begin (\w+) -->", content)
    ends = re.findall(r"<!-- end (\w+) -->", content)
    if not begins or begins != ends:
        raise SystemExit(
            f"{path}: expected pairs of <!-- begin NAME --> and <!-- end NAME -->, found {begins} and {ends}; restore the markers"
        )
    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", replace, content, flags=re.DOTALL)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text or picture is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[ROOT / "report.md", ROOT / "README.md"],
        help="files with marked blocks",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    models = load_results(args.results)
    texts = {name: block(models) for name, block in BLOCKS.items()}
    stale = []
    for model in models:
        for name, (kind, _, _) in PICTURES.items():
            if model[kind] and not picture_is_current(model, name):
                stale.append(model["folder"] / name)
                if not args.check:
                    save_picture(model, name)
    for path in args.report:
        content = fill_blocks(path, texts)
        if content != path.read_text(encoding="utf-8"):
            stale.append(path)
            if not args.check:
                with replace_when_done(path) as temporary:
                    temporary.write_text(content, encoding="utf-8")
    if args.check and stale:
        raise SystemExit(
            f"expected texts and pictures made from {args.results}, found others in {', '.join(map(str, stale))}; run ./report.py"
        )
    print(
        f"{', '.join(p.name for p in args.report)}: as the data in {args.results} gives them"
        if args.check
        else texts["results"]
    )


if __name__ == "__main__":
    main()
