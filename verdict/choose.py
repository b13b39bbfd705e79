#!/usr/bin/env python3
"""Measure which engine and precision serve a service fastest on this CPU without changing its answers; write the choice.

Reads:  --repository: a service of an encoder task in one pass, with the graphs of quantize.py; --texts, one a line.
Writes: engine and precision into its record, for serve.sh; results/<model>/<machine>/choice.json.
Run:    python -m verdict.choose --repository build/reviews
Prints: a line for each candidate: texts/s alone and eight together, what its answers are worth, whether it holds.

A classifier's candidate holds if all its answers agree with those of FP32, or the lower end of the interval of
agreement is at least --agreement; any other one if it is within the gate of its task. The fastest under load that holds
is chosen, FP32 at the worst.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.arguments import make_parser
from core.engines import ENGINES, has_bf16, why_missing
from core.files import RESULTS, TEXTS, evaluation_texts, write_json
from core.metrics import deviations
from core.record import environment_record, results_folder
from core.repository import EXPORT, present, read_card, tokenizer_path
from core.runner import Runner
from core.tables import EMBEDDERS, MODELS, PRECISIONS, REFERENCE
from core.tokens import load_tokenizer
from precision.int8_search import meets
from serving.one_pass import graph_settings, has_one_pass, opener, why_not
from serving.repository import write_repository
from tasks.examples import examples
from tasks.table import TASKS
from verdict.statistics import exact_interval

ROUNDS, TOGETHER = 5, 8
NOISE = 1.05  # what is as fast within it is chosen for its quality


def candidates(repository):
    """[(engine, precision)] that this machine executes and the repository has graphs of; FP32 first."""
    installed = [engine for engine in ENGINES if not why_missing(engine)]
    for engine in ENGINES.keys() - set(installed):
        print(f"{engine}: not measured: {why_missing(engine)}", file=sys.stderr)
    precisions = ["FP32", *(MODELS[k].precision for k in present(repository) if k in EMBEDDERS and k != REFERENCE)]
    precisions += ["BF16"] if has_bf16() else []
    if not has_bf16():
        print("BF16: not measured: this CPU has no instructions for it", file=sys.stderr)
    pairs = [(engine, precision) for precision in dict.fromkeys(precisions) for engine in installed]
    return [(engine, precision) for engine, precision in pairs if not why_not(engine, precision)]


def open_runner(repository, card, engine, precision, padding):
    """The Runner that a service would have."""
    settings = graph_settings(repository, card, precision, engine)
    task = TASKS[card["task"]]
    return Runner(settings | {"per_token": task.per_token}, padding, opener(settings, task.output))


def measure(runners, encodings):
    """{candidate: {"alone", "together": texts/s}}, medians of rounds in which the candidates take turns."""
    speeds = {candidate: {"alone": [], "together": []} for candidate in runners}
    for number in tqdm(range(ROUNDS + 1), desc="choose", unit="round", mininterval=1, file=sys.stderr):
        for candidate, run in runners.items():
            for name, size in (("alone", 1), ("together", TOGETHER)):
                texts = encodings[: max(1, len(encodings) // (4 if size == 1 else 1))]
                started = time.perf_counter()
                for start in range(0, len(texts), size):
                    run(texts[start : start + size])
                if number:  # the first round warms up
                    speeds[candidate][name].append(len(texts) / (time.perf_counter() - started))
    return {c: {name: statistics.median(values) for name, values in found.items()} for c, found in speeds.items()}


def quality(task, reference, found):
    """{"relative_l2_error", "mean_cosine"} and, of a classifier, "agreement" {"value", "low", "high"}.

    Raises ValueError where a value is NaN or infinite.
    """
    expected, values = (np.concatenate([np.atleast_2d(row) for row in rows]) for rows in (reference, found))
    row = deviations(expected[None], values[None], np.ones((1, len(expected))))
    kept = {key: row[key] for key in ("relative_l2_error", "mean_cosine")}
    if task.answers == "classification":
        same = expected.argmax(axis=1) == values.argmax(axis=1)
        kept["agreement"] = exact_interval(same.sum(), len(same))
    return kept


def holds(task, precision, row, agreement):
    """Whether a candidate's answers are good enough to serve."""
    if "agreement" in row:
        return row["agreement"]["low"] >= agreement or row["agreement"]["value"] == 1.0
    return meets(row, task.gate or PRECISIONS[precision].gate)


def choose(rows):
    """The row of the fastest under load that holds; of those as fast, the one that deviates least."""
    passing = [row for row in rows if row["holds"]]
    best = max(row["together_texts_per_s"] for row in passing)
    alike = [row for row in passing if row["together_texts_per_s"] * NOISE >= best]
    return min(alike, key=lambda row: row["relative_l2_error"])


def compare(args, card):
    """A row per candidate; one that answers with NaN or infinity has none."""
    task, tokenizer = TASKS[card["task"]], load_tokenizer(tokenizer_path(args.repository))
    padding = tokenizer.padding
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(examples(card, evaluation_texts(args.texts)))
    pairs = candidates(args.repository)
    runners = {pair: open_runner(args.repository, card, *pair, padding) for pair in pairs}
    speeds = measure(runners, encodings)
    reference, rows = runners[pairs[0]](encodings), []
    for (engine, precision), run in runners.items():
        row = {"engine": engine, "precision": precision}
        try:
            row |= quality(task, reference, run(encodings))
        except ValueError as error:
            if not rows:
                raise SystemExit(
                    f"{args.repository}: expected finite answers of FP32, found {error}; {EXPORT}"
                ) from None
            print(f"{engine}, {precision}: left out: {error}", file=sys.stderr)
            continue
        row |= {f"{name}_texts_per_s": value for name, value in speeds[engine, precision].items()}
        row["holds"] = bool(precision == "FP32" or holds(task, precision, row, args.agreement))
        rows.append(row)
        worth = f"agreement at least {row['agreement']['low']:.4f}" if "agreement" in row else ""
        print(
            f"{engine:12}{precision:6}{row['alone_texts_per_s']:8.1f} alone{row['together_texts_per_s']:8.1f} together  "
            f"relative L2 error {row['relative_l2_error']:.2g}  {worth}  {'holds' if row['holds'] else 'does not hold'}"
        )
    return rows


def share(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected above 0 and below 1, found {text}")
    return value


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="one a line (default: the half of assets/texts.txt that measures)")
    parser.add_argument("--agreement", type=share, default=0.99, help="of a classifier (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main():
    args = parse_args()
    card = read_card(args.repository)
    if card["task"] not in TASKS or not has_one_pass(card, None):
        raise SystemExit(
            f"{args.repository}: expected a service of an encoder task that is served in one pass (serving/one_pass.py), "
            f"found {card['task']} with {', '.join(card['outputs'])}, which reads no choice; name another"
        )
    rows = compare(args, card)
    chosen = choose(rows)
    record = {"model": card, "environment": environment_record(), "texts": (args.texts or TEXTS).name}
    record |= {
        "agreement": args.agreement,
        "rows": rows,
        "chosen": {key: chosen[key] for key in ("engine", "precision")},
    }
    path = results_folder(args.results, card) / "choice.json"
    write_json(path, record)
    write_repository(args.repository, cpu_engine=chosen["engine"], cpu_precision=chosen["precision"])
    print(f"chosen: {chosen['engine']}, {chosen['precision']}; {path}")


if __name__ == "__main__":
    main()
