"""A service that reads long texts in windows, as one Triton model: it asks the graph's model itself.

It lies in a repository as <service>/1/model.py, beside answers/, the functions of its task, and settings.json. The
tokenizer is that of the tokenizer's model beside it. All windows of all waiting requests go to the graph together, those
of like length in one request.
"""

import asyncio
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FIELDS = {"INPUT_IDS": "ids", "ATTENTION_MASK": "attention_mask", "TOKEN_TYPE_IDS": "type_ids"}
INPUTS = ("QUESTION", "CONTEXT")


class TritonPythonModel:
    def initialize(self, args):
        """Load settings and tokenizer once."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        own = folder.resolve().parents[1] / "tokenizer"
        sys.path.insert(0, str(own / "site-packages"))
        # beside this file, and the tokenizer's package: only now can they be found
        self.common = importlib.import_module("answers")
        self.answers = importlib.import_module(f"answers.{self.settings['answers']}")
        load = importlib.import_module("tokenizers").Tokenizer.from_file
        self.tokenizer, self.whole = (load(str(own / "tokenizer.json")) for _ in range(2))
        self.whole.no_truncation()
        self.padding = self.tokenizer.padding
        self.tokenizer.no_padding()  # windows are padded to the longest of their batch
        length, overlap = self.settings["max_length"], self.settings["overlap"]
        self.tokenizer.enable_truncation(length, stride=overlap, strategy="only_second")
        self.largest = json.loads(args["model_config"])["max_batch_size"]

    async def execute(self, requests):
        """Answers of all requests; a bad one fails alone."""
        read = [self.read(request) for request in requests]
        windows = [window for rows in read if isinstance(rows, list) for _, found in rows for window in found]
        try:
            logits = iter(await self.ask(windows))
        except pb_utils.TritonModelException as error:
            return [failure(str(error), pb_utils.TritonError.INTERNAL) for _ in requests]
        return [self.respond(request, rows, logits) for request, rows in zip(requests, read, strict=True)]

    def read(self, request):
        """[(context, windows)] of a request's rows, or the words of its error."""
        try:
            self.common.check_known(parameters_of(request), self.answers.PARAMETERS)
            self.answers.read_parameters(parameters_of(request))
            pairs = zip(*(texts_of(request, name) for name in INPUTS), strict=True)
            return [(context, self.windows(question, context)) for question, context in pairs]
        except ValueError as error:
            return str(error)

    def windows(self, question, context):
        """Encodings of a question and its context."""
        return self.answers.encode(self.tokenizer, self.whole, question, context, self.settings)

    async def ask(self, windows):
        """float32 [length, 2] of each window, from the graph's model."""
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
        batches = [order[i : i + self.largest] for i in range(0, len(order), self.largest)]
        answers = await asyncio.gather(*(self.ask_batch([windows[i] for i in batch]) for batch in batches))
        rows = dict(zip(order, (row for batch in answers for row in batch), strict=True))
        return [rows[i][: len(windows[i].ids)] for i in range(len(windows))]

    async def ask_batch(self, windows):
        """float32 [windows, length, 2] of at most as many windows as the graph takes."""
        inputs = [pb_utils.Tensor(name, self.pad(windows, name)) for name in self.settings["inputs"]]
        request = pb_utils.InferenceRequest(
            model_name=self.settings["graph"], requested_output_names=["LOGITS"], inputs=inputs
        )
        response = await request.async_exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "LOGITS").as_numpy()

    def pad(self, windows, name):
        """int64 [windows, length] of one input, padded as the tokenizer pads."""
        filling = {"INPUT_IDS": self.padding["pad_id"], "TOKEN_TYPE_IDS": self.padding["pad_type_id"]}.get(name, 0)
        padded = np.full((len(windows), max(len(w.ids) for w in windows)), filling, dtype=np.int64)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window.ids)] = getattr(window, FIELDS[name])
        return padded

    def respond(self, request, rows, logits):
        """Response of a request; logits: an iterator over the windows' logits, of which its own come next."""
        if isinstance(rows, str):
            return failure(rows, pb_utils.TritonError.INVALID_ARG)
        parameters, found, own = parameters_of(request), [], []
        for context, windows in rows:
            own.append([next(logits) for _ in windows])
            spans = [self.answers.spans_of(window) for window in windows]
            found.append(self.answers.answer(context, own[-1], spans, parameters))
        tensors = self.answers.tensors_of(found, own, parameters)
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, values) for n, values in tensors.items() if n in wanted])


def parameters_of(request):
    """What the request set, as a dict."""
    return json.loads(request.parameters() or "{}")


def texts_of(request, name):
    """Strings of one input, bytes [batch, 1]. Raises ValueError if one is not UTF-8."""
    values = pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
    try:
        return [value.decode("utf-8") for value in values]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, found {error}; encode it as UTF-8") from None


def failure(message, code):
    """Response that carries only an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
