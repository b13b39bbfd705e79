"""Checkpoints with the head of their task, and sentence encoders; whatever makes one none is named."""

import json

import transformers

from core.checkpoint import check_vocabulary, find_limit, input_names, load_config, load_pretrained, load_tokenizer
from core.sources import find_folders
from core.tables import HIDDEN_STATE, SPANS
from core.tokens import encode, served_tokenizer
from tasks.embedding import load_encoder
from tasks.graphs import Graph
from tasks.labels import read_labels, warn_of_labels
from tasks.table import TASKS, fitting_task

SHORTEST = 3  # tokens: two special ones and one of text


def load(args):
    """--model -> (Graph, tokenizer, what the record says of it); exits for a checkpoint that has not the task's head."""
    task = TASKS[args.task]
    folder, tokenizer_folder, card = find_folders(args)
    model = load_model(args.task, folder) if task.suffix else load_encoder(folder, False, args.seed)
    tokenizer = load_tokenizer(tokenizer_folder, args.max_length or SHORTEST)
    check_vocabulary(tokenizer, model.config, tokenizer_folder)
    inputs = input_names(model, tokenizer, token_types=True)
    dims = [getattr(model.config, dim) if isinstance(dim, str) else dim for dim in task.dims]
    card |= {
        "weights": "real",
        "architecture": type(model).__name__,
        "inputs": inputs,
        "outputs": {task.output: dims},
        "fixed_length": args.max_length is not None and not task.windows,
    }
    card |= describe(args, task, model.config, tokenizer, folder)
    warn_of_labels(card["name"], card.get("labels", ()))
    if args.hidden_state:
        card["outputs"][HIDDEN_STATE] = [-1, model.config.hidden_size]
    graph = Graph(model, inputs, task.graph, card).eval()
    limit = find_limit(graph, inputs, model.config, tokenizer, args.max_length)
    card["max_length"] = min(limit, card.pop("longest", limit))
    if SPANS in task.also or task.windows:
        check_spans(tokenizer, card, tokenizer_folder)
    return graph, tokenizer, card


def describe(args, task, config, tokenizer, folder):
    """What the record has of this task alone."""
    if task.labelled:
        labels = read_labels(args.labels, config, folder)
        return {"labels": labels, "problem_type": config.problem_type or "single_label_classification"}
    if task.graph == "masked_logits":
        if tokenizer.mask_token is None:
            raise SystemExit(f"{folder}: expected a tokenizer with a mask token, found none; name another checkpoint")
        return {"mask_token": tokenizer.mask_token, "mask_id": tokenizer.mask_token_id}
    if task.graph == "pooled":
        return read_pooling(folder)
    return {}


def load_model(name, folder):
    """The model; a head that is not in the checkpoint, or is that of another task, is refused."""
    task, config = TASKS[name], load_config(folder)
    architectures = config.architectures or []
    if not any(architecture.endswith(task.suffix) for architecture in architectures):
        fits = fitting_task(architectures)
        remedy = f"take --task {fits}" if fits else "name a fine-tuned checkpoint"
        trained = ", or make one with train_classifier.py" if name == "classification" else ""
        raise SystemExit(
            f"{folder}/config.json: expected the head of --task {name} (…{task.suffix}), found "
            f"{', '.join(architectures) or 'no architecture'}; {remedy}{trained}"
        )
    if task.labelled and (config.problem_type == "regression" or config.num_labels < 2):
        raise SystemExit(
            f"{folder}/config.json: expected at least two classes, found {config.num_labels}"
            f"{' and problem_type regression' if config.problem_type == 'regression' else ''}; name a classifier"
        )
    return load_pretrained(getattr(transformers, task.auto_model), folder, config)


def check_spans(tokenizer, card, folder):
    """Exit unless the tokenizer says where in the text its tokens are."""
    served = served_tokenizer(tokenizer, card)
    if not encode(served, ["two words"], [SPANS])[SPANS].any():
        raise SystemExit(
            f"{folder}: expected a tokenizer that gives the place of each token in the text, found none; name another"
        )


def read_pooling(folder):
    """How sentence-transformers pools this checkpoint's tokens, as its files say: the mean without them."""
    modules = read_file(folder / "modules.json", [])
    kinds = [module["type"].split(".")[-1] for module in modules]
    if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise SystemExit(
            f"{folder}/modules.json: expected Transformer, Pooling and Normalize, found {other[0]} too; name another model"
        )
    place = next((module["path"] for module in modules if module["type"].endswith("Pooling")), "1_Pooling")
    config = read_file(folder / place / "config.json", {"pooling_mode_mean_tokens": True})
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = modes or [f"pooling_mode_{config.get('pooling_mode')}"]
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    found = {known.get(mode.removeprefix("pooling_mode_")) for mode in modes}
    if found not in ({"mean"}, {"cls"}):
        raise SystemExit(f"{folder}/{place}/config.json: expected pooling by mean or CLS, found {', '.join(modes)}")
    longest = read_file(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    return {"pooling": found.pop()} | ({"longest": longest} if longest else {})


def read_file(path, default):
    """A JSON file of a checkpoint; the default where there is none."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path}: expected JSON, found: {error}; copy the checkpoint again") from None
