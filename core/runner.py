"""Encodings -> a graph's output for each, on a CPU: batches without padding, one core for each or all for a lone text.

Nothing here knows Triton; a copy lies in a service's folder beside model.py.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BUDGET = 256  # tokens of a batch: fewer leave a core idle between batches, more cost in the attention of packed texts
ONE_BATCH = 160  # tokens, padding too, up to which one batch on all cores is faster than one on each (measured on two)
FIELDS = {"INPUT_IDS": "ids", "ATTENTION_MASK": "attention_mask", "TOKEN_TYPE_IDS": "type_ids"}


def packed_batches(lengths, cores, budget=BUDGET):
    """Lists of indices: one of few tokens, or as many as the cores or a multiple of that, alike in tokens."""
    if len(lengths) < 2 or sum(lengths) <= ONE_BATCH:
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
    if len(order) < 2 or len(order) * lengths[order[-1]] <= ONE_BATCH:
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


def few_sizes(tokens):
    """The next of few sizes: for one that it has not seen OpenVINO compiles its kernels anew, in each stream."""
    step = 8 if tokens <= BUDGET // 2 else 16 if tokens <= BUDGET else 64
    return -(-tokens // step) * step


def pack(encodings, inputs, offset, size_of=int):
    """{input: int64 [tokens], STARTS: [texts]} of texts one behind the other.

    size_of: tokens -> as many or more; what it adds is a text of its own behind the others, of tokens 0.
    """
    lengths = [len(encoding.ids) for encoding in encodings]
    total = sum(lengths)
    feeds = {name: np.zeros(size_of(total), np.int64) for name in inputs}
    feeds["POSITIONS"][total:], feeds["SEGMENTS"][total:] = offset, len(lengths)
    feeds["STARTS"] = np.cumsum([0, *lengths[:-1]])
    for number, (start, encoding) in enumerate(zip(feeds["STARTS"], encodings, strict=True)):
        own = slice(start, start + len(encoding.ids))
        feeds["SEGMENTS"][own], feeds["POSITIONS"][own] = number, np.arange(offset, offset + len(encoding.ids))
        for name in FIELDS.keys() & feeds.keys():
            feeds[name][own] = getattr(encoding, FIELDS[name])
    return feeds


def pad(encodings, inputs, padding, size_of=int):
    """{input: int64 [texts, longest]}, padded as the tokenizer pads; padding: the tokenizer's own settings."""
    fillings = {"INPUT_IDS": padding["pad_id"], "TOKEN_TYPE_IDS": padding["pad_type_id"]}
    longest, left = size_of(max(len(encoding.ids) for encoding in encodings)), padding["direction"] == "left"
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
        """settings: "inputs" of the graph; "position_offset" where it takes packed texts, else None; "max_length" of a
        text; "per_token"; "engine"; "cores".

        padding: the tokenizer's settings. open_graph([(threads, streams), …]) -> for each a function from feeds to the
        output, that as many threads as there are streams may call at once.
        """
        self.inputs, self.per_token, self.padding = settings["inputs"], settings["per_token"], padding
        self.offset, self.cores = settings["position_offset"], settings["cores"]
        self.few, self.max_length = settings["engine"] == "openvino", settings["max_length"]
        self.pool = ThreadPoolExecutor(self.cores)
        opened = open_graph(list(dict.fromkeys([(self.cores, 1), (1, self.cores)])))
        self.wide, self.narrow = opened[0], opened[-1]

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
        batches = [[lengths[i] for i in batch] for batch in self.batches(lengths) if batch]
        if self.offset is not None:
            return sum(self.size(sum(batch)) for batch in batches)
        return sum(len(batch) * self.size(max(batch)) for batch in batches)

    def size(self, tokens):
        """How many tokens are computed for those of a batch, or of a row where it is padded."""
        if not self.few:
            return tokens
        return few_sizes(tokens) if self.offset is not None else max(tokens, min(few_sizes(tokens), self.max_length))

    def warm(self, encoding):
        """Run the few sizes in the sessions that get them, with one short text: no request then waits for kernels."""
        for size in sorted(set(map(few_sizes, range(1, BUDGET)))) if self.few and self.offset is not None else ():
            feeds = pack([encoding], self.inputs, self.offset, functools.partial(max, size))
            if size <= ONE_BATCH:
                self.wide(feeds)
            if size >= ONE_BATCH / self.cores:
                list(self.pool.map(self.narrow, [feeds] * (2 * self.cores)))

    def run(self, session, encodings):
        """The rows of one batch."""
        lengths = [len(encoding.ids) for encoding in encodings]
        if self.offset is not None:
            output = session(pack(encodings, self.inputs, self.offset, self.size))
            return np.split(output, np.cumsum(lengths))[:-1] if self.per_token else output
        output = session(pad(encodings, self.inputs, self.padding, self.size))
        if not self.per_token:
            return output
        left = self.padding["direction"] == "left"
        return [row[len(row) - n :] if left else row[:n] for row, n in zip(output, lengths, strict=True)]
