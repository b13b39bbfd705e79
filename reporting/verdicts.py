"""Sections on which precision of a classifier may be deployed: results/<slug>/<machine>/verdicts.json."""

from reporting.markdown import NOT_MEASURED, caption, listing, relative, table


def interval(value):
    """0.9123 [0.8990, 0.9255]"""
    return "undefined" if value is None else f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


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
        parts += [
            f"**{model['title']}**. {origin(model)} {rule(record)}",
            agreement_table(record),
            conclusion(record),
            f"![Logits of each model against those of torch]({relative(model, 'verdicts.png')})",
        ]
    return parts or [f"Verdicts of a classifier: {NOT_MEASURED}."]


def details(model):
    """The same, and how good the verdicts are."""
    note = "The threshold is chosen on the texts that it is then tried on: expect less on new ones."
    record = model["verdicts"]
    return [*deploy([model])[:-1], quality_table(record), *([note] if record["threshold"] is not None else [])]


def origin(model):
    """Where the classifier comes from, what it was asked, and what calibrated its INT8 graphs."""
    record, training = model["verdicts"], model["training"]
    calibration, server = record.get("calibration"), record["server"]
    sentences = [f"{caption(record)}."]
    if training:
        sentences.append(
            f"It was trained on {training['data']} ({training['texts']} texts) in {training['seconds']:.0f} s, to a dev accuracy "
            f"of {training['accuracy']:.4f} on {training['eval_texts']} texts."
        )
    if calibration:
        sentences.append(f"Its INT8 graphs were calibrated with {calibration['count']} texts of {calibration['file']}.")
    sentences.append(
        f"The study asked every graph, {'through Triton ' + server['version'] if server else 'in process'}, for the logits of "
        f"{record['data']['count']} texts of {record['data']['file']}."
    )
    return " ".join(sentences)


def rule(record):
    """What a verdict is, in the study and in the service."""
    text, served = "A verdict is the class with the largest logit.", record.get("served_verdict")
    if record["threshold"] is not None:
        text = (
            f"A verdict is whether the logit of `{record['positive']}` reaches {record['threshold']:.4f}, the threshold that gives "
            f"the original model the best recall at a precision of at least {record['precision']:g}."
        )
    if served:
        same = (record["threshold"] is None) == (served == "largest logit")
        text += f" The service answers by {'the same rule' if same else f'another rule, the {served}'}."
    return text


def agreement_table(record):
    """How close each model's verdicts and logits are to torch's."""
    return table(
        {
            "model": name,
            "executed by": row["engine"],
            "agreement with torch": interval(row["agreement"]),
            "flips": row["flips"],
            "McNemar p": f"{row['mcnemar']['p']:.2g}",
            "largest logit deviation": f"{row['deviation']['max_abs']:.2g}",
            "p50 ms, one text": f"{row['latency_p50_ms']:.1f}",
        }
        for name, row in record["models"].items()
        if name != "torch"
    )


def quality_table(record):
    """How good each model's verdicts are."""
    return table(
        {"model": name} | {key: interval(row["quality"][key]) for key in ("accuracy", "precision", "recall")}
        for name, row in record["models"].items()
    )


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
