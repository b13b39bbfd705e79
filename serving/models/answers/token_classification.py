"""LOGITS of every token -> ENTITIES of a token classifier. Pure functions on arrays.

Tokens become words and words entities as in transformers' TokenClassificationPipeline, whose aggregation strategies
have the same names here.
"""

import json

import numpy as np

from . import softmax, strings

PARAMETERS = ("aggregation",)
AGGREGATIONS = ("simple", "first", "max", "average")


def settings_of(card, tokenizer):
    """Labels in the order of the logits, and whether the tokenizer marks the pieces of a word."""
    pieces = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
    return {"labels": card["labels"], "pieces": pieces}


def check_settings(settings, config):
    """Raise ValueError unless there are as many labels as the config has logits."""
    classes = int(config["input"][0]["dims"][-1])
    if len(settings["labels"]) != classes:
        raise ValueError(f"expected {classes} labels as in config.pbtxt, found {len(settings['labels'])}")


def answer(tensors, settings, parameters):
    """{"ENTITIES": [batch, 1]}, a JSON list for each text, in the order of the text: label, score, text, start, end.

    tensors: "LOGITS" float32 [batch, length, classes], "SPANS" int64 [batch, length, 2], "WORDS" int64 [batch, length],
    "TEXT" bytes [batch, 1]. parameters: aggregation, one of AGGREGATIONS (default first): which tokens of a word say
    what it is; simple takes every token for a word. Raises ValueError for another.
    """
    aggregation = parameters.get("aggregation", "first")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}, found {aggregation!r}")
    scores = softmax(tensors["LOGITS"].astype(np.float64))
    texts = [value.decode() for value in tensors["TEXT"].reshape(-1)]
    rows = zip(texts, scores, tensors["SPANS"], tensors["WORDS"], strict=True)
    found = [find_entities(*row, settings, aggregation) for row in rows]
    return {"ENTITIES": strings([[json.dumps(entities, ensure_ascii=False)] for entities in found])}


def find_entities(text, scores, spans, words, settings, aggregation):
    """[{"label", "score", "text", "start", "end"}] of one text; what is no entity is left out."""
    entities = []
    for tokens in group_tokens(text, spans, words, settings["pieces"], aggregation):
        label, score = judge_word(scores[tokens], settings["labels"], aggregation)
        start, end = int(spans[tokens[0], 0]), int(spans[tokens[-1], 1])
        kind = label[2:] if label[:2] in ("B-", "I-") else label
        if entities and entities[-1]["label"] == kind and not label.startswith("B-"):
            entities[-1]["scores"].append(score)
            entities[-1]["end"] = end
        else:
            entities.append({"label": kind, "scores": [score], "start": start, "end": end})
    return [
        {
            "label": entity["label"],
            "score": round(float(np.mean(entity["scores"])), 6),
            "text": text[entity["start"] : entity["end"]],
            "start": entity["start"],
            "end": entity["end"],
        }
        for entity in entities
        if entity["label"] != "O"
    ]


def group_tokens(text, spans, words, pieces, aggregation):
    """[indices of the tokens of a word]; every token alone where the aggregation is simple."""
    groups = []
    for index in np.flatnonzero(words >= 0):
        start = int(spans[index, 0])
        if pieces:
            follows = bool(groups) and words[index] == words[groups[-1][-1]]
        else:  # no mark: a token goes on with a word unless a space is at its start
            follows = start > 0 and " " not in text[start - 1 : start + 1]
        if groups and follows and aggregation != "simple":
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return groups


def judge_word(scores, labels, aggregation):
    """(label, score) of a word from the scores of its tokens, [tokens, classes]."""
    if aggregation == "average":
        row = scores.mean(axis=0)
    else:
        row = scores[scores.max(axis=1).argmax() if aggregation == "max" else 0]
    best = int(row.argmax())
    return labels[best], float(row[best])
