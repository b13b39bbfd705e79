"""LOGITS of every token -> ANSWER, SCORE, START, END in a context. Pure functions on arrays.

A context that is longer than the model is read in windows that overlap. A span's value is its start logit plus its end
logit less those of the window's first token, which stands for "no answer": so spans of different windows compare, which
each window's own softmax would not let them (Devlin et al. 2018, arXiv:1810.04805, section 4.3, for one window).
"""

import numpy as np

from . import read_count, strings

PARAMETERS = ("top_k", "max_answer_tokens", "no_answer", "logits")
MAX_TOP_K = 20
MAX_ANSWER_TOKENS = 30
MAX_WINDOWS = 128
NO_LOGIT = np.finfo(np.float32).min  # where a window is shorter than the longest


def settings_of(card, tokenizer):
    """The model's length, and by how many tokens two windows overlap."""
    overlap = min(128, card["max_length"] // 4)
    return {"max_length": card["max_length"], "overlap": overlap}


def check_settings(settings, config):
    """Nothing of the config has to agree."""


def read_parameters(parameters):
    """(top_k, max_answer_tokens, no_answer). Raises ValueError."""
    no_answer = parameters.get("no_answer", True)
    for name in ("no_answer", "logits"):
        if not isinstance(value := parameters.get(name, True), bool):
            raise ValueError(f"{name}: expected true or false, found {value!r}")
    top_k = read_count(parameters, "top_k", 1, MAX_TOP_K, "answers of a question")
    longest = read_count(parameters, "max_answer_tokens", MAX_ANSWER_TOKENS, 512, "tokens of an answer")
    return top_k, longest, no_answer


def encode(tokenizer, whole, question, context, settings):
    """Windows of a question and its context, as encodings. Raises ValueError where they cannot be read.

    tokenizer: without padding, truncating the second text alone, with the settings' overlap; whole: the same one without
    truncation.
    """
    room = settings["max_length"] - 2 * settings["overlap"] - tokenizer.num_special_tokens_to_add(True)
    tokens = len(whole.encode(question, add_special_tokens=False).ids)
    if not (tokens and question.strip()):  # of characters that nobody sees a tokenizer may make no token
        raise ValueError("QUESTION: expected text, found none")
    if tokens > room:
        raise ValueError(f"QUESTION: expected at most {room} tokens, which leave room for the context; found {tokens}")
    first = tokenizer.encode(question, context)
    if not (1 in first.sequence_ids and context.strip()):
        raise ValueError("CONTEXT: expected text, found none")
    windows = [first, *first.overflowing]
    if len(windows) > MAX_WINDOWS:
        raise ValueError(f"CONTEXT: expected at most {MAX_WINDOWS} windows of the model's length, found {len(windows)}")
    return windows


def spans_of(encoding):
    """int64 [length, 2]: the characters of the context that a token stands for, -1 for other tokens."""
    inside = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return np.array([offsets if sequence == 1 else (-1, -1) for offsets, sequence in inside], dtype=np.int64)


def answer(context, logits, spans, parameters):
    """The best answers of one question: {"ANSWER", "SCORE", "START", "END": [top_k]}, lists.

    logits: a float32 [length, 2] of each window; spans: its int64 [length, 2]. START and END count characters of the
    context; "no answer" is the empty ANSWER, with START and END -1. SCORE is a softmax over all spans of all windows
    and "no answer". parameters: top_k, most answers (default 1), which do not overlap; max_answer_tokens (default 30);
    no_answer false: name a span although "no answer" is likelier.
    """
    top_k, longest, no_answer = read_parameters(parameters)
    places, values = best_of_windows(logits, spans, longest)
    total = np.logaddexp.reduce([0.0, *values])  # the value of "no answer" is 0
    chosen = []
    for (start, end), value in zip(places.tolist(), values.tolist(), strict=True):
        if len(chosen) == top_k or (no_answer and value < 0):
            break
        if all(end <= other["start"] or start >= other["end"] for other in chosen):
            chosen.append({"start": start, "end": end, "value": value})
    chosen = chosen or [{"start": -1, "end": -1, "value": 0.0}]
    return {
        "ANSWER": [context[found["start"] : found["end"]] if found["start"] >= 0 else "" for found in chosen],
        "SCORE": [float(np.exp(found["value"] - total)) for found in chosen],
        "START": [found["start"] for found in chosen],
        "END": [found["end"] for found in chosen],
    }


def best_of_windows(logits, spans, longest):
    """(int64 [spans, 2] first character and the one behind the last, float64 [spans] value), the best first.

    A span that several windows have counts once, with its best value.
    """
    found = [
        window_spans(window.astype(np.float64), places, longest) for window, places in zip(logits, spans, strict=True)
    ]
    places, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-values, kind="stable")
    places, values = places[order], values[order]
    _, first = np.unique(places, axis=0, return_index=True)
    first.sort()
    return places[first], values[first]


def window_spans(logits, spans, longest):
    """(characters int64 [spans, 2], values float64 [spans]) of every span of a window that may be an answer."""
    starts, ends = logits.T
    inside = np.flatnonzero(spans[:, 0] >= 0)
    first, last = np.repeat(inside, longest), (inside[:, None] + np.arange(longest)).reshape(-1)
    real = np.isin(last, inside)
    first, last = first[real], last[real]
    places = np.stack([spans[first, 0], spans[last, 1]], axis=1)
    return places, starts[first] + ends[last] - starts[0] - ends[0]


def tensors_of(found, logits, parameters):
    """Answers of the rows of a request -> its tensors; a row with fewer answers is filled with empty ones.

    logits: of each row its windows' float32 [length, 2], for the parameter logits: START_LOGITS and END_LOGITS
    [rows, windows, length], filled with the least float32.
    """
    width = max(len(row["ANSWER"]) for row in found)

    def rows(name, filling, kind):
        return np.array([[*row[name], *[filling] * (width - len(row[name]))] for row in found], dtype=kind)

    tensors = {"SCORE": rows("SCORE", 0, np.float32), "START": rows("START", -1, np.int64)}
    tensors |= {"END": rows("END", -1, np.int64)}
    tensors["ANSWER"] = strings([[*row["ANSWER"], *[""] * (width - len(row["ANSWER"]))] for row in found])
    if parameters.get("logits") is True:
        shape = (len(logits), max(map(len, logits)), max(len(w) for row in logits for w in row), 2)
        filled = np.full(shape, NO_LOGIT, dtype=np.float32)
        for i, windows in enumerate(logits):
            for j, window in enumerate(windows):
                filled[i, j, : len(window)] = window
        tensors |= {"START_LOGITS": filled[..., 0], "END_LOGITS": filled[..., 1]}
    return tensors
