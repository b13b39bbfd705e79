"""LOGITS of the masked token -> TOKEN, SCORE of a masked language model. Pure functions on arrays."""

import numpy as np

from . import read_count, softmax, strings

PARAMETERS = ("top_k",)


def settings_of(card, tokenizer):
    """The mask token, and every token of the vocabulary as a reader sees it."""
    (vocabulary,) = card["outputs"]["LOGITS"]
    tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in range(vocabulary)]
    return {"mask_token": card["mask_token"], "mask_id": card["mask_id"], "tokens": tokens}


def check_settings(settings, config):
    """Raise ValueError unless there are as many tokens as the config has logits."""
    vocabulary = int(config["input"][0]["dims"][0])
    if len(settings["tokens"]) != vocabulary:
        raise ValueError(f"expected {vocabulary} tokens as in config.pbtxt, found {len(settings['tokens'])}")


def answer(tensors, settings, parameters):
    """{"TOKEN", "SCORE": [batch, top_k]}, the most likely first.

    tensors: "LOGITS" float32 [batch, vocabulary], "INPUT_IDS" int64 [batch, length]. parameters: top_k (default 1).
    Raises ValueError where a text has not exactly one mask token, and for a top_k beyond the vocabulary.
    """
    count = read_count(parameters, "top_k", 1, len(settings["tokens"]), "the model's vocabulary")
    masks = (tensors["INPUT_IDS"] == settings["mask_id"]).sum(axis=1)
    for row in np.flatnonzero(masks != 1):
        raise ValueError(
            f"TEXT: expected one {settings['mask_token']} within the model's length, found {masks[row]} in row {row}"
        )
    scores = softmax(tensors["LOGITS"].astype(np.float64)).astype(np.float32)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    tokens = strings([[settings["tokens"][i] for i in row] for row in best])
    return {"TOKEN": tokens, "SCORE": np.take_along_axis(scores, best, axis=1)}
