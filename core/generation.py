"""Tokens one by one: the loop around the graphs of a generating model. The same in the export's check, the service and
the tests, so it needs numpy alone; a service's folder holds a copy of this file.

The loop knows no engine. It gets run(model, feeds) -> {output: values}, where model is "encoder" or "decoder". Only
LOGITS has to be an array: PRESENT and CROSS are handed on as they come, and so may stay where the engine has them.
"""

from collections import namedtuple

import numpy as np

# what a request asks for: seed None takes one of the system's; temperature 0 takes the most likely token
Wish = namedtuple("Wish", "max_new_tokens temperature top_p seed", defaults=(0.0, 1.0, None))


def generate(run, settings, prompts, wishes, take=lambda values, rows: values[rows], gone=lambda row: False):
    """Yield (row, token, reason) for each new token; reason is None, or why the row ends: "stop" or "length".

    prompts: lists of token ids, one a row. wishes: a Wish for each. settings: "cache", the dims [2 × layers, heads,
    head size] of the cache; "pad", a token id; "start", the decoder's first token where there is an encoder, else
    None; "ends", ids after which a row ends; "suppressed", ids that are never chosen; "first", the id that is always
    chosen first, or None. take(values, rows): PRESENT or CROSS of those rows. gone(row): whether nobody waits for it
    any longer. A row that has ended is computed no further.
    """
    rows, lengths = list(range(len(prompts))), [0] * len(prompts)
    dice = [np.random.default_rng(wish.seed) for wish in wishes]
    feeds = first_feeds(run, settings, prompts)
    while rows:
        found = run("decoder", feeds)
        logits = found["LOGITS"].astype(np.float64)
        logits[:, settings["suppressed"]] = -np.inf
        tokens, kept = [], []
        for place, row in enumerate(rows):
            forced = settings["first"] if lengths[row] == 0 else None
            token = choose(logits[place], wishes[row], dice[row]) if forced is None else forced
            lengths[row] += 1
            reason = "length" if lengths[row] == wishes[row].max_new_tokens else None
            reason = "stop" if token in settings["ends"] else reason
            yield row, token, reason
            if reason is None and not gone(row):
                tokens.append([token])
                kept.append(place)
        feeds = next_feeds(feeds, found["PRESENT"], tokens, kept, take)
        rows = [rows[place] for place in kept]


def in_process(sessions):
    """run(model, feeds) as generate takes it, with ONNX Runtime sessions {model: session}."""
    names = {model: [output.name for output in session.get_outputs()] for model, session in sessions.items()}
    return lambda model, feeds: dict(zip(names[model], sessions[model].run(None, feeds), strict=True))


def first_feeds(run, settings, prompts):
    """The decoder's first inputs: the prompts padded on the left, or what the encoder made of them."""
    size = max(map(len, prompts))
    ids = np.full((len(prompts), size), settings["pad"], dtype=np.int64)
    mask = np.zeros_like(ids)
    encodes = settings["start"] is not None
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if encodes else slice(size - len(prompt), size)
        ids[row, place], mask[row, place] = prompt, 1
    layers, heads, head_size = settings["cache"]
    feeds = {"INPUT_IDS": ids, "ATTENTION_MASK": mask}
    if encodes:
        feeds["CROSS"] = run("encoder", dict(feeds))["CROSS"]
        feeds["INPUT_IDS"] = np.full((len(prompts), 1), settings["start"], dtype=np.int64)
    return feeds | {"PAST": np.zeros((len(prompts), layers, heads, 0, head_size), dtype=np.float32)}


def next_feeds(feeds, present, tokens, kept, take):
    """The decoder's inputs for one more token of the rows that go on; kept: their places in this step's batch."""
    mask, whole = feeds["ATTENTION_MASK"], len(kept) == len(feeds["INPUT_IDS"])
    following = {"INPUT_IDS": np.array(tokens, dtype=np.int64).reshape(-1, 1), "ATTENTION_MASK": mask[kept]}
    if "CROSS" in feeds:
        following["CROSS"] = feeds["CROSS"] if whole else take(feeds["CROSS"], kept)
    else:  # the new token is seen too
        following["ATTENTION_MASK"] = np.pad(mask[kept], ((0, 0), (0, 1)), constant_values=1)
    return following | {"PAST": present if whole else take(present, kept)}


def choose(logits, wish, dice):
    """The next token's id: the most likely, or drawn from the fewest likely ones that make up top_p together."""
    if wish.temperature == 0:
        return int(logits.argmax())
    shares = np.exp((logits - logits.max()) / wish.temperature)
    shares /= shares.sum()
    # all tokens below this bound weigh less than 1 - top_p together: the sort need not see them
    likely = np.flatnonzero(shares >= (1 - wish.top_p) / len(shares))
    likely = likely[np.argsort(-shares[likely], kind="stable")]
    sums = shares[likely].cumsum()
    sums = sums[: int(np.searchsorted(sums, wish.top_p)) + 1]
    drawn = int(np.searchsorted(sums, dice.random() * sums[-1], side="right"))
    return int(likely[min(drawn, len(sums) - 1)])
