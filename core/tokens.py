"""How texts become tokens: the one way, in export, server, calibration, measurements and verdicts."""

import os
import tempfile
from pathlib import Path

import numpy as np
import tokenizers

from core.tables import (
    ATTENTION_MASK,
    INPUT_IDS,
    SPANS,
    TOKEN_TYPE_IDS,
    WORDS,
)

PAD_MULTIPLE = 32  # texts of like length share a shape, and so a batch: of 8 they formed half as large ones
FIELDS = {INPUT_IDS: "ids", ATTENTION_MASK: "attention_mask", TOKEN_TYPE_IDS: "type_ids", SPANS: "offsets"}


def load_tokenizer(path):
    """The tokenizer of a repository, as the server loads it."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise SystemExit(f"{path}: expected a tokenizer, found: {error}; run torch2onnx.py") from None


def encode(tokenizer, texts, inputs):
    """{input name: int64 [texts, length]}, SPANS [texts, length, 2]; padding and truncation are the tokenizer's own.

    texts: strings, or pairs of them where a task reads two.
    """
    encodings = tokenizer.encode_batch(list(texts))
    return {name: np.array([column(e, name) for e in encodings], dtype=np.int64) for name in inputs}


def column(encoding, name):
    """One tensor's values of one text; WORDS is -1 for padding and the tokenizer's own tokens."""
    if name != WORDS:
        return getattr(encoding, FIELDS[name])
    own = zip(encoding.word_ids, encoding.special_tokens_mask, strict=True)
    return [-1 if word is None or special else word for word, special in own]


def saved_tokenizer(tokenizer):
    """A checkpoint's tokenizer as the tokenizers library has it, without transformers; exits if it saves none."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SystemExit(
                f"{tokenizer.name_or_path}: expected a tokenizer that saves tokenizer.json, found {os.listdir(folder)}; "
                "name a fast tokenizer with --tokenizer"
            )
        return load_tokenizer(path)


def served_tokenizer(tokenizer, card):
    """A checkpoint's tokenizer as the server runs it: lengths and padding are written into it."""
    served = saved_tokenizer(tokenizer)
    limit = card["max_length"]
    served.enable_truncation(limit, direction=tokenizer.truncation_side)
    padding = {
        "direction": tokenizer.padding_side,
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        "pad_type_id": tokenizer.pad_token_type_id,
    }
    if card["fixed_length"]:
        served.enable_padding(length=limit, **padding)
    else:  # padding must not lead beyond the limit
        served.enable_padding(pad_to_multiple_of=PAD_MULTIPLE if limit % PAD_MULTIPLE == 0 else None, **padding)
    return served
