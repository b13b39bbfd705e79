"""Sections on which precision of a classifier may be deployed: results/<slug>/<machine>/verdicts.json."""

from core.tables import MODELS, PRECISIONS
from reporting.markdown import DETAILS, NOT_MEASURED, caption, interval, listing, relative, table

SAME = ("torch", "ONNX", "TRT_FP32")  # what the others are held against, and its file under another name


def named(key, engine):
    """A model's key, and a word where a CPU executed it that has no kernels of its precision."""
    without = key in MODELS and not PRECISIONS[MODELS[key].precision].on_cpu
    # a record may name the engine alone: "ONNX Runtime, CPU, in process"
    return f"{key} (emulated)" if "emulated" in engine or ("CPU" in engine and without) else key


def deployable(record):
    """(models that pass the rule, models that do not)."""
    found, names = record["conclusion"], ([], [])
    for c in found["candidates"]:
        names[c["agreement_low"] <= found["agreement"]].append(named(c["model"], c["engine"]))
    return names


def deploy(models):
    """What each precision of each model keeps, and the conclusion on every classifier."""
    rows = [row for model in models for row in (agreements(model), entities(model), similarities(model)) if row]
    if not rows:
        return [f"Verdicts of a classifier: {NOT_MEASURED}."]
    parts = [table(rows)]
    studied = [m for m in models if m["verdicts"]]
    parts += [f"**{m['title']}**. The rule names {m['verdicts']['conclusion']['text']}. {facts(m)}" for m in studied]
    pictures = [f"![Logits of each model against those of torch]({relative(m, 'verdicts.png')})" for m in studied]
    return parts + pictures[:1]


def agreements(model):
    """A classifier's row: agreement with torch of each graph; None without a study."""
    record = model["verdicts"]
    return record and {
        "model": model["title"],
        "what is kept": f"agreement with torch, {record['data']['count']} texts",
        **{named(k, row["engine"]): interval(row["agreement"]) for k, row in record["models"].items() if k not in SAME},
    }


def entities(model):
    """The row of a service that finds entities: F1 against those of FP32."""
    record = model["entities"]
    return record and {
        "model": model["title"],
        "what is kept": f"F1 against FP32's entities, {record['texts']['count']} texts",
        **{key: f"{row['f1']:.4f}" for key, row in record["plans"].items() if key not in SAME},
    }


def similarities(model):
    """An embedder's row: Spearman of sentence pairs, less the reference's."""
    record = model["sts"]
    if not (record and record["pairs"]):
        return None
    base = record["plans"]["ONNX"]["spearman"]
    return {
        "model": model["title"],
        "what is kept": f"Spearman less the reference's, {record['pairs']['count']} pairs",
        **{key: f"{row['spearman'] - base:+.4f}" for key, row in record["plans"].items() if key not in SAME},
    }


def details(model):
    """The study of one classifier in full."""
    note = "The threshold is chosen on the texts that it is then tried on: expect less on new ones."
    record = model["verdicts"]
    parts = [
        f"**{model['title']}**. {origin(model)} {rule(record)}",
        agreement_table(record),
        conclusion(record),
        quality_table(record),
    ]
    return parts + ([note] if record["threshold"] is not None else [])


def facts(model):
    """What calibrated its INT8 graphs, and where all of the study stands."""
    calibration = model["verdicts"].get("calibration")
    by = f"INT8 was calibrated with {calibration['count']} texts of {calibration['file']}. " if calibration else ""
    return f"{by}{caption(model['verdicts'])}. [All its tables]({relative(model, DETAILS)})."


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
        f"The rule looks for {found['rule']}. These pass: {listing(passed)}. These do not: {listing(failed)}.\n\n"
        f"**Conclusion: {found['text']}.**{note}"
    )
