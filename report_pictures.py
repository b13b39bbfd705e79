"""Pictures of the report: drawn from results/<model>/, with the digest of their data inside."""

import csv
import hashlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from common import PRECISIONS, replace_when_done
from report_tables import title
from report_verdicts import draw_verdicts

# readable in black and white
LINES = {
    "ONNX": (0, (5, 1)),
    "TRT_FP32": "-",
    "TRT_FP16": "--",
    "TRT_INT8": "-.",
    "TRT_BEST": ":",
}  # readable in black and white
MARKERS = {"ONNX": "o", "TRT_FP32": "s", "TRT_FP16": "^", "TRT_INT8": "D", "TRT_BEST": "v"}


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
    "verdicts.png": ("verdicts", draw_verdicts, "verdicts.json"),  # which holds the digest of verdicts.csv
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
