"""A service's answers to many texts at once: in this process, as the service itself makes them, or from its server.

Both are functions of rows, each a tuple of strings, that return (answers, tokens, positions): of each row {output: value}
or the words of its error; the tokens of all, and as many positions as are computed for them, padding included. A
server keeps both numbers to itself.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor

from core.repository import tokenizer_path
from core.runner import Runner
from core.tables import BYTES_PER_TOKEN
from core.tokens import load_tokenizer
from serving.models import answers as common
from serving.models import rows as service_rows
from serving.one_pass import opener
from serving.repository import TOKENIZER_CODE, answers_settings, service_settings
from serving.server import infer, text_tensor
from tasks.examples import answers_of
from tasks.table import TASKS

TRIES = 12  # half a minute: a server that is started anew is waited for
UNDER_WAY = 4  # requests of one worker: the server computes one while the next are on their way
OUTPUT_VALUES = 1 << 23  # of a graph in memory at a time: a masked language model has one for each of its tokens
BAD_REQUEST = "StatusCode.INVALID_ARGUMENT"


def outputs_of(card):
    """{output: (Triton's type, dims of a row)} of an answer; logits that a request has to ask for are left out."""
    task = TASKS[card["task"]]
    handed_on = {task.output: ("FP32", card["outputs"][task.output])} if task.hands_on else {}
    return {name: given for name, given in (task.results | handed_on).items() if not name.endswith("_LOGITS")}


def split_errors(ask, rows):
    """[{output: value}, or the words of its error] of rows; ask(rows) -> {output: array}, or raises ValueError.

    Where that fails the halves are asked again, so that a bad row fails alone.
    """
    try:
        arrays = ask(rows) if rows else {}
    except ValueError as error:
        if len(rows) == 1:
            return [" ".join(str(error).split())]
        middle = len(rows) // 2
        return split_errors(ask, rows[:middle]) + split_errors(ask, rows[middle:])
    return [{name: array[i] for name, array in arrays.items()} for i in range(len(rows))]


# --- in this process ----------------------------------------------------------------------


def load_texts():
    """The module that reads a request's strings; it lies in the task's own repository."""
    spec = importlib.util.spec_from_file_location("texts", TOKENIZER_CODE / "texts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_in_process(repository, card, settings):
    """Open tokenizer and graph; settings: what serving.one_pass chose, and "cores"."""
    os.environ["RAYON_NUM_THREADS"] = str(settings["cores"])  # of the tokenizer
    path, texts, answers = tokenizer_path(repository), load_texts(), answers_of(card["task"])
    settings = service_settings(card, settings) | answers_settings(card, load_tokenizer(path))
    tokenizer, whole, padding = service_rows.open_tokenizers(path, settings, load_tokenizer)
    run = Runner(settings, padding, opener(settings, settings["output"]))
    largest = BYTES_PER_TOKEN * card["max_length"]
    at_once = max(1, OUTPUT_VALUES // max(card["outputs"][settings["output"]]))

    def read(strings):
        """{"texts"}, with "encodings" where they are windows, or {"error"}."""
        try:
            for name, text in zip(settings["takes"], strings, strict=True):
                if (size := len(text.encode())) > largest:
                    raise ValueError(f"{name}: expected at most {largest} bytes, found {size}; cut the text")
            windows = answers.encode(tokenizer, whole, *strings, settings) if "overlap" in settings else None
            return {"texts": strings} | ({"encodings": windows} if windows else {})
        except ValueError as error:
            return {"error": str(error)}

    def answer(rows):
        parts = [answer_some(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
        answers, tokens, positions = zip(*parts, strict=True) if parts else ((), (), ())
        return [each for part in answers for each in part], sum(tokens), sum(positions)

    def answer_some(rows):
        rows = [read(strings) for strings in rows]
        good = [row for row in rows if "error" not in row]
        single = [row for row in good if "encodings" not in row]
        encodings = texts.encode(tokenizer, [row["texts"][0] for row in single]) if single else []
        for row, encoding in zip(single, encodings, strict=True):
            row["encodings"] = [encoding]
        encodings = [encoding for row in good for encoding in row["encodings"]]
        outputs = iter(run(encodings) if encodings else [])
        for row in good:
            row["outputs"] = [next(outputs) for _ in row["encodings"]]
        found = iter(split_errors(lambda some: service_rows.answer(some, settings, common, answers, {}), good))
        lengths = [len(encoding.ids) for encoding in encodings]
        return [row.get("error") or next(found) for row in rows], sum(lengths), run.positions(lengths)

    return answer


# --- from a server ------------------------------------------------------------------------


def open_served(card, url, timeout_s):
    """Ask a running service, over gRPC, in requests of as many texts as it takes; those of like length go together."""
    from tritonclient.utils import InferenceServerException

    name, size = card["service"]["name"], card["service"]["max_batch_size"]
    takes, outputs = TASKS[card["task"]].takes, list(outputs_of(card))
    pool = ThreadPoolExecutor(UNDER_WAY)

    def ask(rows):
        given = text_tensor([row if len(takes) > 1 else row[0] for row in rows], takes)
        try:
            return infer(name, given, outputs, url, "grpc", timeout_s=timeout_s, tries=TRIES, late=True)
        except InferenceServerException as error:
            if error.status() == BAD_REQUEST:
                raise ValueError(error.message()) from None
            raise

    def answer(rows):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][-1]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found = pool.map(lambda batch: split_errors(ask, [rows[i] for i in batch]), batches)
        answers = dict(zip(order, (row for batch in found for row in batch), strict=True))
        return [answers[i] for i in range(len(rows))], 0, 0

    return answer
