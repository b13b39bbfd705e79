"""Encodings -> a graph's output for each, on a CPU: batches without padding, one core for each or all for a lone text.

Nothing here knows Triton; a copy lies in a service's folder beside model.py.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

BUDGET = 256  # tokens of a batch: fewer leave a core idle between batches, more cost in the attention of packed texts
FIELDS = {"INPUT_IDS": "ids", "ATTENTION_MASK": "attention_mask", "TOKEN_TYPE_IDS": "type_ids"}


def packed_batches(lengths, cores, budget=BUDGET):
    """Lists of indices, as many as the cores or a multiple of that, alike in tokens; a lone text is one batch."""
    if len(lengths) < 2:
        return [list(range(len(lengths)))]
    rounds = -(-sum(lengths) // (budget * cores))
    batches = [[] for _ in range(min(len(lengths), cores * rounds))]
    loads = [0] * len(batches)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first, to the lightest batch
        lightest = loads.index(min(loads))
        batches[lightest].append(index)
        loads[lightest] += lengths[index]
    return batches


def padded_batches(lengths, cores, budget=BUDGET):
    """Lists of indices of texts of like length: rows times the longest stays within the budget."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if len(order) < 2:
        return [order]
    share = min(budget, -(-sum(lengths) // cores))
    batches = [[]]
    for index in order:  # the next one is the longest so far
        if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > max(share, lengths[index]):
            batches.append([])
        batches[-1].append(index)
    return batches


def packed_inputs(inputs):
    """Names of a packed graph's inputs: those of the padded one, but for the mask, and what tells the texts apart."""
    return [*(name for name in inputs if name != "ATTENTION_MASK"), "POSITIONS", "SEGMENTS", "STARTS"]


def pack(encodings, inputs, offset):
    """{input: int64 [tokens], STARTS: [texts]} of texts one behind the other."""
    lengths = [len(encoding.ids) for encoding in encodings]
    made = {
        "POSITIONS": np.concatenate([np.arange(offset, offset + length) for length in lengths]),
        "SEGMENTS": np.repeat(np.arange(len(lengths)), lengths),
        "STARTS": np.cumsum([0, *lengths[:-1]]),
    }
    own = {name: np.concatenate([getattr(e, FIELDS[name]) for e in encodings]) for name in inputs if name in FIELDS}
    return {name: (made | own)[name].astype(np.int64) for name in inputs}


def pad(encodings, inputs, padding):
    """{input: int64 [texts, longest]}, padded as the tokenizer pads; padding: the tokenizer's own settings."""
    fillings = {"INPUT_IDS": padding["pad_id"], "TOKEN_TYPE_IDS": padding["pad_type_id"]}
    longest, left = max(len(encoding.ids) for encoding in encodings), padding["direction"] == "left"
    feeds = {}
    for name in inputs:
        feeds[name] = np.full((len(encodings), longest), fillings.get(name, 0), dtype=np.int64)
        for row, encoding in zip(feeds[name], encodings, strict=True):
            values = getattr(encoding, FIELDS[name])
            row[longest - len(values) if left else 0 :][: len(values)] = values
    return feeds


class Runner:
    """The sessions of a graph: one that has all cores, and one that several threads use, each with a core of its own."""

    def __init__(self, settings, padding, open_graph):
        """settings: "inputs" of the graph; "position_offset" where it takes packed texts, else None; "per_token"; "cores".

        padding: the tokenizer's settings. open_graph(threads, streams) -> a function from feeds to the output, that as
        many threads as there are streams may call at once.
        """
        self.inputs, self.per_token, self.padding = settings["inputs"], settings["per_token"], padding
        self.offset, self.cores = settings["position_offset"], settings["cores"]
        self.pool = ThreadPoolExecutor(self.cores)
        # both at once: a start waits for them
        narrow = self.pool.submit(open_graph, 1, self.cores) if self.cores > 1 else None
        self.wide = open_graph(self.cores, 1)
        self.narrow = narrow.result() if narrow else self.wide

    def __call__(self, encodings):
        """The output of each encoding: float32 [length, …] where it has a row per token, else [...]."""
        batches = self.batches([len(encoding.ids) for encoding in encodings])
        if len(batches) == 1:
            found = [self.run(self.wide, [encodings[i] for i in batches[0]])]
        else:
            found = self.pool.map(lambda batch: self.run(self.narrow, [encodings[i] for i in batch]), batches)
        rows = dict(zip((i for batch in batches for i in batch), (row for b in found for row in b), strict=True))
        return [rows[i] for i in range(len(encodings))]

    def batches(self, lengths):
        """Lists of indices of the texts that are computed together."""
        return (padded_batches if self.offset is None else packed_batches)(lengths, self.cores)

    def positions(self, lengths):
        """Tokens that are computed for texts of these lengths, padding included."""
        if self.offset is not None:
            return sum(lengths)
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in self.batches(lengths) if batch)

    def run(self, session, encodings):
        """The rows of one batch."""
        lengths = [len(encoding.ids) for encoding in encodings]
        if self.offset is not None:
            output = session(pack(encodings, self.inputs, self.offset))
            return np.split(output, np.cumsum(lengths)[:-1]) if self.per_token else output
        output = session(pad(encodings, self.inputs, self.padding))
        if not self.per_token:
            return output
        left = self.padding["direction"] == "left"
        return [row[len(row) - n :] if left else row[:n] for row, n in zip(output, lengths, strict=True)]
