"""LOGITS -> LABEL, SCORE of a classifier. Pure functions on arrays; serving/models/postprocess.py calls them."""

import numpy as np

from . import read_count, softmax, strings

PARAMETERS = ("top_k",)
SCORE_OF = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}


def settings_of(card, tokenizer):
    """Labels in the order of the logits, how scores are made, and the threshold, where one was chosen."""
    settings = {"labels": card["labels"], "score": SCORE_OF[card["problem_type"]]}
    threshold = card.get("service", {}).get("threshold")
    return settings | ({"threshold": threshold} if threshold else {})


def check_settings(settings, config):
    """Raise ValueError unless there are as many labels as the config has logits."""
    classes = int(config["input"][0]["dims"][0])
    if len(settings["labels"]) != classes:
        raise ValueError(f"expected {classes} labels as in config.pbtxt, found {len(settings['labels'])}")


def answer(tensors, settings, parameters):
    """{"LABEL", "SCORE": [batch, top_k]}, the verdict first, then the most likely.

    tensors: {"LOGITS": float32 [batch, classes]}. settings: "labels" in the order of the logits; "score", how
    scores are made; "threshold", where one was chosen for one of two labels: {"label", "value"}, its label is the
    verdict where its logit reaches the value, else the other one. parameters: top_k of the request (default 1).
    Raises ValueError where top_k is no number from 1 to the classes.
    """
    logits, labels = tensors["LOGITS"], settings["labels"]
    count = read_count(parameters, "top_k", 1, len(labels), "the model's classes")
    scores = SCORES[settings["score"]](logits.astype(np.float64)).astype(np.float32)
    best = order(logits, labels, settings.get("threshold"))[:, :count]
    return {
        "LABEL": strings([[labels[i] for i in row] for row in best]),
        "SCORE": np.take_along_axis(scores, best, axis=1),
    }


def order(logits, labels, threshold):
    """Classes of each row, the verdict first: int [batch, classes]."""
    if threshold is None:
        return np.argsort(-logits, axis=1, kind="stable")
    chosen = labels.index(threshold["label"])
    positive = logits[:, chosen] >= threshold["value"]
    first = np.where(positive, chosen, 1 - chosen)
    return np.stack([first, 1 - first], axis=1)


def sigmoid(logits):
    """A score of its own for each label: any number of labels may be right."""
    return np.exp(-np.logaddexp(0, -logits))  # without overflow


SCORES = {"softmax": softmax, "sigmoid": sigmoid}
