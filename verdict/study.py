"""The study of a classifier's verdicts, from labelled texts to the record and its conclusion."""

import csv

import numpy as np

from core.files import read_json, replace_when_done, sha256, spread, write_json
from core.labelled import class_indices, read_labelled
from core.record import environment_record, results_folder
from core.repository import graph_path, graph_properties, read_graph
from core.tables import REFERENCE, TORCH
from serving.plans import plan_path
from verdict import statistics
from verdict.logits import collect, measure_latency, models_to_judge
from verdict.show import print_study

ALIKE = 1.05  # latencies so near are told apart by noise, not by the models


# --- what a verdict is ---------------------------------------------------------------


def find_positive(args, card):
    """Index of the class that a threshold is for, or None where the largest logit decides."""
    labels = card["labels"]
    if args.positive is not None:
        if args.positive not in labels:
            raise SystemExit(f"--positive: expected one of {', '.join(labels)}, found {args.positive}")
        return labels.index(args.positive)
    if card["problem_type"] == "multi_label_classification":
        raise SystemExit(
            f"--positive: expected one of {', '.join(labels)} for a model with several labels at once, found none"
        )
    return 1 if len(labels) == 2 else None


def read_data(args, card, positive):
    """(texts, classes as an array): indices of labels, or 0 and 1 where one class is positive."""
    texts, labels = read_labelled(args.data, args.text_column, args.label_column)
    classes = class_indices(args.data, labels, card["labels"])
    keep = spread(list(range(len(texts))), args.max_texts)
    texts, classes = [texts[i] for i in keep], np.array([classes[i] for i in keep])
    if positive is not None:
        classes = (classes == positive).astype(int)
    if len(set(classes.tolist())) < 2:
        raise SystemExit(f"{args.data}: expected texts of at least two classes, found one; give more texts")
    return texts, classes


def find_threshold(args, logits, classes, positive):
    """The threshold on the original model's positive logit; None where the largest logit decides."""
    if positive is None:
        return None
    try:
        return statistics.choose_threshold(logits[:, positive], classes == 1, args.precision)
    except ValueError as error:
        raise SystemExit(f"{args.data}: {error}; lower --precision, or give more texts") from None


def served_verdict(card, positive):
    """What a packaged service's LABEL follows: "threshold", or "largest logit".

    LABEL names one class, so a threshold can decide it only where there are two and one of them is right.
    """
    one_of_two = len(card["labels"]) == 2 and card["problem_type"] != "multi_label_classification"
    return "threshold" if positive is not None and one_of_two else "largest logit"


def judge(logits, positive, threshold):
    """Verdicts, int [texts]."""
    return logits.argmax(axis=1) if positive is None else (logits[:, positive] >= threshold).astype(int)


# --- the models ----------------------------------------------------------------------


def compare(name, logits, reference, classes, positive, threshold, weights):
    """Everything about one model's verdicts beside the original's."""
    verdicts, expected = (judge(values, positive, threshold) for values in (logits, reference))
    count = 2 if positive is not None else logits.shape[1]
    agree = verdicts == expected
    over = [1] if positive is not None else range(count)
    row = {"quality": statistics.quality(verdicts, classes, over, weights), "flips": int((~agree).sum())}
    if name == "torch":
        return row
    scores, original = (v if positive is None else v[:, positive] for v in (logits, reference))
    row["agreement"] = statistics.exact_interval(agree.sum(), len(agree))
    row["deviation"] = statistics.deviation(original, scores)
    row["confusion"] = statistics.confusion(expected, verdicts, count)
    row["mcnemar"] = statistics.mcnemar(expected == classes, verdicts == classes)
    row["closest_threshold"] = (
        statistics.restored(scores, expected, threshold) if positive is not None and row["flips"] else None
    )
    return row


def list_flips(logits, reference, texts, classes, positive, threshold):
    """The texts on which a model's verdict is another than the original's."""
    verdicts, expected = (judge(values, positive, threshold) for values in (logits, reference))
    flips = []
    for i in np.flatnonzero(verdicts != expected):
        flip = {"text_number": int(i) + 1, "torch": int(expected[i]), "this": int(verdicts[i])}
        flip |= {"torch_logits": reference[i].tolist(), "logits": logits[i].tolist()}
        flips.append(flip | {"label": int(classes[i]), "text": texts[i]})
    return flips


def conclude(rows, bound, count):
    """The stated rule applied: the fastest model whose agreement's lower bound is above `bound`."""
    candidates = [
        {"model": key, "agreement_low": row["agreement"]["low"]} | {k: row[k] for k in ("latency_p50_ms", "engine")}
        for key, row in rows.items()
        if key != "torch"
    ]
    passing = [c for c in candidates if c["agreement_low"] > bound]
    fastest = min((c["latency_p50_ms"] for c in passing), default=0)
    alike = [c for c in passing if c["latency_p50_ms"] <= fastest * ALIKE]
    winner = min(alike, key=lambda c: rows[c["model"]]["deviation"]["max_abs"], default=None)
    rule = (
        f"the fastest model whose agreement with torch has a lower bound above {bound:g} (exact {statistics.CONFIDENCE:.0%} interval); "
        f"of those as fast within {ALIKE - 1:.0%} the one whose logits deviate least"
    )
    if winner:
        text = (
            f"{winner['model']}: agreement at least {winner['agreement_low']:.4f}, p50 {winner['latency_p50_ms']:.2f} ms a text "
            f"({winner['engine']}), {len(passing)} of {len(candidates)} models pass"
        )
    else:
        text = f"none: no model passes on {count} texts"
    if count < statistics.texts_for(bound):
        text += f"; even full agreement needs at least {statistics.texts_for(bound)} texts to pass"
    return {
        "rule": rule,
        "agreement": bound,
        "winner": winner and winner["model"],
        "text": text,
        "candidates": candidates,
    }


# --- the record ----------------------------------------------------------------------


def plans_behind(repository, engines):
    """{key: SHA-256 of the plan} of the models that TensorRT executes."""
    plans = {key: plan_path(repository, key) for key, engine in engines.items() if engine.startswith("TensorRT")}
    return {key: sha256(plan) for key, plan in plans.items() if plan.is_file()}


def read_calibration(folder, repository, keys):
    """{"file", "count"} of the texts that calibrated the graphs; None where no record of just these graphs is there."""
    path = folder / "sensitivity.json"
    facts = read_json(path, "run quantize.py again")["texts"] if path.is_file() else {}
    made = [graph_properties(read_graph(graph_path(repository, key))) for key in keys if key != REFERENCE]
    if facts.get("sha256") not in [p.get("calibration_sha256", "unknown") for p in made]:
        return None
    return {"file": facts["file"], "count": facts["calibration"]}


def write_logits(path, columns, labels):
    """One CSV line per text: every model's logits. Neither text nor label."""
    with replace_when_done(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text_number", *(f"{name} {label}" for name in columns for label in labels)])
        for number, logits in enumerate(zip(*columns.values(), strict=True), 1):
            writer.writerow([number, *(f"{value:.7g}" for row in logits for value in row)])


def study(args, card):
    """The whole study; writes verdicts.json and verdicts.csv and prints what they say."""
    positive = find_positive(args, card)
    texts, classes = read_data(args, card, positive)
    keys = models_to_judge(args.repository, card)
    source, logits = collect(args, card, texts, keys)
    latency = measure_latency(source, source.engines, texts)
    reference = logits["torch"]
    threshold = find_threshold(args, reference, classes, positive)
    weights = statistics.resample(len(texts), args.resamples, args.seed)
    rows, flips, private = {}, {}, ("text", "label") if args.no_texts else ()
    for name, values in logits.items():
        rows[name] = compare(name, values, reference, classes, positive, threshold, weights)
        if name != "torch":
            flips[name] = list_flips(values, reference, texts, classes, positive, threshold)
            listed = [{key: value for key, value in flip.items() if key not in private} for flip in flips[name]]
            rows[name]["flipped"] = listed
        if (key := TORCH if name == "torch" else name) in source.engines:
            rows[name] |= {"latency_p50_ms": latency[key], "engine": source.engines[key]}
    folder = results_folder(args.results, card)
    write_logits(folder / "verdicts.csv", logits, card["labels"])
    record = {
        "model": card,
        "environment": environment_record(),
        "server": source.record,
        "data": {"file": args.data.name, "sha256": sha256(args.data), "count": len(texts)},
        "calibration": read_calibration(folder, args.repository, keys),
        "graph_sha256": {key: sha256(graph_path(args.repository, key)) for key in keys},
        "plan_sha256": plans_behind(args.repository, source.engines),
        "logits_sha256": sha256(folder / "verdicts.csv"),
        "positive": None if positive is None else card["labels"][positive],
        "precision": None if positive is None else args.precision,
        "threshold": threshold,
        "served_verdict": served_verdict(card, positive),
        "bootstrap": {"resamples": args.resamples, "seed": args.seed, "confidence": statistics.CONFIDENCE},
        "models": rows,
        "conclusion": conclude(rows, args.agreement, len(texts)),
    }
    write_json(folder / "verdicts.json", record)
    print_study(record, flips)
    print(folder / "verdicts.json")
