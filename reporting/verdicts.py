"""The report's part on classifiers: tables and picture of results/<model>/verdicts.json."""

import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from core.files import read_json
from reporting.tables import NOT_MEASURED, caption, relative, table, title

LINES = {"torch": "-", "ONNX": (0, (5, 1)), "TRT_FP32": "-", "TRT_FP16": "--", "TRT_INT8": "-.", "TRT_BEST": ":"}


# --- tables --------------------------------------------------------------------------


def interval(value):
    """0.9123 [0.8990, 0.9255]"""
    return "undefined" if value is None else f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def block_verdicts(models):
    """Agreement, quality and conclusion of every classifier that was studied."""
    parts = [verdicts_of(model) for model in models if model["verdicts"]]
    return "\n\n".join(parts) or f"Verdicts of a classifier: {NOT_MEASURED}."


def verdicts_of(model):
    """One classifier's section."""
    record = model["verdicts"]
    data, bootstrap = record["data"], record["bootstrap"]
    where = f"through Triton {record['server']['version']}" if record["server"] else "in process"
    lead = f"{caption(record)}; {data['count']} labelled texts ({data['file']}), {where}."
    if record["threshold"] is None:
        rule = "A verdict is the class with the largest logit."
    else:
        rule = (
            f"A verdict is whether the logit of `{record['positive']}` reaches {record['threshold']:.4f}: on the original model "
            f"the threshold with the best recall at precision {record['precision']:g}."
        )
    parts = [f"### {title(model)}", *training(model), lead, rule, agreement_table(record), quality_table(record)]
    parts.append(
        f"Agreement: exact {bootstrap['confidence']:.0%} interval, bootstrap beside it; the others: bootstrap, {bootstrap['resamples']} resamples. "
        "Flips: verdicts other than torch's. McNemar: exact test of who is right where torch and the model differ. "
        "Restored: flips left with the threshold closest to torch's verdicts, and in brackets counted on texts it was not chosen on."
    )
    parts.append(confusion_table(record))
    parts.append(f"![Logits against torch, precision and recall with the threshold]({relative(model, 'verdicts.png')})")
    parts.append(conclusion(record))
    parts.append(
        f"Data: [verdicts.json]({relative(model, 'verdicts.json')}), [verdicts.csv]({relative(model, 'verdicts.csv')})"
    )
    return "\n\n".join(parts)


def training(model):
    """[a sentence of training.json]; [] where the classifier was not trained by train_classifier.py."""
    path = model["folder"] / "training.json"
    if not path.is_file():
        return []
    record = read_json(path, "run train_classifier.py again")
    return [
        f"Trained on {record['data']}: {record['texts']} texts, dev accuracy {record['accuracy']:.4f} on "
        f"{record['eval_texts']} texts, {record['seconds']:.0f} s."
    ]


def graphs(record):
    """(name, row) of every model but torch."""
    return [(name, row) for name, row in record["models"].items() if name != "torch"]


def agreement_table(record):
    """How close each model's verdicts and logits are to torch's."""
    rows = []
    for name, row in graphs(record):
        d, closest = row["deviation"], row["closest_threshold"]
        after = (
            ""
            if closest is None
            else f"{closest['flips_after']} ({closest['flips_cross_validated']}) at {closest['threshold']:.4f}"
        )
        cells = [
            interval(row["agreement"]),
            interval(row["agreement_bootstrap"]),
            row["flips"],
            after,
            f"{row['mcnemar']['p']:.3g}",
        ]
        cells += [f"{d[key]:.2g}" for key in ("mean", "min", "max", "max_abs")]
        rows.append([name, row["engine"], *cells, f"{row['latency_p50_ms']:.2f}"])
    header = ["model", "executed by", "agreement, exact", "agreement, bootstrap", "flips", "restored", "McNemar p"]
    header += ["logit deviation, mean", "min", "max", "largest absolute", "p50 ms, one text"]
    return table(header, rows)


def quality_table(record):
    """How good each model's verdicts are against the labels."""
    keys = ("accuracy", "precision", "recall")
    rows = [[name, *(interval(row["quality"][key]) for key in keys)] for name, row in record["models"].items()]
    return table(["model", *keys], rows)


def confusion_table(record):
    """Each model's verdicts against torch's."""
    labels = record["model"]["labels"]
    names = labels if record["positive"] is None else [f"not {record['positive']}", record["positive"]]
    rows = []
    for name, row in graphs(record):
        rows += [[name, f"torch: {names[i]}", *counts] for i, counts in enumerate(row["confusion"])]
    return table(["model", "", *names], rows)


def conclusion(record):
    """The rule, what it says of each model, and what follows."""
    found = record["conclusion"]
    rows = [
        [
            c["model"],
            f"{c['agreement_low']:.4f}",
            "yes" if c["agreement_low"] > found["agreement"] else "no",
            f"{c['latency_p50_ms']:.2f}",
        ]
        for c in found["candidates"]
    ]
    shown = table(["model", "agreement, lower bound", "may be deployed", "p50 ms, one text"], rows)
    cpu = any("CPU" in c["engine"] for c in found["candidates"])
    note = " Speeds are ONNX Runtime's on a CPU and say nothing about TensorRT." if cpu else ""
    return f"Rule: {found['rule']}.\n\n{shown}\n\n**Conclusion: {found['text']}.**{note}"


# --- picture -------------------------------------------------------------------------


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
    figure.suptitle(f"{title(model)}: verdicts on {record['data']['count']} texts", fontsize=10)
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
