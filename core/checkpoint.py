"""Find a checkpoint and load its parts: what torch2onnx.py does before the export.

A checkpoint is a model hub id, a local folder, or that of a pip package. Only safetensors are
read, no code of a checkpoint is executed, and whatever is missing is named.
"""

import inspect
import sys
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer

from core.arguments import DEFAULT_MODEL, PACKAGED_MODEL
from core.files import read_json, sha256
from core.packaged import PACKAGES, package_folder, packaged_checkpoint
from core.packaged import RECORD as PACKAGED_RECORD
from core.tables import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS

transformers.utils.logging.disable_progress_bar()  # loading takes less than a second

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# the root of a checkpoint only: subfolders hold other formats
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
# files in a checkpoint's folder -> what the record of an export repeats of them
NOTES = {PACKAGED_RECORD: ("licence", "attribution"), "training.json": ("label",)}
THREE_WAYS = (
    "three ways on: 1. --model FOLDER with a checkpoint copied to this machine; "
    f"2. --model {PACKAGED_MODEL}, real MiniLM weights from a pip package; "
    "3. --random-weights, the DistilBERT architecture with seeded weights"
)


def packaged_folder():
    """Folder of the MiniLM checkpoint inside the installed package."""
    return package_folder(PACKAGED_MODEL)


def find_checkpoint(args):
    """Turn --model into a local folder. Returns (folder, card with name and origin)."""
    if args.model in PACKAGES:
        return packaged_checkpoint(args.model)
    folder = Path(args.model)
    if folder.is_dir():
        return folder, {"name": folder.resolve().name, "source": "local folder", "revision": None} | read_notes(folder)
    if args.model.startswith((".", "/", "~")) or args.model.count("/") > 1:
        raise SystemExit(f"{args.model}: expected a folder with a checkpoint, found none; check the path")
    if args.random_weights and args.model == DEFAULT_MODEL:
        # its architecture is the default of DistilBertConfig and its vocabulary is MiniLM's
        return None, {"name": "distilbert-base-uncased", "source": "transformers.DistilBertConfig()", "revision": None}
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                args.model, revision=args.revision, allow_patterns=HUB_FILES, ignore_patterns="*/*"
            )
        )
    except LocalEntryNotFoundError:
        reason = (
            f"{args.model}: expected it on the model hub or in its cache, found neither (the hub cannot be reached)"
        )
        if not args.packaged_if_offline:
            raise SystemExit(f"{reason}; {THREE_WAYS}") from None
        print(
            f"WARNING: {reason}; going on with {PACKAGES[PACKAGED_MODEL].name} from the package {PACKAGED_MODEL}",
            file=sys.stderr,
        )
        args.model = PACKAGED_MODEL
        return find_checkpoint(args)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise SystemExit(f"{args.model}: expected a model on the hub, found: {first_line}; {THREE_WAYS}") from None
    return folder, {"name": args.model.split("/")[-1], "source": f"hub: {args.model}", "revision": folder.name}


def read_notes(folder):
    """Licence and attribution of copied packaged weights, and the label of a small model of examples/."""
    found = {name: read_json(folder / name, "remove it") for name in NOTES if (folder / name).is_file()}
    return {key: found[name][key] for name in found for key in NOTES[name] if key in found[name]}


def check_checkpoint(folder, tokenizer, random_weights=False):
    """Exit if the checkpoint's folder lacks config or safetensors, or the tokenizer's folder a tokenizer."""
    weights = () if random_weights else ("*.safetensors",)
    for path, names, what, remedy in (
        (folder, ("config.json",), "a checkpoint's config", "name the folder of a Hugging Face checkpoint"),
        (tokenizer, TOKENIZER_FILES, "a tokenizer", "save it there with save_pretrained"),
        (folder, weights, "weights", "save them with save_pretrained, or use --random-weights"),
    ):
        if names and not any(found for name in names for found in path.glob(name)):
            raise SystemExit(f"{path}: expected {what} ({', '.join(names)}), found none; {remedy}")


def weights_sha256(folder):
    """SHA-256 of a checkpoint's safetensors, all files in the order of their names; None where there are none."""
    paths = sorted(Path(folder).glob("*.safetensors")) if folder else []
    return sha256(*paths) if paths else None


def load_config(folder):
    """The checkpoint's config; exits where transformers cannot read it."""
    try:
        return (
            AutoConfig.from_pretrained(folder, trust_remote_code=False) if folder else transformers.DistilBertConfig()
        )
    except (ValueError, OSError) as error:
        raise SystemExit(
            f"{folder}/config.json: expected a config that transformers takes, found: {str(error).splitlines()[0]}"
        ) from None


def load_pretrained(auto_model, folder, config, unused=()):
    """A model in float32 with eager attention, whose matmuls stay visible in the graph.

    auto_model: class of transformers. unused: parts of names of weights that may be missing, since no output
    depends on them. Exits where other weights are missing or do not fit.
    """
    try:
        model, info = auto_model.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, transformers and torch each raise their own
        raise SystemExit(
            f"{folder}: expected loadable safetensors that fit config.json, found: "
            f"{str(error).strip().splitlines()[0]}; copy the checkpoint again, or correct its config.json"
        ) from None
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in unused))
    missing += sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise SystemExit(
            f"{folder}: expected all weights of {type(model).__name__}, found {len(missing)} missing ({missing[0]}, …); "
            "name a complete checkpoint, saved with its head"
        )
    return model.eval()


def load_tokenizer(folder, max_length, pads=True):
    """The fast tokenizer; exits if there is none, none that pads, or the length is beyond its limit."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise SystemExit(f"{folder}: expected a tokenizer, found: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast or (pads and tokenizer.pad_token is None):
        raise SystemExit(
            f"{folder}: expected a fast tokenizer with a padding token, found {type(tokenizer).__name__}; name another checkpoint"
        )
    if not 3 <= max_length <= tokenizer.model_max_length:
        raise SystemExit(
            f"--max-length: expected 3 to {tokenizer.model_max_length}, the tokenizer's limit, found {max_length}"
        )
    return tokenizer


def check_vocabulary(tokenizer, config, folder):
    """Exit if the tokenizer has ids that the model's embedding has not."""
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, the model's vocabulary; "
            f"found {len(tokenizer)}; name the model's own with --tokenizer"
        )


def input_names(model, tokenizer, token_types):
    """The graph's inputs: token types only where the task, the tokenizer and the model have them."""
    takes = inspect.signature(model.forward).parameters
    types = token_types and "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in takes
    wanted = types and getattr(model.config, "type_vocab_size", 0) > 1
    return [INPUT_IDS, ATTENTION_MASK, *([TOKEN_TYPE_IDS] if wanted else [])]


def sample_input(names, batch, length):
    """int64 [batch, length] of each input: some token, no padding, the first token type."""
    ids = torch.full((batch, length), 5, dtype=torch.int64)
    values = {INPUT_IDS: ids, ATTENTION_MASK: torch.ones_like(ids), TOKEN_TYPE_IDS: torch.zeros_like(ids)}
    return tuple(values[name] for name in names)


def find_limit(module, names, config, tokenizer, max_length):
    """Longest text in tokens: --max-length, or the lesser limit of tokenizer and model."""
    positions = getattr(config, "max_position_embeddings", None)
    limit = max_length or min(tokenizer.model_max_length, positions or 512)
    # RoBERTa's positions start behind the padding id, so it takes two tokens fewer than it has positions
    for length in (limit,) if max_length else (limit, limit - 2):
        try:
            with torch.inference_mode():
                module(*sample_input(names, 1, length))
            return length
        except (IndexError, RuntimeError):
            continue
    raise SystemExit(f"--max-length: expected at most the model's positions ({positions}), found {limit}")
