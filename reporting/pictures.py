"""Pictures of the report: drawn from results/<slug>/<machine>/, with the digest of data and drawing code inside."""

import csv
import hashlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from core.files import replace_when_done
from core.tables import MODELS, PRECISIONS, REFERENCE, REFERENCE_LINE, REFERENCE_MARKER
from reporting.pictures_model import draw_roofline, draw_sensitivity
from reporting.pictures_verdicts import draw_verdicts
from reporting.speed import levels

# readable in black and white
STYLES = {key: (PRECISIONS[model.precision].line, PRECISIONS[model.precision].marker) for key, model in MODELS.items()}
STYLES[REFERENCE] = (REFERENCE_LINE, REFERENCE_MARKER)


def draw_deviations(model):
    """Empirical distribution of the relative L2 error over texts, one line per plan."""
    errors = {}
    with open(model["folder"] / "quality.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["relative_l2_error"]:
                errors.setdefault(row["plan"], []).append(float(row["relative_l2_error"]))
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for plan, values in errors.items():
        values.sort()
        exact = sum(v == 0 for v in values)
        label = f"{plan}: exact for {exact} of {len(values)} texts" if exact else plan
        shares = [(exact + i + 1) / len(values) for i in range(len(values) - exact)]
        line = STYLES.get(plan, ("-",))[0]
        axes.step(values[exact:], shares, linestyle=line, where="post", linewidth=2.2, label=label)
    axes.set_xscale("log")
    axes.set(
        xlabel="relative L2 error of a text's output to the ONNX reference", ylabel="share of texts", ylim=(0, 1.02)
    )
    axes.set_title(f"{model['title']}: deviation per text", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def draw_performance(model):
    """Throughput with the span of its rounds, p50 and p99, each against concurrency."""
    perf, found = model["perf"], levels(model["perf"])
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for key, (line, marker) in STYLES.items():
        rows = [found[m, c] for m, c in sorted(found) if m == key]
        style = {"linestyle": line, "marker": marker, "markersize": 5, "label": key, "capsize": 3}
        speeds = [r["throughput_infer_per_s"] for r in rows]
        span = [
            [s - r["throughput_min_infer_per_s"] for s, r in zip(speeds, rows, strict=True)],
            [r["throughput_max_infer_per_s"] - s for s, r in zip(speeds, rows, strict=True)],
        ]
        series = [(rows, speeds, span)]
        for percentile in ("latency_p50_ms", "latency_p99_ms"):
            known = [r for r in rows if r[percentile] is not None]
            series.append((known, [r[percentile] for r in known], None))
        for axes, (shown, values, bars) in zip(panels, series, strict=True):
            if shown:
                axes.errorbar([r["concurrency"] for r in shown], values, yerr=bars, **style)
    labels = ("throughput, infer/s", "latency p50, ms", "latency p99, ms")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="concurrency", ylabel=label, ylim=(0, None))
        axes.grid(which="both", alpha=0.25)
        if axes.containers:
            axes.legend(fontsize=7)
        else:
            axes.text(0.5, 0.5, "n too small", ha="center", transform=axes.transAxes)
    panels[0].set_title("bars: slowest and fastest round", fontsize=9)
    engines = ", ".join(dict.fromkeys(perf["server"]["engines"].values()))
    figure.suptitle(f"{model['title']}; executed by {engines}; {perf['environment']['cpu']}", fontsize=10)
    return figure


# picture -> (what it shows, how it is drawn, the file its data is in)
PICTURES = {
    "quality.png": ("quality", draw_deviations, "quality.csv"),
    "perf.png": ("perf", draw_performance, "perf.json"),
    "complexity.png": ("complexity", draw_roofline, "complexity.json"),
    "sensitivity.png": ("sensitivity", draw_sensitivity, "sensitivity.json"),
    "verdicts.png": ("verdicts", draw_verdicts, "verdicts.json"),  # which holds the digest of verdicts.csv
}


def digest(model, name):
    """SHA-256 of a picture's data and of the code that draws; it is written into the picture."""
    code = sorted(Path(__file__).parent.glob("pictures*.py"))
    content = [path.read_bytes() for path in (model["folder"] / PICTURES[name][2], *code)]
    return hashlib.sha256(b"\0".join([model["title"].encode(), *content])).hexdigest()


def save_picture(model, name):
    """Draw a picture and note in it what it was drawn from."""
    figure = PICTURES[name][1](model)
    with replace_when_done(model["folder"] / name) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Description": digest(model, name)})
    plt.close(figure)


def picture_is_current(model, name):
    """Whether a picture was drawn from the present data by the present code."""
    path = model["folder"] / name
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == digest(model, name)
