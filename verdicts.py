#!/usr/bin/env python3
"""Show whether each precision's verdicts still agree with the original model's, and which may be deployed.

Reads:  --model, the original checkpoint; --repository, its graphs; --data, labelled texts;
        with --url the graphs are asked through the running server, else executed in process.
Writes: results/<model>/<machine>/verdicts.json and verdicts.csv, the logits of every text.
Run:    ./verdicts.py --model build/reviews-checkpoint --repository build/reviews
Prints: a table per model, the verdicts that flipped with their texts, and the conclusion.

./verdicts.py package --repository build/reviews then packs what the conclusion names.

Two classes: the positive class's logit is held against a threshold, chosen on the original
model for --precision with the best recall, and the same for every other model; the packed
service's LABEL follows it. More classes: the largest logit is the verdict, or --positive LABEL
is held against the rest, which the service's LABEL cannot follow.
"""

import argparse
from pathlib import Path

from core.arguments import make_parser
from core.files import RESULTS
from core.labelled import REVIEWS, add_column_arguments


def parse_args():
    parser = make_parser(__doc__)
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
    pack.add_argument("--results", type=Path, default=argparse.SUPPRESS)  # before the command or behind it
    pack.add_argument("--name", help="of the service (default: as in the repository)")
    pack.add_argument("--max-batch-size", type=int, help="texts in one request (default: as in the repository)")
    pack.add_argument("--output", type=Path, help="default: build/<name>-<precision>.tar.gz")
    args = parser.parse_args()
    if args.command == "package":
        if args.max_batch_size is not None and args.max_batch_size < 1:
            parser.error("--max-batch-size: expected at least 1")
        return args
    if not args.model or not args.repository:
        parser.error("--model, --repository: expected both, the original checkpoint and its graphs")
    if not (0 < args.precision <= 1 and 0 < args.agreement < 1):
        parser.error("--precision, --agreement: expected shares between 0 and 1")
    if min(args.batch_size, args.resamples, 1 if args.max_texts is None else args.max_texts) < 1 or args.seed < 0:
        parser.error("--batch-size, --resamples, --max-texts: expected at least 1; --seed: 0 or more")
    return args


def main():
    args = parse_args()
    # torch, scipy, onnx and what imports them take seconds: not before the arguments are known to be good
    from core.repository import read_card
    from serving.check import check_repository

    card = read_card(args.repository)
    if card["task"] != "classification":
        raise SystemExit(
            f"{args.repository}: expected the repository of a classifier, found one for {card['task']}; "
            "name one that torch2onnx.py --task classification wrote"
        )
    check_repository(args.repository)
    if args.command == "package":
        from verdict.package import package

        package(args, card)
    else:
        from verdict.study import study

        study(args, card)


if __name__ == "__main__":
    main()
