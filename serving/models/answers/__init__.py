"""One file a task: tensors -> answers, pure functions on arrays; here what several of them need.

A file has settings_of(card, tokenizer), what its answers need of a repository's record, which is written beside it as
settings.json; check_settings(settings, config), which raises ValueError where both disagree; PARAMETERS, the names of
what a request may set; and answer(tensors, settings, parameters).
"""

import numpy as np


def check_known(parameters, known):
    """Raise ValueError for a parameter of a request that its service does not have; Triton's own are left alone."""
    unknown = [name for name in parameters if name not in known and not name.startswith("triton_")]
    if unknown:
        raise ValueError(f"parameters: expected some of {', '.join(known)}, found {unknown[0]!r}")


def read_count(parameters, name, default, largest, what):
    """A parameter that counts. Raises ValueError where it is no whole number from 1 to the largest."""
    value = parameters.get(name, default)
    try:
        count = int(value)
        whole = not isinstance(value, bool) and float(value) == count
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or not 1 <= count <= largest:
        raise ValueError(f"{name}: expected 1 to {largest}, {what}; found {value}")
    return count


def softmax(logits):
    """Scores that add up to 1 along the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def strings(rows):
    """Lists of str -> the array of bytes that Triton takes."""
    return np.array([[text.encode() for text in row] for row in rows], dtype=object)


def column(encoding, name):
    """int64 [length] of one text: INPUT_IDS, SPANS [length, 2], or WORDS, -1 for the tokenizer's own tokens."""
    if name == "WORDS":
        own = zip(encoding.word_ids, encoding.special_tokens_mask, strict=True)
        return np.array([-1 if word is None or special else word for word, special in own], dtype=np.int64)
    return np.array({"INPUT_IDS": encoding.ids, "SPANS": encoding.offsets}[name], dtype=np.int64)


def stack(rows):
    """Arrays of a request's rows -> one array; those that are shorter are filled with -1 for whole numbers, else 0."""
    longest = max(len(row) for row in rows)
    filling = -1 if np.issubdtype(rows[0].dtype, np.integer) else 0
    padded = np.full((len(rows), longest, *rows[0].shape[1:]), filling, dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
