"""Sections on which precision of a classifier may be deployed: results/<slug>/<machine>/verdicts.json."""

from reporting.markdown import NOT_MEASURED, caption, columns, listing, relative


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
        picture = f"![Logits against torch, precision and recall with the threshold]({relative(model, 'verdicts.png')})"
        parts += [
            f"**{model['title']}**. {origin(model)} {rule(record)}",
            agreement_table(record),
            conclusion(record),
            picture,
        ]
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
    other = [(name, row) for name, row in record["models"].items() if name != "torch"]
    close = {
        "model": lambda r: r[0],
        "executed by": lambda r: r[1]["engine"],
        "agreement with torch": lambda r: interval(r[1]["agreement"]),
        "flips": lambda r: r[1]["flips"],
        "McNemar p": lambda r: f"{r[1]['mcnemar']['p']:.2g}",
        "largest logit deviation": lambda r: f"{r[1]['deviation']['max_abs']:.2g}",
        "p50 ms, one text": lambda r: f"{r[1]['latency_p50_ms']:.1f}",
    }
    good = {"model": lambda r: r[0]}
    for key in ("accuracy", "precision", "recall"):
        good[key] = lambda r, key=key: interval(r[1]["quality"][key])
    return f"{columns(other, close)}\n\n{columns(record['models'].items(), good)}"


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
