"""A fine-tuned sequence classifier and its labels; whatever makes it none is named."""

import json
import sys

import torch
import transformers

from core.checkpoint import (
    check_vocabulary,
    find_limit,
    input_names,
    load_config,
    load_pretrained,
    load_tokenizer,
)
from core.sources import find_folders
from core.tables import LOGITS

SHORTEST = 3  # tokens: two special ones and one of text
GENERIC = "LABEL_"  # what transformers calls classes that nobody named


class Classifier(torch.nn.Module):
    """A sequence classifier that takes its tensors by position and returns the logits alone."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.names = model, [name.lower() for name in inputs]

    def forward(self, *tensors):
        """int64 [batch, length] each -> float32 [batch, classes]."""
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def load(args):
    """--model -> (Classifier, tokenizer, what the record says of it); exits for what is no classifier with a head."""
    folder, tokenizer_folder, card = find_folders(args)
    model = load_model(folder)
    labels = read_labels(args.labels, model.config, folder)
    tokenizer = load_tokenizer(tokenizer_folder, args.max_length or SHORTEST)
    check_vocabulary(tokenizer, model.config, tokenizer_folder)
    inputs = input_names(model, tokenizer, token_types=True)
    classifier = Classifier(model, inputs).eval()
    warn_of_labels(card["name"], labels)
    card |= {
        "weights": "real",
        "architecture": type(model).__name__,
        "inputs": inputs,
        "outputs": {LOGITS: [len(labels)]},
        "max_length": find_limit(classifier, inputs, model.config, tokenizer, args.max_length),
        "fixed_length": args.max_length is not None,
        "labels": labels,
        "problem_type": model.config.problem_type or "single_label_classification",
    }
    return classifier, tokenizer, card


def load_model(folder):
    """The model; a head that is not in the checkpoint is refused."""
    config = load_config(folder)
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise SystemExit(
            f"{folder}/config.json: expected a classification head (…ForSequenceClassification), found "
            f"{', '.join(architectures) or 'no architecture'}; name a fine-tuned classifier, or make one with train_classifier.py"
        )
    if config.problem_type == "regression" or config.num_labels < 2:
        raise SystemExit(
            f"{folder}/config.json: expected at least two classes, found {config.num_labels}"
            f"{' and problem_type regression' if config.problem_type == 'regression' else ''}; name a classifier"
        )
    return load_pretrained(transformers.AutoModelForSequenceClassification, folder, config)


def warn_of_labels(name, labels):
    """Say it where nobody named the classes."""
    if all(label.startswith(GENERIC) for label in labels):
        found = ", ".join(labels)
        print(
            f"WARNING: {name}: expected labels in id2label, found only {found}; name them with --labels FILE",
            file=sys.stderr,
        )


# --- labels --------------------------------------------------------------------------


def read_labels(path, config, folder):
    """Names of the classes in the order of the logits, from --labels or the checkpoint's id2label."""
    where = path or folder / "config.json"
    table = parse_labels(path) if path else {int(i): name for i, name in (config.id2label or {}).items()}
    count = config.num_labels
    if len(table) != count or set(table) != set(range(count)):
        raise SystemExit(
            f"{where}: expected labels for the {count} logits, 0 to {count - 1}; found {len(table)}, for "
            f"{', '.join(map(str, sorted(table)))}; name every class once with --labels FILE"
        )
    labels = [str(table[i]) for i in range(count)]
    doubled = sorted({name for name in labels if labels.count(name) > 1 or not name.strip()})
    if doubled:
        raise SystemExit(
            f"{where}: expected {count} different names, found {doubled[0]!r} doubled or empty; correct it"
        )
    return labels


def parse_labels(path):
    """{index: name} of {"0": "negative", …} or of the inverted {"negative": 0, …}."""
    form = 'write {"0": "negative", "1": "positive"} or {"negative": 0, "positive": 1}'

    def refuse_doubled(pairs):
        keys = [key for key, _ in pairs]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise SystemExit(f"{path}: expected every label once, found {doubled!r} doubled; {form}")
        return dict(pairs)

    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_doubled)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--labels {path}: expected a JSON file of labels, found: {error}; {form}") from None
    if isinstance(table, dict) and table and all(key.isdecimal() for key in table):
        return {int(key): name for key, name in table.items()}
    if isinstance(table, dict) and table and all(type(value) is int for value in table.values()):
        if len(set(table.values())) < len(table):
            raise SystemExit(f"{path}: expected every class once, found two labels for one; {form}")
        return {index: name for name, index in table.items()}
    raise SystemExit(f"{path}: expected labels by class, found {str(table)[:60]}; {form}")
