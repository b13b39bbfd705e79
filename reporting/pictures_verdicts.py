"""Picture of a classifier's verdicts: logits against torch's, precision against recall."""

import csv

import matplotlib.pyplot as plt
import numpy as np

from core.tables import MODELS, PRECISIONS, REFERENCE, REFERENCE_LINE

LINES = {key: PRECISIONS[model.precision].line for key, model in MODELS.items()}
LINES |= {REFERENCE: REFERENCE_LINE, "torch": "-"}


def read_logits(model):
    """{name: float [texts, labels]} of verdicts.csv."""
    labels = model["verdicts"]["model"]["labels"]
    with open(model["folder"] / "verdicts.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = model["verdicts"]["models"]
    return {n: np.array([[float(row[f"{n} {label}"]) for label in labels] for row in rows]) for n in names}


def draw_verdicts(model):
    """A scatter of logits against torch per model; below, precision against recall where there is a threshold."""
    record = model["verdicts"]
    logits = read_logits(model)
    threshold = record["threshold"]
    if threshold is not None:
        column = record["model"]["labels"].index(record["positive"])
        logits = {name: values[:, column] for name, values in logits.items()}
    others = [name for name in logits if name != "torch"]
    figure = plt.figure(figsize=(3 * max(len(others), 2), 3.4 if threshold is None else 6.6), layout="constrained")
    rows = figure.subfigures(1 if threshold is None else 2, 1, squeeze=False)[:, 0]
    for axes, name in zip(rows[0].subplots(1, len(others), squeeze=False)[0], others, strict=True):
        draw_scatter(axes, name, logits["torch"], logits[name], threshold)
    if threshold is not None:
        draw_curves(rows[1].subplots(), record)
    figure.suptitle(f"{model['title']}: verdicts on {record['data']['count']} texts", fontsize=10)
    return figure


def draw_scatter(axes, name, reference, values, threshold):
    """One model's logits against torch's; flipped verdicts are crosses."""
    ends = [reference.min(), reference.max()]
    axes.plot(ends, ends, color="0.6", linewidth=1)
    if threshold is None:
        flipped = np.repeat((reference.argmax(axis=1) != values.argmax(axis=1))[:, None], reference.shape[1], axis=1)
    else:
        flipped = (reference >= threshold) != (values >= threshold)
        axes.axhline(threshold, color="0.4", linewidth=0.8, linestyle=":")
        axes.axvline(threshold, color="0.4", linewidth=0.8, linestyle=":")
    axes.scatter(reference[~flipped], values[~flipped], s=5, alpha=0.5, linewidths=0)
    axes.scatter(reference[flipped], values[flipped], s=28, marker="x", color="black", label="other verdict")
    axes.set(xlabel="logit, torch", ylabel=f"logit, {name}")
    axes.grid(alpha=0.25)
    if flipped.any():
        axes.legend(fontsize=7)


def draw_curves(axes, record):
    """Precision against recall of every model, with the point that the threshold chooses."""
    for name, row in record["models"].items():
        (line,) = axes.plot(row["curve"]["recall"], row["curve"]["precision"], linestyle=LINES[name], label=name)
        at = [row["quality"][key] and row["quality"][key]["value"] for key in ("recall", "precision")]
        if None not in at:  # no text reaches the threshold: no precision
            axes.plot(*at, marker="o", markersize=6, color=line.get_color())
    axes.set(xlabel="recall", ylabel="precision", title=f"the dots: threshold {record['threshold']:.4f}")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
