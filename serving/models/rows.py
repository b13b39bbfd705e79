"""What a service does around its graph: texts -> encodings, outputs -> answers. Pure functions; nothing here knows Triton.

A copy lies beside a service's model.py; embed.py calls them without a server. A row is {"texts": strings, "encodings":
one, or one for each window, "outputs": the graph's for each of them}.
"""

import numpy as np


def open_tokenizers(path, settings, load):
    """(tokenizer, the same without truncation where texts are read in windows, how the tokenizer pads).

    Neither pads: whoever makes batches does.
    """
    tokenizer, whole = load(str(path)), None
    padding = tokenizer.padding
    tokenizer.no_padding()
    if "overlap" in settings:
        whole = load(str(path))
        whole.no_padding()
        whole.no_truncation()
        tokenizer.enable_truncation(settings["max_length"], stride=settings["overlap"], strategy="only_second")
    return tokenizer, whole, padding


def answer(rows, settings, common, answers, parameters):
    """{output: array} of the rows of a request; common: the package of answers, answers: the task's module or None.

    Raises ValueError where a row has no answer, or a parameter is none of the task's.
    """
    if "overlap" in settings:
        found = [
            answers.answer(row["texts"][1], row["outputs"], list(map(answers.spans_of, row["encodings"])), parameters)
            for row in rows
        ]
        return answers.tensors_of(found, [row["outputs"] for row in rows], parameters)
    tensors = {settings["output"]: common.stack([row["outputs"][0] for row in rows])}
    if not answers:
        return tensors
    encodings = [row["encodings"][0] for row in rows]
    for name in settings["also"]:
        if name in settings["takes"]:
            tensors[name] = np.array([[row["texts"][0].encode()] for row in rows], dtype=object)
        else:
            tensors[name] = common.stack([common.column(e, name) for e in encodings])
    return tensors | answers.answer(tensors, settings, parameters)
