#!/usr/bin/env python3
"""Fine-tune a text encoder with a classification head on labelled texts.

Reads:  --data, a TSV or CSV of texts and labels; --eval, another one, or every fifth line of
        --data; the encoder: packaged MiniLM, a local folder or a model hub id.
Writes: --output, a Hugging Face checkpoint with id2label, tokenizer and training.json, which
        results/<name of that folder>/ gets too.
Run:    ./train_classifier.py --data assets/reviews.tsv --output build/reviews
Prints: accuracy on --eval after each epoch; the checkpoint of the best epoch is the one kept.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from core.checkpoint import PACKAGED_MODEL, check_checkpoint, find_checkpoint, load_config, load_tokenizer
from core.files import RESULTS, sha256, slug, write_json
from core.labelled import REVIEWS, add_column_arguments, class_indices, read_labelled
from core.record import environment_record
from torch2onnx import replace_folder_when_done

EVAL_EVERY = 5  # without --eval, every fifth line is held out
BUCKET_BATCHES = 20  # texts are sorted by length within so many batches: little padding, still shuffled
WARMUP_SHARE = 0.1  # of the steps
WEIGHT_DECAY = 0.01


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
    held_out = [i % EVAL_EVERY == EVAL_EVERY - 1 for i in range(len(texts))]
    train, evaluation = (
        (
            [t for t, h in zip(texts, held_out, strict=True) if h is side],
            [c for c, h in zip(classes, held_out, strict=True) if h is side],
        )
        for side in (False, True)
    )
    return train, evaluation, names


def load_model(args, names):
    """(encoder with a new head, tokenizer, card); the embeddings stay as they are."""
    folder, card = find_checkpoint(args)
    check_checkpoint(folder, random_weights=False)
    load_config(folder)
    tokenizer = load_tokenizer(folder, args.max_length)
    transformers_logging.set_verbosity_error()  # it reports the new head as missing
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="single_label_classification",
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
    )
    # half of MiniLM's parameters: most words of a small file are seen too seldom to move theirs well
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad = False
    return model, tokenizer, card


def make_batches(texts, batch_size, generator):
    """Shuffled batches of indices, texts of like length together."""
    order = generator.permutation(len(texts))
    step = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), step):
        bucket = sorted(order[start : start + step], key=lambda i: len(texts[i]))
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    generator.shuffle(batches)
    return batches


def train_epoch(model, tokenizer, optimizer, schedule, data, args, generator, name):
    """One pass over the texts; returns the mean loss."""
    texts, classes = data
    model.train()
    losses = []
    batches = make_batches(texts, args.batch_size, generator)
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=1, file=sys.stderr):
        tokens = tokenizer(
            [texts[i] for i in batch], padding=True, truncation=True, max_length=args.max_length, return_tensors="pt"
        )
        loss = model(**tokens, labels=torch.tensor([classes[i] for i in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.inference_mode()
def measure_accuracy(model, tokenizer, data, args):
    """Share of texts whose largest logit is that of their class."""
    texts, classes = data
    model.eval()
    right = 0
    for start in range(0, len(texts), args.batch_size):
        tokens = tokenizer(
            texts[start : start + args.batch_size],
            padding=True,
            truncation=True,
            max_length=args.max_length,
            return_tensors="pt",
        )
        expected = torch.tensor(classes[start : start + args.batch_size])
        right += int((model(**tokens).logits.argmax(dim=1) == expected).sum())
    return right / len(texts)


def train(model, tokenizer, data, evaluation, args):
    """All epochs; the model ends with the weights of the best one. Returns a record per epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * -(-len(data[0]) // args.batch_size)
    warmup = max(1, int(steps * WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    generator = np.random.default_rng(args.seed)
    epochs, best = [], None
    for epoch in range(1, args.epochs + 1):
        loss = train_epoch(model, tokenizer, optimizer, schedule, data, args, generator, f"epoch {epoch}/{args.epochs}")
        accuracy = measure_accuracy(model, tokenizer, evaluation, args)
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.4f} on {len(evaluation[0])} texts", flush=True)
        if best is None or accuracy > max(e["accuracy"] for e in epochs):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        epochs.append({"epoch": epoch, "loss": loss, "accuracy": accuracy})
    model.load_state_dict(best)
    return epochs


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    if args.output.exists() and not (args.output / "training.json").is_file():
        raise SystemExit(
            f"--output: expected a new folder or a checkpoint of this script, found {args.output} with other things in it; "
            "name another, or remove it"
        )
    if min(args.epochs, args.batch_size) < 1:
        parser.error("--epochs, --batch-size: expected at least 1")
    args.random_weights = args.packaged_if_offline = False
    return args


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data, evaluation, names = read_data(args)
    model, tokenizer, card = load_model(args, names)
    print(
        f"{card['name']} with a head for {', '.join(names)}: {len(data[0])} texts to train on, {len(evaluation[0])} to measure"
    )
    started = time.perf_counter()
    epochs = train(model, tokenizer, data, evaluation, args)
    seconds = round(time.perf_counter() - started, 1)
    best = max(e["accuracy"] for e in epochs)
    record = {
        "encoder": card,
        "data": args.data.name,
        "data_sha256": sha256(args.data),
        "eval": args.eval.name if args.eval else f"every {EVAL_EVERY}th line of --data",
    }
    record |= {
        "texts": len(data[0]),
        "eval_texts": len(evaluation[0]),
        "epochs": epochs,
        "accuracy": best,
        "seconds": seconds,
        "environment": environment_record(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder_when_done(args.output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "training.json", record)
    write_json(args.results / slug(args.output.resolve().name) / "training.json", record)
    print(f"{args.output}: accuracy {best:.4f} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
