"""Export a classifier and write the repository that serves it: torch2onnx.py --task classification.

The graph takes INPUT_IDS, ATTENTION_MASK and, only where the model wants them, TOKEN_TYPE_IDS,
and answers LOGITS, float32 [batch, classes]. Batch and sequence length are dynamic; --max-length
fixes the length.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch

from core.files import ROOT, read_texts, replace_when_done, sha256, write_json
from core.onnx_runtime import open_session
from core.record import environment_record
from core.tables import EMBEDDERS, LOGITS, REFERENCE
from core.tokens import encode, load_served_tokenizer, set_lengths
from serving.classifier_repository import PARTS, check_name, own_record, present, write_configs, write_tokenizer
from tasks.classifier import SHORTEST, load_classifier, sample_input
from torch2onnx import CHECK_BATCHES, OPSET, name_nodes

GENERIC = "LABEL_"  # what transformers calls classes that nobody named


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


def check_place(model, repository):
    """Exit where the repository would lie in the checkpoint, or in a folder of something else."""
    if Path(model).is_dir() and Path(model).resolve() == repository.resolve():
        raise SystemExit(f"{repository}: expected another folder than the checkpoint's; name one with --repository")
    found = {p.name for p in repository.iterdir()} if repository.is_dir() else set()
    # parts alone: an export that was interrupted
    if found - set(PARTS) and not own_record(repository):
        raise SystemExit(
            f"{repository}: expected a new folder or a classifier's repository, found other files; "
            "name another with --repository"
        )


def export_classifier(args):
    """Checkpoint -> a model repository that serves it with ONNX; quantize.py adds the precisions."""
    texts = read_texts(args.texts)
    classifier, tokenizer, card = load_classifier(args)
    repository = args.repository or ROOT / "build" / (args.name or card["slug"])
    check_place(args.model, repository)
    name = check_name(args.name or repository.resolve().name)
    if all(label.startswith(GENERIC) for label in card["labels"]):
        found = ", ".join(card["labels"])
        print(
            f"WARNING: {card['name']}: expected labels in id2label, found only {found}; name them with --labels FILE",
            file=sys.stderr,
        )
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
    older = own_record(repository).get("service", {})  # write_configs takes its ensemble away
    write_json(repository / "model.json", card | {"environment": environment_record(), "service": older})
    write_configs(repository, name, REFERENCE, args.max_batch_size)
    print(repository)
