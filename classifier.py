"""Load, export and check a classifier: what torch2onnx.py --task classification does.

The graph takes INPUT_IDS, ATTENTION_MASK and, only where the model wants them, TOKEN_TYPE_IDS,
and answers LOGITS, float32 [batch, classes]. Batch and sequence length are dynamic; --max-length
fixes the length.
"""

import contextlib
import inspect
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from checkpoint import load_tokenizer
from classifier_repository import check_name, present, write_configs, write_tokenizer
from classifier_tokens import encode, load_served_tokenizer, set_lengths
from common import (
    ATTENTION_MASK,
    EMBEDDERS,
    INPUT_IDS,
    LOGITS,
    REFERENCE,
    ROOT,
    TOKEN_TYPE_IDS,
    environment_record,
    open_session,
    read_texts,
    replace_when_done,
    sha256,
    slug,
    write_json,
)
from sources import find_folders
from torch2onnx import CHECK_BATCHES, OPSET, name_nodes

SHORTEST = 8  # tokens; the length of the first run that the exporter records
GENERIC = "LABEL_"  # what transformers calls classes that nobody named


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
            f"{folder}/config.json: expected a known architecture, found: {str(error).splitlines()[0]}"
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


# --- the graph -----------------------------------------------------------------------


def export_onnx(classifier, card, path):
    """Classifier -> ONNX; batch dynamic, length dynamic up to the limit or fixed."""
    length = card["max_length"] if card["fixed_length"] else min(2 * SHORTEST, card["max_length"])
    axes = {0: "batch"} | ({} if card["fixed_length"] else {1: "length"})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns about its own use of torch
        torch.onnx.export(
            classifier,
            sample_input(classifier, 2, length),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=card["inputs"],
            output_names=[LOGITS],
            dynamic_shapes={"tensors": tuple(axes for _ in card["inputs"])},
            external_data=False,
            verbose=False,
        )
    graph = onnx.load(path)
    name_nodes(graph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def check_onnx(classifier, served, card, texts, path, max_error):
    """ONNX Runtime against torch on short, long and padded texts; exits above max_error."""
    session = open_session(path)
    by_length = ["", *sorted(texts, key=len, reverse=True), "word " * card["max_length"]]
    worst = 0.0
    for batch in CHECK_BATCHES:
        step = max(1, len(by_length) // batch)
        feeds = encode(served, by_length[-1:] if batch == 1 else by_length[::step][:batch], card["inputs"])
        with torch.inference_mode():
            expected = classifier(*(torch.from_numpy(values) for values in feeds.values())).numpy()
        found = session.run([LOGITS], feeds)[0]
        error = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        if not error <= max_error:  # NaN must not pass
            raise SystemExit(
                f"{path}: expected at most {max_error:g} max abs error to torch at batch {batch}, found {error:g}; "
                "no model was left in the repository; try another torch or onnxruntime version"
            )
        worst = max(worst, error)
    return worst


# --- the step ------------------------------------------------------------------------


def serve_tokenizer(tokenizer, card):
    """The checkpoint's tokenizer as the server runs it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SystemExit(
                f"{tokenizer.name_or_path}: expected a tokenizer that saves tokenizer.json, found {os.listdir(folder)}; "
                "name a fast tokenizer with --tokenizer"
            )
        return set_lengths(load_served_tokenizer(path), tokenizer, card)


def remove_typed_graphs(repository):
    """Graphs of an older export must not be served beside the new one."""
    for suffix in present(repository):
        if suffix != REFERENCE:
            shutil.rmtree(repository / EMBEDDERS[suffix])


def export_classifier(args):
    """Checkpoint -> a model repository that serves it with ONNX; quantize.py adds the precisions."""
    texts = read_texts(args.texts)
    classifier, tokenizer, card = load_classifier(args)
    repository = args.repository or ROOT / "build" / (args.name or card["slug"])
    name = check_name(args.name or repository.resolve().name)
    if all(label.startswith(GENERIC) for label in card["labels"]):
        print(f"labels: found only {', '.join(card['labels'])}; name them with --labels FILE", file=sys.stderr)
    print(f"{card['name']} ({card['source']}), {card['parameters']:,} parameters, labels {', '.join(card['labels'])}")
    served = serve_tokenizer(tokenizer, card)
    path = repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    try:
        with replace_when_done(path) as temporary:
            export_onnx(classifier, card, temporary)
            error = check_onnx(classifier, served, card, texts, temporary, args.max_error)
    except SystemExit:
        path.unlink(missing_ok=True)  # an older model must not be taken for this one
        raise
    print(f"ONNX Runtime agrees with torch: max abs error {error:.2g} at batch {', '.join(map(str, CHECK_BATCHES))}")
    remove_typed_graphs(repository)
    write_tokenizer(repository, served)
    card |= {"opset": OPSET, "max_abs_error_to_torch": error, "reference_sha256": sha256(path)}
    write_json(repository / "model.json", card | {"environment": environment_record()})
    write_configs(repository, name, REFERENCE, args.max_batch_size)
    print(repository)
