"""Where a checkpoint may come from besides a folder and the model hub: one table of resolvers.

A resolver turns what stands after its prefix into a local folder. To add a source, write a
function and a line in SOURCES. The client libraries are not in requirements.txt: whoever has
their models in such a place has its library, or is told which pip install brings it.
"""

import argparse
import importlib
from pathlib import Path

from core.checkpoint import TOKENIZER_FILES, check_checkpoint, find_checkpoint, weights_sha256
from core.files import slug


def fetch_clearml(clearml, reference):
    """ClearML model id -> folder of the unpacked model."""
    path = Path(clearml.InputModel(model_id=reference).get_local_copy(raise_on_error=True))
    if not path.is_dir():  # its folder is the cache, with files of other models
        raise SystemExit(
            f"clearml:{reference}: expected an uploaded folder, found one file, {path.name}; upload what save_pretrained wrote"
        )
    return path


def fetch_wandb(wandb, reference):
    """entity/project/name:version of a Weights & Biases artifact -> its folder."""
    return Path(wandb.Api().artifact(reference).download())


def fetch_mlflow(mlflow, reference):
    """models:/name/version of MLflow's registry -> folder of the model."""
    return Path(importlib.import_module("mlflow.artifacts").download_artifacts(artifact_uri=reference))


# prefix of --model -> (module, what pip calls it, form of the reference, resolver)
SOURCES = {
    "clearml": ("clearml", "clearml", "clearml:ID", fetch_clearml),
    "wandb": ("wandb", "wandb", "wandb:entity/project/name:version", fetch_wandb),
    "mlflow": ("mlflow", "mlflow", "mlflow:models:/name/version", fetch_mlflow),
}


def split_reference(model):
    """(prefix, reference) of a --model that names a source of the table, else (None, model)."""
    prefix, colon, reference = model.partition(":")
    return (prefix, reference) if colon and prefix in SOURCES else (None, model)


def fetch(model):
    """Folder of what `model` names in a source of the table; every failure is one line."""
    prefix, reference = split_reference(model)
    module, package, form, resolver = SOURCES[prefix]
    if not reference:
        raise SystemExit(f"--model: expected {form}, found {model}; add what the source calls the model")
    try:
        client = importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"{model}: expected the package {package}, found: {error}; pip install {package}") from None
    try:
        return resolver(client, reference)
    except Exception as error:  # each client library raises its own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(
            f"{model}: expected a model ({form}), found: {first_line}; check the name and the access to {package}"
        ) from None


def inner_folder(folder, names, what):
    """The folder nearest to `folder`'s root that holds one of the files; a registry may nest it."""
    found = sorted((p.parent for name in names for p in folder.rglob(name)), key=lambda p: len(p.parts))
    if not found:
        raise SystemExit(f"{folder}: expected {what} ({', '.join(names)}), found none; upload it with save_pretrained")
    return found[0]


def find_folders(args):
    """(checkpoint folder, tokenizer folder, card) of --model and --tokenizer.

    --tokenizer is a folder, a hub id or a source of the table too; without it the tokenizer
    is the checkpoint's.
    """
    folder, card = find_folder(args)
    tokenizer, source, origin = folder, args.tokenizer or args.model, None
    if args.tokenizer:
        tokenizer, origin = find_folder(argparse.Namespace(**vars(args) | {"model": source, "revision": None}))
    # a registry may nest them, MLflow the tokenizer apart from the model
    if split_reference(source)[0]:
        tokenizer = inner_folder(tokenizer, TOKENIZER_FILES, "a tokenizer")
    if split_reference(args.model)[0]:
        folder = inner_folder(folder, ("config.json",), "a checkpoint")
    if folder is not None:  # None: an architecture without a checkpoint
        check_checkpoint(folder, tokenizer, args.random_weights)
    card["slug"] = slug(card["name"] + ("-random" if args.random_weights else ""))
    card["weights_sha256"] = None if args.random_weights else weights_sha256(folder)
    return folder, tokenizer, card | ({"tokenizer": origin} if origin else {})


def find_folder(args):
    """--model -> (folder, card with name and origin)."""
    prefix, reference = split_reference(args.model)
    if prefix is None:
        return find_checkpoint(args)
    if args.revision:
        raise SystemExit(
            f"--revision: expected a version in {args.model} itself, found {args.revision} apart; leave it out"
        )
    folder = fetch(args.model)
    name = reference.rstrip("/").split("/")[-1 if prefix != "mlflow" else -2 if reference.count("/") > 1 else -1]
    return folder, {"name": name.split(":")[0] or reference, "source": args.model, "revision": None}
