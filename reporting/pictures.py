"""Pictures of the report: drawn from results/<model>/, with the digest of their data inside."""

import csv
import hashlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from core.files import replace_when_done
from core.tables import SERVED
from reporting.tables import title
from reporting.verdicts import draw_verdicts
from roofline.model import intensity, peak_flops

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
    errors = {f"TRT_{precision}": [] for precision in SERVED}
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


def draw_roofline(model):
    """Left: intensity against batch with the ridges. Right: the roofs and every kind of layer at batch 1 and 8."""
    record = model["complexity"]
    gpu, length = record["gpu"], record["length"]
    precision = next(p for p in ("FP16", "FP32", *gpu["peak_flops"]) if gpu["peak_flops"][p])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.6), layout="constrained")
    batches = [2**i for i in range(11)]
    groups = {}  # layers of the same intensity at every batch share a line
    for kind in (k for k in record["kinds"] if k["flops"]):
        values = tuple(intensity(kind, b, length, precision) for b in batches)
        groups.setdefault((*(f"{v:.3g}" for v in values), kind["matmul"]), []).append((kind, values))
    for i, members in enumerate(groups.values()):
        kind, values = members[0]
        style = {"color": f"C{i % 10}", "marker": "os^Dv<>pP*X"[i % 11], "markersize": 6}
        label = ", ".join(k["kind"] for k, _ in members)
        left.plot(batches, values, linewidth=1, label=label, **style)
        peak = peak_flops(gpu, kind, precision)
        if not peak:
            continue
        for batch, face in ((1, "none"), (8, style["color"])):
            x = kind["precisions"][precision]["intensity"][str(batch)]
            right.plot(x, min(peak, x * gpu["bandwidth"]) / 1e12, linestyle="", markerfacecolor=face, **style)
    for kinds, matmul, dashes in (("matmuls", True, "-"), ("all others, vector units", False, "--")):
        peak = peak_flops(gpu, {"op": "linear" if matmul else "add"}, precision)
        if not peak:
            continue
        ridge = peak / gpu["bandwidth"]
        left.axhline(ridge, color="black", linestyle=dashes, linewidth=1, label=f"ridge of {kinds}")
        xs = [0.05, ridge, 3000]
        ys = [min(peak, x * gpu["bandwidth"]) / 1e12 for x in xs]
        right.plot(xs, ys, color="black", linestyle=dashes, linewidth=1, label=f"roof of {kinds}")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="batch", ylabel=f"intensity in {precision}, FLOP/byte")
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set(
        xlabel=f"intensity in {precision}, FLOP/byte", ylabel="attainable TFLOP/s; hollow: batch 1, full: batch 8"
    )
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(which="both", alpha=0.2)
    figure.suptitle(f"{title(model)}: {precision}, computed for {gpu['name']} from its data sheet", fontsize=10)
    return figure


def draw_sensitivity(model):
    """Left: quality against the share in INT8. Right: relative L2 error of each MatMul alone in INT8."""
    record = model["sensitivity"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(1, 1.3))
    points = [p for p in record["curve"] if p["mean_cosine"] is not None]
    shares = [100 * p["int8_flops_share"] for p in points]
    (cosine,) = left.plot(shares, [1 - p["mean_cosine"] for p in points], "o-", label="1 - mean cosine")
    (error,) = left.plot(shares, [p["relative_l2_error"] for p in points], "s--", label="relative L2 error")
    target = record["target"]
    left.axhline(1 - target["mean_cosine"], color=cosine.get_color(), linestyle=":", label="its target, at most")
    left.axhline(target["relative_l2_error"], color=error.get_color(), linestyle=":", label="its target, at most")
    output = "LOGITS" if record["model"].get("task") == "classification" else "EMBEDDING"
    if record["int8_flops_share"]:
        left.axvline(100 * record["int8_flops_share"], color="gray", linewidth=0.8, label="chosen")
    left.set_yscale("log")
    left.set(xlabel="share of the weight-MatMul FLOPs in INT8, %", ylabel=f"deviation of {output}")
    left.grid(which="both", alpha=0.25)
    left.legend(fontsize=7)
    rows = [row for row in record["matmuls"] if row["relative_l2_error"] is not None]
    colors = ["tab:blue" if row["int8"] else "lightgray" for row in rows]
    right.barh([short_name(row["matmul"]) for row in rows], [row["relative_l2_error"] for row in rows], color=colors)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=max(3, min(7, 220 / max(1, len(rows)))))
    right.set(xlabel="relative L2 error with this MatMul alone in INT8 (gray: left out)")
    right.grid(axis="x", alpha=0.25)
    figure.suptitle(f"{title(model)}: search for INT8", fontsize=10)
    return figure


def short_name(name):
    """A node's name without what all of them share, short enough for an axis."""
    return name.removesuffix("/MatMul").removesuffix("/Gemm").removeprefix("transformer.")


# picture -> (what it shows, how it is drawn, the file its data is in)
PICTURES = {
    "quality.png": ("quality", draw_deviations, "quality.csv"),
    "perf.png": ("perf", draw_performance, "perf.json"),
    "complexity.png": ("complexity", draw_roofline, "complexity.json"),
    "sensitivity.png": ("sensitivity", draw_sensitivity, "sensitivity.json"),
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
