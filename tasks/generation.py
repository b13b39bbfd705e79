"""A generating checkpoint: its head, its limits, and what a service has to know to generate with it."""

import sys

import transformers
from transformers.models.auto import modeling_auto

from core.checkpoint import check_vocabulary, load_config, load_pretrained, load_tokenizer
from core.prompts import compile_template
from core.sources import find_folders
from core.tables import LOGITS
from tasks.generation_graphs import BEYOND, cache_dims
from tasks.table import GENERATION, fitting_task

LARGEST_GRAPH = 2**31 - 2**24  # bytes: an ONNX file holds 2 GiB, its nodes included
DEFAULT_LENGTH = 512  # tokens of a prompt where neither model nor tokenizer has a limit
# settings of a checkpoint that change the answers without sampling, and the value that does nothing
IGNORED = {
    "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "exponential_decay_length_penalty": None, "sequence_bias": None,
}  # fmt: skip


def load(args):
    """--model -> (model, tokenizer, what the record says of it); exits for what has no head of the task."""
    folder, tokenizer_folder, card = find_folders(args)
    config = load_config(folder)
    check_head(config, GENERATION[args.task], args.task, folder)
    model = load_pretrained(getattr(transformers, GENERATION[args.task].auto_model), folder, config)
    check_size(model, folder)
    tokenizer = load_tokenizer(tokenizer_folder, max(3, args.max_length or 3), pads=False)
    check_vocabulary(tokenizer, config, tokenizer_folder)
    card |= {
        "weights": "real",
        "architecture": type(model).__name__,
        "inputs": list(GENERATION[args.task].inputs),
        "outputs": {LOGITS: [config.get_text_config().vocab_size]},
        "max_length": find_limit(args, model, tokenizer),
        "fixed_length": False,
        "max_new_tokens": args.max_new_tokens,
        "generation": find_settings(model, tokenizer, folder),
        "chat_template": read_template(tokenizer, tokenizer_folder),
        "special_tokens": {key: v for key, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
    }
    warn_of_settings(card["name"], model.generation_config)
    return model, tokenizer, card


def check_head(config, row, task, folder):
    """Exit unless the checkpoint was saved with this task's head; says which task it fits."""
    architectures = config.architectures or []
    known = getattr(modeling_auto, row.mapping).get(config.model_type, ())
    known = (known,) if isinstance(known, str) else tuple(known)
    if set(architectures) & set(known):
        return
    fitting = fitting_task(architectures)
    remedy = f"use --task {fitting}" if fitting not in (None, task) else "name a checkpoint saved with this head"
    raise SystemExit(
        f"{folder}/config.json: expected a head for --task {task} ({', '.join(known) or row.auto_model}), found "
        f"{', '.join(architectures) or 'no architecture'} of model_type {config.model_type}; {remedy}"
    )


def check_size(model, folder):
    """Exit if a graph would be larger than an ONNX file may be."""
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > LARGEST_GRAPH:
        raise SystemExit(f"{folder}: expected at most 2 GiB of weights in FP32, found {size / 2**30:.1f} GiB; {BEYOND}")


def find_limit(args, model, tokenizer):
    """Longest prompt in tokens: --max-length, or the least limit of tokenizer and model."""
    positions = getattr(model.config, "max_position_embeddings", None)
    both = model.config.is_encoder_decoder  # the prompt has positions of its own
    room = positions and positions - (0 if both else args.max_new_tokens)
    if positions and args.max_new_tokens >= positions:
        raise SystemExit(
            f"--max-new-tokens: expected below {positions}, the model's positions, found {args.max_new_tokens}"
        )
    limit = args.max_length or min(tokenizer.model_max_length, room or DEFAULT_LENGTH)
    if room and limit > room:
        left = "" if both else f" less --max-new-tokens {args.max_new_tokens}"
        raise SystemExit(
            f"--max-length: expected at most {room}, the model's positions{left}; found {limit}; name a smaller one"
        )
    return limit


def find_settings(model, tokenizer, folder):
    """What core.generation.generate takes as settings."""
    generation = model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else model.config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    pads = (tokenizer.pad_token_id, model.config.pad_token_id, *ends, 0)
    start = None
    if model.config.is_encoder_decoder:
        start = generation.decoder_start_token_id
        start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
        if start is None:
            raise SystemExit(f"{folder}/config.json: expected decoder_start_token_id, found none; add it")
    banned = [ids[0] for ids in generation.bad_words_ids or () if len(ids) == 1]
    return {
        "cache": cache_dims(model),
        "pad": next(pad for pad in pads if pad is not None),
        "start": start,
        "ends": ends,
        "suppressed": sorted({*banned, *(generation.suppress_tokens or ())}),
        "first": generation.forced_bos_token_id if start is not None else None,
    }


def read_template(tokenizer, folder):
    """The checkpoint's chat template, None where it has none or several; exits where it is broken."""
    source = tokenizer.chat_template
    if not isinstance(source, str):
        return None
    try:
        compile_template(source)
    except Exception as error:  # jinja2's, of several kinds
        raise SystemExit(f"{folder}: expected a chat template in Jinja, found: {error}; correct it") from None
    return source


def warn_of_settings(name, generation):
    """Say which settings of the checkpoint the service does not follow."""
    settings = {key: getattr(generation, key, None) for key in IGNORED}
    ignored = [f"{key} {value}" for key, value in settings.items() if value not in (IGNORED[key], None)]
    if ignored:
        print(
            f"WARNING: {name}: expected no settings but greedy ones in generation_config.json, found "
            f"{', '.join(ignored)}; the service does not follow them",
            file=sys.stderr,
        )
