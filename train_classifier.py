#!/usr/bin/env python3
"""Fine-tune a text encoder with a classification head on labelled texts.

Reads:  --data, a TSV or CSV of texts and labels; --eval, another one, or every fifth line of
        --data; the encoder: packaged MiniLM, a local folder or a model hub id.
Writes: --output, a Hugging Face checkpoint with id2label, tokenizer and training.json, which
        results/<name of that folder>/<machine>/ gets too.
Run:    ./train_classifier.py --data assets/reviews.tsv --output build/reviews
Prints: accuracy on --eval after each epoch; the checkpoint of the best epoch is the one kept.
"""

import time
from pathlib import Path

from core.arguments import PACKAGED_MODEL, check_output, make_parser
from core.files import RESULTS, sha256, slug, write_json
from core.labelled import REVIEWS, add_column_arguments, class_indices, read_labelled
from core.record import environment_record, results_folder

EVAL_EVERY = 5  # without --eval, every fifth line is held out


def read_data(args):
    """((train texts, classes), (eval texts, classes), class names); exits on one class."""
    texts, labels = read_labelled(args.data, args.text_column, args.label_column)
    values = sorted(set(labels))
    if len(values) < 2:
        raise SystemExit(f"{args.data}: expected at least two classes, found only {values[0]}; add texts of another")
    names = args.label_names or values
    if len(names) != len(values) or len(set(names)) != len(names):
        raise SystemExit(
            f"--label-names: expected {len(values)} different names, for {', '.join(values)}; found {' '.join(names)}"
        )
    classes = [values.index(label) for label in labels]
    if args.eval:
        eval_texts, eval_labels = read_labelled(args.eval, args.text_column, args.label_column)
        known = values if set(eval_labels) <= set(values) else names
        return (texts, classes), (eval_texts, class_indices(args.eval, eval_labels, known)), names
    if len(texts) < EVAL_EVERY:
        raise SystemExit(
            f"{args.data}: expected at least {EVAL_EVERY} texts, every {EVAL_EVERY}th of which is held out, found "
            f"{len(texts)}; add texts, or name others with --eval"
        )
    held_out = slice(EVAL_EVERY - 1, None, EVAL_EVERY)
    evaluation = texts[held_out], classes[held_out]
    del texts[held_out], classes[held_out]
    return (texts, classes), evaluation, names


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=REVIEWS, help="labelled texts (default: assets/reviews.tsv)")
    parser.add_argument("--eval", type=Path, help="labelled texts to measure on (default: every fifth line of --data)")
    add_column_arguments(parser)
    parser.add_argument("--label-names", nargs="+", help="names of the classes, in the order of the sorted labels")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--model", default=PACKAGED_MODEL, help="the encoder (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--max-length", type=int, default=64, help="tokens per text while training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, help="how many compute (default: torch's choice)")
    args = parser.parse_args()
    check_output(args.output)
    if min(args.epochs, args.batch_size) < 1:
        parser.error("--epochs, --batch-size: expected at least 1")
    args.random_weights = args.packaged_if_offline = False
    return args


def main():
    args = parse_args()
    data, evaluation, names = read_data(args)
    # torch and transformers take seconds: not before the arguments and the texts are known to be good
    import torch

    from tasks.training import load_model, save_checkpoint, train

    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer, card = load_model(args, names)
    print(
        f"{card['name']} with a head for {', '.join(names)}: {len(data[0])} texts to train on, {len(evaluation[0])} to measure"
    )
    started = time.perf_counter()
    epochs = train(model, tokenizer, data, evaluation, args)
    record = {
        "encoder": card,
        "data": args.data.name,
        "data_sha256": sha256(args.data),
        "eval": args.eval.name if args.eval else f"every {EVAL_EVERY}th line of --data",
        "texts": len(data[0]),
        "eval_texts": len(evaluation[0]),
        "epochs": epochs,
        "accuracy": max(e["accuracy"] for e in epochs),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment_record(),
    }
    record = save_checkpoint(args.output, model, tokenizer, record)
    folder = results_folder(args.results, {"slug": slug(args.output.resolve().name)})
    write_json(folder / "training.json", record)
    print(f"{args.output}: accuracy {record['accuracy']:.4f} after {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
