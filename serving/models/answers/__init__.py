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
