#!/usr/bin/env python3
"""Show whether each precision's verdicts still agree with the original model's, and which may be deployed.

Reads:  --model, the original checkpoint; --repository, its graphs; --data, labelled texts;
        with --url the graphs are asked through the running server, else executed in process.
Writes: results/<model>/verdicts.json and verdicts.csv, the logits of every text.
Run:    ./verdicts.py --model build/reviews-checkpoint --repository build/reviews
Prints: a table per model, the verdicts that flipped with their texts, and the conclusion.

./verdicts.py package --repository build/reviews then packs what the conclusion names.

Two classes: the positive class's logit is held against a threshold, chosen on the original
model for --precision with the best recall, and the same for every other model. More classes:
the largest logit is the verdict, or --positive LABEL against the rest.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from core.files import RESULTS, replace_when_done, sha256, spread, write_json
from core.labelled import REVIEWS, add_column_arguments, class_indices, read_labelled
from core.record import environment_record
from core.tables import EMBEDDERS, REFERENCE
from serving.classifier_repository import check_classifier_repository, read_card
from verdict.logits import (
    SAME_MODEL_ERROR,
    InProcess,
    Served,
    check_served_models,
    comparable,
    measure_latency,
    model_logits,
    models_to_judge,
    torch_logits,
)
from verdict.package import package
from verdict.statistics import (
    CONFIDENCE,
    choose_threshold,
    confusion,
    curve,
    deviation,
    exact_interval,
    mcnemar,
    quality,
    ratio_interval,
    resample,
    restored,
    texts_for,
)

ALIKE = 1.05  # latencies so near are told apart by noise, not by the models
PRINTED_FLIPS = 10  # per model; all are in verdicts.json


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
        return choose_threshold(logits[:, positive], classes == 1, args.precision)
    except ValueError as error:
        raise SystemExit(f"{args.data}: {error}; lower --precision, or give more texts") from None


def judge(logits, positive, threshold):
    """Verdicts, int [texts]."""
    return logits.argmax(axis=1) if positive is None else (logits[:, positive] >= threshold).astype(int)


# --- the study -----------------------------------------------------------------------


def compare(name, logits, reference, classes, positive, threshold, weights):
    """Everything about one model's verdicts beside the original's."""
    verdicts, expected = (judge(values, positive, threshold) for values in (logits, reference))
    count = 2 if positive is not None else logits.shape[1]
    agree = verdicts == expected
    over = [1] if positive is not None else range(count)
    row = {"quality": quality(verdicts, classes, over, weights), "flips": int((~agree).sum())}
    if positive is not None:
        row["curve"] = curve(logits[:, positive], classes == 1)
    if name == "torch":
        return row
    scores, original = (v if positive is None else v[:, positive] for v in (logits, reference))
    row["agreement"] = exact_interval(agree.sum(), len(agree))
    row["agreement_bootstrap"] = ratio_interval([(agree, np.ones_like(agree))], weights)
    row["deviation"] = deviation(original, scores)
    row["confusion"] = confusion(expected, verdicts, count)
    row["mcnemar"] = mcnemar(expected == classes, verdicts == classes)
    row["closest_threshold"] = restored(scores, expected, threshold) if positive is not None and row["flips"] else None
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


def without_data(flips):
    """The same list without what comes from the file of labelled texts."""
    return [{key: value for key, value in flip.items() if key not in ("text", "label")} for flip in flips]


def conclude(rows, latency, engines, bound, count):
    """The stated rule applied: the fastest model whose agreement's lower bound is above `bound`."""
    candidates = [
        {"model": s, "agreement_low": rows[s]["agreement"]["low"], "latency_p50_ms": latency[s], "engine": engines[s]}
        for s in latency
    ]
    passing = [c for c in candidates if c["agreement_low"] > bound]
    fastest = min((c["latency_p50_ms"] for c in passing), default=0)
    alike = [c for c in passing if c["latency_p50_ms"] <= fastest * ALIKE]
    winner = min(alike, key=lambda c: rows[c["model"]]["deviation"]["max_abs"], default=None)
    rule = (
        f"the fastest model whose agreement with torch has a lower bound above {bound:g} (exact {CONFIDENCE:.0%} interval); "
        f"of those as fast within {ALIKE - 1:.0%} the one whose logits deviate least"
    )
    if winner:
        text = (
            f"{winner['model']}: agreement at least {winner['agreement_low']:.4f}, p50 {winner['latency_p50_ms']:.2f} ms a text "
            f"({winner['engine']}), {len(passing)} of {len(candidates)} models pass"
        )
    else:
        text = f"none: no model passes on {count} texts"
    if count < texts_for(bound):
        text += f"; even full agreement needs at least {texts_for(bound)} texts to pass"
    return {
        "rule": rule,
        "agreement": bound,
        "winner": winner and winner["model"],
        "text": text,
        "candidates": candidates,
    }


def collect(args, card, texts, suffixes):
    """(logits of torch, logits per suffix, p50 per suffix, engines, server record)."""
    batch_size = args.batch_size
    if args.url:
        source = Served(args.url, card, suffixes)
        own = InProcess(args.repository, card, comparable(source.engines))
        check_served_models(source, own, args.repository, texts)
        del own  # its graphs need as much memory as the server's
        batch_size = min(batch_size, source.max_batch_size)
    else:
        source = InProcess(args.repository, card, suffixes)
    reference = torch_logits(args, card, texts)
    logits = model_logits(source, suffixes, texts, batch_size)
    error = float(np.abs(logits[REFERENCE] - reference).max())
    if not error <= SAME_MODEL_ERROR:
        raise SystemExit(
            f"--model: expected the checkpoint behind {args.repository}, found another (logits differ by {error:.3g}); "
            "name the one that was exported"
        )
    for suffix, values in logits.items():
        if not np.isfinite(values).all():
            raise SystemExit(
                f"{EMBEDDERS[suffix]}: expected finite logits, found NaN or infinity; run quantize.py again"
            )
    return reference, logits, measure_latency(source, suffixes, texts), source.engines, source.record


def plans_behind(repository, engines):
    """{suffix: SHA-256 of the plan} of the models that TensorRT executes."""
    plans = {s: repository / EMBEDDERS[s] / "1" / "model.plan" for s, e in engines.items() if e.startswith("TensorRT")}
    return {suffix: sha256(plan) for suffix, plan in plans.items() if plan.is_file()}


def write_logits(path, columns, labels):
    """One CSV line per text: every model's logits. Neither text nor label."""
    with replace_when_done(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text_number", *(f"{name} {label}" for name in columns for label in labels)])
        for number, logits in enumerate(zip(*columns.values(), strict=True), 1):
            writer.writerow([number, *(f"{value:.7g}" for row in logits for value in row)])


# --- what is shown -------------------------------------------------------------------


def show(interval):
    """0.9123 [0.8990, 0.9255]"""
    return (
        "undefined" if interval is None else f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
    )


def print_confusion(record):
    """Each model's verdicts against torch's, a line per verdict of torch."""
    labels = record["model"]["labels"]
    names = labels if record["positive"] is None else [f"not {record['positive']}", record["positive"]]
    for model, row in record["models"].items():
        if model == "torch":
            continue
        for name, counts in zip(names, row["confusion"], strict=True):
            found = ", ".join(f"{count} {other}" for other, count in zip(names, counts, strict=True))
            print(f"confusion {model}: torch {name}: {found}")


def print_study(record, flips):
    """Tables and flips on stdout."""
    if record["threshold"] is None:
        print("verdict: the largest logit")
    else:
        print(
            f"verdict: logit of {record['positive']} at or above {record['threshold']:.4f} (precision {record['precision']:g} on torch)"
        )
    print(f"{'model':10}{'accuracy':>26}{'precision':>26}{'recall':>26}  (bootstrap {CONFIDENCE:.0%})")
    for name, row in record["models"].items():
        print(f"{name:10}" + "".join(f"{show(row['quality'][key]):>26}" for key in ("accuracy", "precision", "recall")))
    print(
        f"{'model':10}{'agreement (exact)':>26}{'flips':>7}{'restored to':>13}{'at':>10}{'McNemar p':>11}{'mean':>10}{'min':>10}{'max abs':>10}{'p50 ms':>8}  executed by"
    )
    for name, row in record["models"].items():
        if name != "torch":
            d, closest = row["deviation"], row["closest_threshold"]
            after = "" if closest is None else f"{closest['flips_after']} ({closest['flips_cross_validated']})"
            at = "" if closest is None else f"{closest['threshold']:.4f}"
            print(
                f"{name:10}{show(row['agreement']):>26}{row['flips']:7}{after:>13}{at:>10}{row['mcnemar']['p']:11.3g}"
                f"{d['mean']:10.4f}{d['min']:10.4f}{d['max_abs']:10.4f}{row['latency_p50_ms']:8.2f}  {row['engine']}"
            )
    print_confusion(record)
    for name, listed in flips.items():
        for flip in listed[:PRINTED_FLIPS]:
            print(
                f"flip {name}: torch {flip['torch']}, {name} {flip['this']}, label {flip['label']}: {flip['text'][:100]}"
            )
        if len(listed) > PRINTED_FLIPS:
            print(f"flip {name}: {len(listed) - PRINTED_FLIPS} more in verdicts.json")
    print(f"rule: {record['conclusion']['rule']}")
    print(f"conclusion: {record['conclusion']['text']}")


def study(args):
    """The whole study, from data to conclusion."""
    check_classifier_repository(args.repository)
    card = read_card(args.repository)
    positive = find_positive(args, card)
    texts, classes = read_data(args, card, positive)
    suffixes = models_to_judge(args.repository)
    reference, logits, latency, engines, server = collect(args, card, texts, suffixes)
    threshold = find_threshold(args, reference, classes, positive)
    weights = resample(len(texts), args.resamples, args.seed)
    rows, flips = {}, {}
    for name, values in {"torch": reference, **logits}.items():
        rows[name] = compare(name, values, reference, classes, positive, threshold, weights)
        if name != "torch":
            flips[name] = list_flips(values, reference, texts, classes, positive, threshold)
            listed = without_data(flips[name]) if args.no_texts else flips[name]
            rows[name] |= {"latency_p50_ms": latency[name], "engine": engines[name], "flipped": listed}
    folder = args.results / card["slug"]
    write_logits(folder / "verdicts.csv", {"torch": reference, **logits}, card["labels"])
    record = {
        "model": card,
        "environment": environment_record(),
        "server": server,
        "data": {"file": args.data.name, "sha256": sha256(args.data), "count": len(texts)},
        "graph_sha256": {s: sha256(args.repository / EMBEDDERS[s] / "1" / "model.onnx") for s in suffixes},
        "plan_sha256": plans_behind(args.repository, engines),
        "logits_sha256": sha256(folder / "verdicts.csv"),
        "positive": None if positive is None else card["labels"][positive],
        "precision": None if positive is None else args.precision,
        "threshold": threshold,
        "bootstrap": {"resamples": args.resamples, "seed": args.seed, "confidence": CONFIDENCE},
        "models": rows,
        "conclusion": conclude(rows, latency, engines, args.agreement, len(texts)),
    }
    write_json(folder / "verdicts.json", record)
    print_study(record, flips)
    print(folder / "verdicts.json")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the original checkpoint, as torch2onnx.py takes it")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--tokenizer", help="where the tokenizer is, if not with the model")
    parser.add_argument("--repository", type=Path, help="where torch2onnx.py and quantize.py left the graphs")
    parser.add_argument("--data", type=Path, default=REVIEWS, help="labelled texts (default: assets/reviews.tsv)")
    add_column_arguments(parser)
    parser.add_argument("--url", help="HOST:PORT of the server's HTTP (default: the graphs are executed in process)")
    parser.add_argument(
        "--precision", type=float, default=0.9, help="that the threshold has on torch (default: %(default)s)"
    )
    parser.add_argument(
        "--agreement", type=float, default=0.995, help="that a model must exceed (default: %(default)s)"
    )
    parser.add_argument("--positive", help="the class that the threshold is for (default: the second of two)")
    parser.add_argument("--max-texts", type=int, help="use this many, evenly spread")
    parser.add_argument(
        "--no-texts",
        action="store_true",
        help="neither texts nor their labels in the results, only their numbers: for data that may not be passed on",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", metavar="package")
    pack = commands.add_parser(
        "package", help="pack the repository of the conclusion's model as .tar.gz with a manifest"
    )
    pack.add_argument("--repository", type=Path, required=True)
    pack.add_argument("--results", type=Path, default=RESULTS)
    pack.add_argument("--name", help="of the service (default: as in the repository)")
    pack.add_argument("--max-batch-size", type=int, help="texts in one request (default: as in the repository)")
    pack.add_argument("--output", type=Path, help="default: build/<name>-<precision>.tar.gz")
    args = parser.parse_args()
    if args.command == "package":
        return args
    if not args.model or not args.repository:
        parser.error("--model, --repository: expected both, the original checkpoint and its graphs")
    if not (0 < args.precision <= 1 and 0 < args.agreement < 1):
        parser.error("--precision, --agreement: expected shares between 0 and 1")
    if min(args.batch_size, args.resamples, args.max_texts or 1) < 1:
        parser.error("--batch-size, --resamples, --max-texts: expected at least 1")
    args.random_weights = args.packaged_if_offline = False
    return args


def main():
    args = parse_args()
    if args.command == "package":
        package(args)
    else:
        study(args)


if __name__ == "__main__":
    main()
