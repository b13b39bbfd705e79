"""Sections on which precision of a classifier may be deployed: results/<slug>/<machine>/verdicts.json."""

from reporting.markdown import NOT_MEASURED, caption, listing, relative, table


def interval(value):
    """0.9123 [0.8990, 0.9255]"""
    return "undefined" if value is None else f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def graphs(record):
    """(name, row) of every model but torch."""
    return [(name, row) for name, row in record["models"].items() if name != "torch"]


def deployable(record):
    """(models that pass the rule, models that do not)."""
    found = record["conclusion"]
    passed = [c["model"] for c in found["candidates"] if c["agreement_low"] > found["agreement"]]
    return passed, [c["model"] for c in found["candidates"] if c["model"] not in passed]


def deploy(models):
    """Agreement, quality and conclusion of every classifier that was studied."""
    parts = []
    for model in (m for m in models if m["verdicts"]):
        record = model["verdicts"]
        picture = f"![Logits against torch, precision and recall with the threshold]({relative(model, 'verdicts.png')})"
        parts += [f"**{model['title']}**. {origin(model)} {rule(record)}", agreement_table(record), conclusion(record), picture]
    return parts or [f"Verdicts of a classifier: {NOT_MEASURED}."]


def origin(model):
    """Where the classifier comes from, what it was asked, and what calibrated its INT8 graphs."""
    record, training, calibration = model["verdicts"], model["training"], model["verdicts"].get("calibration")
    text = f"{caption(record)}. "
    if training:
        text += (
            f"It was trained on {training['data']} ({training['texts']} texts) in {training['seconds']:.0f} s, to a dev accuracy "
            f"of {training['accuracy']:.4f} on {training['eval_texts']} texts. "
        )
    if calibration:
        text += f"Its INT8 graphs were calibrated with {calibration['count']} texts of {calibration['file']}. "
    server = record["server"]
    where = f"through Triton {server['version']}" if server else "in process"
    return f"{text}The study asked every graph, {where}, for the logits of {record['data']['count']} texts of {record['data']['file']}."


def rule(record):
    """What a verdict is, in the study and in the service."""
    if record["threshold"] is None:
        studied = "the class with the largest logit"
    else:
        studied = (
            f"whether the logit of `{record['positive']}` reaches {record['threshold']:.4f}, the threshold that gives the "
            f"original model the best recall at a precision of at least {record['precision']:g}"
        )
    served = record.get("served_verdict")
    same = (record["threshold"] is None) == (served == "largest logit")
    if served is None:
        return f"A verdict is {studied}."
    return f"A verdict is {studied}. The service {'answers by the same rule' if same else f'answers by another rule, the {served}'}."


def agreement_table(record):
    """How close each model's verdicts and logits are to torch's, and how good they are."""
    keys = ("accuracy", "precision", "recall")
    rows = []
    for name, row in record["models"].items():
        quality = [interval(row["quality"][key]) for key in keys]
        if name == "torch":
            rows.append([name, "torch", "reference", "", "", *quality, ""])
            continue
        flips = [row["flips"], f"{row['deviation']['max_abs']:.2g}"]
        rows.append([name, row["engine"], interval(row["agreement"]), *flips, *quality, f"{row['latency_p50_ms']:.1f}"])
    header = ["model", "executed by", "agreement with torch", "flips", "largest logit deviation", *keys, "p50 ms, one text"]
    return table(header, rows)


def conclusion(record):
    """The rule, what passes it, and what follows."""
    found, (passed, failed) = record["conclusion"], deployable(record)
    note = ""
    if any("CPU" in c["engine"] for c in found["candidates"]):
        note = " The latencies are those of ONNX Runtime on a CPU and say nothing about TensorRT."
    return (
        f"The rule names {found['rule']}. These pass: {listing(passed)}. These do not: {listing(failed)}.\n\n"
        f"**Conclusion: {found['text']}.**{note}"
    )


def details(model):
    """Each model's verdicts against torch's, McNemar's test, and what another threshold would restore."""
    record = model["verdicts"]
    if not record:
        return []
    labels = record["model"]["labels"]
    names = labels if record["positive"] is None else [f"not {record['positive']}", record["positive"]]
    confusion = [
        [name, f"torch: {label}", *counts]
        for name, row in graphs(record)
        for label, counts in zip(names, row["confusion"], strict=True)
    ]
    tests = []
    for name, row in graphs(record):
        closest, d = row["closest_threshold"], row["deviation"]
        after = "" if closest is None else f"{closest['flips_after']} ({closest['flips_cross_validated']})"
        at = "" if closest is None else f"{closest['threshold']:.4f}"
        tests.append([name, f"{row['mcnemar']['p']:.3g}", row["flips"], after, at, *(f"{d[k]:.2g}" for k in ("mean", "min", "max"))])
    header = ["model", "McNemar p", "flips", "restored", "at threshold", "logit deviation, mean", "min", "max"]
    lead = (
        "McNemar's exact test asks who is right where torch and the model differ. Restored is the number of flips that are left "
        "with the threshold closest to torch's verdicts, and in brackets the number on texts that it was not chosen on."
    )
    return [table(["model", "", *names], confusion), lead, table(header, tests)]
