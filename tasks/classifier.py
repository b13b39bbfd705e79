"""Load a fine-tuned classifier and its labels; whatever makes it none is named.

Only safetensors are read and no code of a checkpoint is executed.
"""

import inspect
import json

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from core.checkpoint import load_tokenizer
from core.files import slug
from core.sources import find_folders
from core.tables import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS

SHORTEST = 8  # tokens; the length of the first run that the exporter records


class Classifier(torch.nn.Module):
    """A sequence classifier that takes its tensors by position and returns the logits alone."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.names = model, [name.lower() for name in inputs]

    def forward(self, *tensors):
        """int64 [batch, length] each -> float32 [batch, classes]."""
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


# --- the checkpoint ------------------------------------------------------------------


def load_classifier(args):
    """(Classifier, tokenizer, card); exits for what is no classifier with a head."""
    folder, tokenizer_folder, card = find_folders(args)
    model = load_model(folder)
    labels = read_labels(args.labels, model.config, folder)
    tokenizer = load_tokenizer(tokenizer_folder, args.max_length or SHORTEST)
    check_vocabulary(tokenizer, model.config, tokenizer_folder)
    inputs = input_names(model, tokenizer)
    classifier = Classifier(model, inputs).eval()
    limit = find_limit(classifier, tokenizer, args.max_length)
    card |= {
        "task": "classification",
        "labels": labels,
        "problem_type": model.config.problem_type or "single_label_classification",
        "inputs": inputs,
        "max_length": limit,
        "fixed_length": args.max_length is not None,
        "weights": "real",
        "slug": slug(card["name"]),
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return classifier, tokenizer, card


def load_model(folder):
    """The model in float32 with eager attention; a head that is not in the checkpoint is refused."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise SystemExit(
            f"{folder}/config.json: expected a config that transformers takes, found: {str(error).splitlines()[0]}"
        ) from None
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
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",  # its matmuls stay visible in the graph
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, transformers and torch each raise their own
        raise SystemExit(
            f"{folder}: expected safetensors with a head for {config.num_labels} classes, found: "
            f"{str(error).strip().splitlines()[0]}; copy the checkpoint again, or correct its config.json"
        ) from None
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lost:
        raise SystemExit(
            f"{folder}: expected all weights of {architectures[0]}, found {len(lost)} missing ({lost[0]}, …); "
            "name a checkpoint that was saved with its classification head"
        )
    return model.eval()


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


def check_vocabulary(tokenizer, config, folder):
    """Exit if the tokenizer has ids that the model's embedding has not."""
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, the model's vocabulary; "
            f"found {len(tokenizer)}; name the model's own with --tokenizer"
        )


def input_names(model, tokenizer):
    """The graph's inputs: token types only where tokenizer and model both have them."""
    takes = inspect.signature(model.forward).parameters
    types = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in takes
    wanted = types and getattr(model.config, "type_vocab_size", 0) > 1
    return [INPUT_IDS, ATTENTION_MASK, *([TOKEN_TYPE_IDS] if wanted else [])]


def find_limit(classifier, tokenizer, max_length):
    """Longest text in tokens: --max-length, or the lesser limit of tokenizer and model."""
    positions = getattr(classifier.model.config, "max_position_embeddings", None)
    limit = max_length or min(tokenizer.model_max_length, positions or 512)
    # RoBERTa's positions start behind the padding id, so it takes two tokens fewer than it has positions
    for length in (limit,) if max_length else (limit, limit - 2):
        try:
            with torch.inference_mode():
                classifier(*sample_input(classifier, 1, length))
            return length
        except (IndexError, RuntimeError):
            continue
    raise SystemExit(f"--max-length: expected at most the model's positions ({positions}), found {limit}")


def sample_input(classifier, batch, length):
    """Tensors of the right shape: some token, no padding, the first token type."""
    ids = torch.full((batch, length), 5, dtype=torch.int64)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return tuple(values[name] for name in classifier.names)
