"""How a classifier's texts become tokens: the same in export, server, calibration and verdicts."""

import numpy as np
import tokenizers

from core.tables import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS

PAD_MULTIPLE = 8  # texts of like length share a shape, and so a batch


def set_lengths(fixed, tokenizer, card):
    """Write truncation and padding into a tokenizers.Tokenizer, as the served model pads."""
    limit = card["max_length"]
    fixed.enable_truncation(limit, direction=tokenizer.truncation_side)
    padding = {
        "direction": tokenizer.padding_side,
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        "pad_type_id": tokenizer.pad_token_type_id,
    }
    if card["fixed_length"]:
        fixed.enable_padding(length=limit, **padding)
    else:  # padding must not lead beyond the limit
        fixed.enable_padding(pad_to_multiple_of=PAD_MULTIPLE if limit % PAD_MULTIPLE == 0 else None, **padding)
    return fixed


def encode(served, texts, inputs):
    """{input name: int64 [texts, length]} by the served tokenizer."""
    encodings = served.encode_batch(list(texts))
    fields = {INPUT_IDS: "ids", ATTENTION_MASK: "attention_mask", TOKEN_TYPE_IDS: "type_ids"}
    return {name: np.array([getattr(e, fields[name]) for e in encodings], dtype=np.int64) for name in inputs}


def load_served_tokenizer(path):
    """The tokenizer of a repository, as the server loads it."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise SystemExit(f"{path}: expected a tokenizer, found: {error}; run torch2onnx.py") from None
