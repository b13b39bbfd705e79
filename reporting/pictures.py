"""Pictures of the report: drawn from results/<slug>/<machine>/, with the digest of data and drawing code inside."""

import csv
import hashlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from core.files import replace_when_done
from core.tables import MODELS, PRECISIONS, REFERENCE, REFERENCE_LINE, REFERENCE_MARKER
from reporting.length import growth
from reporting.peers import OWN, titled
from reporting.services import SERVICE
from reporting.speed import FIGURES, executed_by, levels
from reporting.verdicts import named

# readable in black and white
STYLES = {key: (PRECISIONS[model.precision].line, PRECISIONS[model.precision].marker) for key, model in MODELS.items()}
STYLES[REFERENCE] = (REFERENCE_LINE, REFERENCE_MARKER)
COLORS = {key: f"C{i}" for i, key in enumerate(STYLES)}  # the same in every picture
SETTINGS = {
    "axes.grid": True, "axes.grid.which": "both", "grid.alpha": 0.25, "legend.fontsize": 7,
    "axes.titlesize": 9, "figure.titlesize": 10, "lines.markersize": 5, "figure.constrained_layout.use": True, "savefig.dpi": 120,
}  # fmt: skip


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_deviations(model):
    """Empirical distribution of the relative L2 error over texts, one line per plan."""
    errors = {}
    for row in read_rows(model["folder"] / "quality.csv"):
        if row["relative_l2_error"]:
            errors.setdefault(row["plan"], []).append(float(row["relative_l2_error"]))
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for plan, values in errors.items():
        values.sort()
        exact = values.count(0)  # a logarithmic axis has no place for them
        label = f"{plan}: exact for {exact} of {len(values)} texts" if exact else plan
        shares = np.arange(exact + 1, len(values) + 1) / len(values)
        line = STYLES.get(plan, ("-",))[0]
        axes.step(
            values[exact:], shares, linestyle=line, color=COLORS.get(plan), where="post", linewidth=2.2, label=label
        )
    axes.set(xlabel="relative L2 error of a text's output to the ONNX reference", xscale="log")
    axes.set(ylabel="share of texts", ylim=(0, 1.02), title=f"{model['title']}: deviation per text")
    axes.legend()
    return figure


def draw_performance(model):
    """Throughput with the span of its rounds, p50 and p99, each against concurrency."""
    perf, found = model["perf"], levels(model["perf"])
    measured = {m: [found[n, c] for n, c in sorted(found) if n == m] for m, _ in found}
    names = [name for name in STYLES if name in measured] or [SERVICE]  # of one pass only the whole is measured
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharex=True)
    labels = ("throughput, texts/s", "latency p50, ms", "latency p99, ms")
    for axes, key, label in zip(panels, FIGURES.values(), labels, strict=True):
        for name in names:
            rows, (line, marker) = measured.get(name, []), STYLES.get(name, ("-", "o"))
            if key == FIGURES["throughput"]:
                ends = [[r[f"throughput_{end}_infer_per_s"] for r in rows] for end in ("min", "max")]
                axes.vlines([r["concurrency"] for r in rows], *ends, color="0.4")
            axes.plot(
                [r["concurrency"] for r in rows],
                [np.nan if r[key] is None else r[key] for r in rows],  # no line across a level without a p99
                linestyle=line,
                marker=marker,
                color=COLORS.get(name),
                label=name if any(r[key] is not None for r in rows) else f"{name}: n too small",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="concurrency", ylabel=label, ylim=(0, None))
        axes.legend()
    figure.suptitle(
        f"{model['title']}; executed by {executed_by(perf)}; {perf['environment']['cpu']}; bars: slowest and fastest round"
    )
    return figure


def draw_roofline(model):
    """The roofs of a GPU, and every kind of layer at batch 1 (hollow) and 8 (filled)."""
    record = model["complexity"]
    peaks, bandwidth = record["gpu"]["peak_flops"], record["gpu"]["bandwidth"]
    precision = next(p for p in ("FP16", "FP32", *peaks) if peaks.get(p))
    figure, axes = plt.subplots(figsize=(7.5, 6))
    for name, peak, line in (("matmuls", peaks[precision], "-"), ("all others, vector units", peaks["FP32"], "--")):
        xs = np.array([0.05, peak / bandwidth, 3000])
        axes.plot(xs, np.minimum(peak, xs * bandwidth) / 1e12, color="black", linestyle=line, label=f"roof of {name}")
    groups = {}  # layers of the same intensities share a point
    for kind in (k for k in record["kinds"] if k["flops"]):
        intensity = kind["precisions"][precision]["intensity"]
        key = (f"{intensity['1']:.3g}", f"{intensity['8']:.3g}", kind["matmul"])
        groups.setdefault(key, []).append(kind)
    for i, kinds in enumerate(groups.values()):
        xs = np.array([kinds[0]["precisions"][precision]["intensity"][batch] for batch in ("1", "8")])
        ys = np.minimum(peaks[precision] if kinds[0]["matmul"] else peaks["FP32"], xs * bandwidth) / 1e12
        style = {"color": f"C{i % 10}", "marker": "os^Dv<>pP*X"[i % 11], "linestyle": ""}
        axes.plot(xs[:1], ys[:1], markerfacecolor="none", **style)
        axes.plot(xs[1:], ys[1:], label=", ".join(k["kind"] for k in kinds), **style)
    axes.set(xlabel=f"intensity in {precision}, FLOP/byte", ylabel="attainable TFLOP/s", xscale="log", yscale="log")
    axes.set(title="hollow: batch 1, filled: batch 8")
    figure.legend(ncols=3, loc="outside lower center")
    figure.suptitle(f"{model['title']}: {precision}, computed for {record['gpu']['name']} from its data sheet")
    return figure


def draw_sensitivity(model):
    """Quality against the share of the FLOPs in INT8, with the targets and what was chosen."""
    record = model["sensitivity"]
    figure, axes = plt.subplots(figsize=(7.5, 4))
    points = [p for p in record["curve"] if p["mean_cosine"] is not None]
    shares, target = [100 * p["int8_flops_share"] for p in points], record["target"]
    for name, style, values, limit in (
        ("1 - mean cosine", "o-", [1 - p["mean_cosine"] for p in points], 1 - target["mean_cosine"]),
        ("relative L2 error", "s--", [p["relative_l2_error"] for p in points], target["relative_l2_error"]),
    ):
        (line,) = axes.plot(shares, values, style, label=name)
        axes.axhline(limit, color=line.get_color(), linestyle=":", label=f"target: {name} at most {limit:.3g}")
    if record["int8_flops_share"]:
        axes.axvline(100 * record["int8_flops_share"], color="gray", linewidth=0.8, label="chosen")
    output = next(iter(record["model"]["outputs"]))
    axes.set(xlabel="share of the weight-MatMul FLOPs in INT8, %", ylabel=f"deviation of {output}", yscale="log")
    axes.set(title=f"{model['title']}: search for INT8")
    axes.legend()
    return figure


def draw_ablation(model):
    """The error of all in INT8 after each further way of keeping it close."""
    rows = [row for row in model["ablation"]["rows"] if row["mean_cosine"] is not None]
    figure, axes = plt.subplots(figsize=(7.5, 2.5))
    bars = axes.barh([row["ways"] for row in rows], [100 * row["relative_l2_error"] for row in rows], color="0.6")
    axes.bar_label(bars, fmt="%.2g", padding=2)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel="relative L2 error, %", title=f"{model['title']}: all weight MatMuls in INT8")
    return figure


def draw_verdicts(model):
    """A scatter of logits against torch's per model; flipped verdicts are crosses."""
    record, rows = model["verdicts"], read_rows(model["folder"] / "verdicts.csv")
    threshold = record["threshold"]
    labels = record["model"]["labels"] if threshold is None else [record["positive"]]
    logits = {n: np.array([[float(row[f"{n} {label}"]) for label in labels] for row in rows]) for n in record["models"]}
    reference = logits.pop("torch")
    columns = min(len(logits), 3)
    lines = -(-len(logits) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(3 * max(columns, 2), 3.2 * lines + 0.2), squeeze=False)
    for axes in panels.flat[len(logits) :]:
        axes.set_axis_off()
    for axes, (name, values) in zip(panels.flat, logits.items(), strict=False):
        ends = [reference.min(), reference.max()]
        axes.plot(ends, ends, color="0.6", linewidth=1)
        if threshold is None:
            flipped = reference.argmax(axis=1) != values.argmax(axis=1)
        else:
            flipped = ((reference >= threshold) != (values >= threshold))[:, 0]
            axes.axhline(threshold, color="0.4", linewidth=0.8, linestyle=":")
            axes.axvline(threshold, color="0.4", linewidth=0.8, linestyle=":")
        axes.scatter(reference[~flipped], values[~flipped], s=5, alpha=0.5, linewidths=0)
        axes.scatter(reference[flipped], values[flipped], s=28, marker="x", color="black", label="other verdict")
        axes.set(xlabel="logit, torch", ylabel=f"logit, {named(name, record['models'][name]['engine'])}")
        axes.legend()
    figure.suptitle(f"{model['title']}: verdicts on {record['data']['count']} texts")
    return figure


def draw_peers(model):
    """Each system's throughput as a multiple of the project's in the same rounds, a panel for each concurrency."""
    record = model["peers"]
    systems = [system for system in record["systems"] if system["levels"]]
    figure, panels = plt.subplots(
        1, len(record["settings"]["concurrency"]), figsize=(13, 1.6 + 0.3 * len(systems)), sharey=True, squeeze=False
    )
    for axes, concurrency in zip(panels[0], record["settings"]["concurrency"], strict=True):
        for i, system in enumerate(systems):
            if found := system["levels"].get(str(concurrency), {}).get("ratio"):
                axes.barh(i, found["median"], color="0.55" if system["kind"] in OWN else "0.85", edgecolor="0.3")
                axes.hlines(i, found["min"], found["max"], color="black", linewidth=1)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="throughput as a multiple of the project's", title=f"concurrency {concurrency}")
    panels[0][0].set_yticks(range(len(systems)), [titled(system) for system in systems])
    panels[0][0].invert_yaxis()
    cpu = record["environment"]["cpu"]
    figure.suptitle(f"{model['title']}; dark: the project's services; lines: slowest and fastest round; {cpu}")
    return figure


def draw_length(model):
    """Time and FLOPs of a text against its length, as multiples of those of the shortest."""
    record = model["length"]
    tokens, times, flops = zip(*growth(record), strict=True)
    ends = [
        [row["seconds"][end] / record["rows"][0]["seconds"]["median"] for row in record["rows"]]
        for end in ("min", "max")
    ]
    figure, axes = plt.subplots(figsize=(7.5, 4))
    axes.vlines(tokens, *ends, color="0.4")
    axes.plot(tokens, times, "o-", label="time: median of the rounds, with the fastest and the slowest")
    axes.plot(tokens, flops, "s--", label="FLOPs")
    axes.set(xlabel="tokens of a text", ylabel=f"multiple of that of {tokens[0]} tokens", ylim=(0, None))
    axes.set(title=f"{model['title']}; {record['executed_by']}; {record['environment']['cpu']}")
    axes.legend()
    return figure


def draw_surface(model):
    """Share of the peak that the whole model can reach over length and batch, a panel for each of up to three precisions."""
    record = model["surface"]
    names = [p for p in ("FP16", "BEST", "FP8") if p in record["share"]] or list(record["share"])[:1]
    figure, panels = plt.subplots(1, len(names), figsize=(1.5 + 4 * len(names), 4.2), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        share = 100 * np.array(record["share"][name])
        image = axes.imshow(share, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(share):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
        axes.set_xticks(range(len(record["lengths"])), record["lengths"])
        axes.set_yticks(range(len(record["batches"])), record["batches"])
        axes.grid(False)
        axes.set(xlabel="tokens of a text", ylabel="batch", title=name)
    figure.colorbar(image, ax=panels[0], label="% of the tensor cores' peak, at most")
    figure.suptitle(f"{model['title']}: computed for {record['gpu']['name']}, with tiles and waves")
    return figure


# kind of measurement -> (how its picture is drawn, the file its data is in)
PICTURES = {
    "quality": (draw_deviations, "quality.csv"),
    "perf": (draw_performance, "perf.json"),
    "complexity": (draw_roofline, "complexity.json"),
    "surface": (draw_surface, "surface.json"),
    "sensitivity": (draw_sensitivity, "sensitivity.json"),
    "ablation": (draw_ablation, "ablation.json"),
    "peers": (draw_peers, "peers.json"),
    "length": (draw_length, "length.json"),
    "verdicts": (draw_verdicts, "verdicts.json"),  # which holds the digest of verdicts.csv
}


def digest(model, kind):
    """SHA-256 of a picture's data and of the code that draws; it is written into the picture."""
    content = [path.read_bytes() for path in (model["folder"] / PICTURES[kind][1], Path(__file__))]
    return hashlib.sha256(b"\0".join([model["title"].encode(), *content])).hexdigest()


def save_picture(model, kind, path):
    """Draw a picture and note in it what it was drawn from."""
    with plt.rc_context(SETTINGS), replace_when_done(path) as temporary:
        figure = PICTURES[kind][0](model)
        figure.savefig(temporary, format="png", metadata={"Description": digest(model, kind)})
    plt.close(figure)


def picture_is_current(model, kind, path):
    """Whether a picture was drawn from the present data by the present code."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == digest(model, kind)
