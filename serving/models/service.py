"""A service in one model: texts -> tokens -> the graph -> answers, for all requests that wait, in one call.

It lies in a repository as <service>/1/model.py, beside rows.py, answers/, the functions of its task, settings.json, and
runner.py where it executes the graph itself; else it asks the graph's model. Strings all have one shape, so every
request that waits joins the batch, whatever its length.
"""

import ctypes
import functools
import gc
import importlib
import json
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        """Load settings, tokenizer and graph once."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        tokenizer = folder.resolve().parents[1] / self.settings["tokenizer"]
        sys.path.insert(0, str(tokenizer / "site-packages"))
        # what lies beside this file, and the tokenizer's package: only now can they be found
        load = importlib.import_module("tokenizers").Tokenizer.from_file
        names = ("answers", "rows", "runner", "texts")
        self.common, self.rows, self.runner, self.texts = map(importlib.import_module, names)
        name = self.settings["answers"]
        self.answers = importlib.import_module(f"answers.{name}") if name else None
        path = tokenizer / "tokenizer.json"
        self.tokenizer, self.whole, self.padding = self.rows.open_tokenizers(path, self.settings, load)
        config = json.loads(args["model_config"])
        self.name, self.largest, self.limits = config["name"], config["max_batch_size"], self.texts.read_limits(config)
        self.run = self.ask
        if "graph" in self.settings:
            self.run = self.open_graph(folder)
            for texts in (1, 2 * self.settings["cores"]):  # no request pays for the first run of a session
                self.run(self.tokenizer.encode_batch(["A real text, for the first run of each session."] * texts))
            self.run.warm(self.tokenizer.encode("text"))
            ctypes.CDLL(None).malloc_trim(0)  # what the graph's file took goes back to the system
        gc.freeze()  # what is loaded now stays: no request waits while the collector looks through it

    def open_graph(self, folder):
        """A Runner of the graph in this process."""
        settings = self.settings
        open_engine = importlib.import_module("engines").ENGINES[settings["engine"]]
        path = folder.resolve().parents[1] / settings["graph"]
        open_graph = functools.partial(open_engine, path, settings["output"], settings["precision"])
        try:
            return self.runner.Runner(settings, self.padding, open_graph)
        except Exception as error:  # each engine raises its own
            raise pb_utils.TritonModelException(
                f"{path}: expected a graph that {settings['engine']} loads, found: {error}"
            ) from None

    def execute(self, requests):
        """Answers of all requests; a bad one fails alone."""
        read = [self.read(request) for request in requests]
        self.encode_texts([rows for rows in read if isinstance(rows, list)])
        encodings = [e for rows in read if isinstance(rows, list) for row in rows for e in row["encodings"]]
        try:
            outputs = iter(self.run(encodings) if encodings else [])
        except Exception as error:  # each engine raises its own
            return [failure(f"{self.settings['engine']}: {error}", pb_utils.TritonError.INTERNAL) for _ in requests]
        for rows in read:
            for row in rows if isinstance(rows, list) else ():
                row["outputs"] = [next(outputs) for _ in row["encodings"]]
        return self.respond(requests, read)

    # --- texts -> tokens -----------------------------------------------------------

    def read(self, request):
        """[{"texts"}] of a request's rows, with "encodings" where a row is read in windows; or the words of its error."""
        try:
            if self.answers:
                self.common.check_known(parameters_of(request), self.answers.PARAMETERS)
            columns = {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self.settings["takes"]}
            texts = self.texts.read_texts(columns, self.limits)
            self.check_size(len(texts))
            rows = [{"texts": text if isinstance(text, tuple) else (text,)} for text in texts]
            for row in rows if "overlap" in self.settings else ():
                self.answers.read_parameters(parameters_of(request))
                row["encodings"] = self.answers.encode(self.tokenizer, self.whole, *row["texts"], self.settings)
            return rows
        except ValueError as error:
            return str(error)

    def check_size(self, count):
        """Refuse a request of more texts than the repository allows, in Triton's words: a pass may join more."""
        if count > (allowed := self.settings.get("max_request_texts", count)):
            raise ValueError(f"inference request batch-size must be <= {allowed} for '{self.name}'")

    def encode_texts(self, requests):
        """Tokens of all rows that are one text each, in one call."""
        rows = [row for rows in requests for row in rows if "encodings" not in row]
        encodings = self.texts.encode(self.tokenizer, [row["texts"][0] for row in rows])
        for row, encoding in zip(rows, encodings, strict=True):
            row["encodings"] = [encoding]

    # --- tokens -> the graph's output ----------------------------------------------

    def ask(self, encodings):
        """The output of each encoding, from the graph's model; texts of like length share a request."""
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        found = {}
        for start in range(0, len(order), self.largest):
            batch = order[start : start + self.largest]
            for i, row in zip(batch, self.ask_batch([encodings[i] for i in batch]), strict=True):
                found[i] = row[: len(encodings[i].ids)] if self.settings["per_token"] else row
        return [found[i] for i in range(len(encodings))]

    def ask_batch(self, encodings):
        """float32 [texts, …] of at most as many texts as the graph's model takes."""
        feeds = self.runner.pad(encodings, self.settings["inputs"], self.padding)
        output = self.settings["output"]
        request = pb_utils.InferenceRequest(
            model_name=self.settings["graph_model"],
            requested_output_names=[output],
            inputs=[pb_utils.Tensor(name, values) for name, values in feeds.items()],
        )
        response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, output).as_numpy()

    # --- the output -> answers -----------------------------------------------------

    def respond(self, requests, read):
        """Responses in order; those of like parameters are made at once where a text's answer has one shape."""
        alone = "overlap" in self.settings or self.settings["per_token"] or self.settings.get("also")
        alike, found = {}, {}
        for number, (request, rows) in enumerate(zip(requests, read, strict=True)):
            if isinstance(rows, str):
                found[number] = failure(rows, pb_utils.TritonError.INVALID_ARG)
            else:
                alike.setdefault(number if alone else request.parameters(), []).append(number)
        for numbers in alike.values():
            found |= self.answer(requests, read, numbers)
        return [found[number] for number in range(len(requests))]

    def answer(self, requests, read, numbers):
        """{number: response} of requests with the same parameters."""
        rows = [row for number in numbers for row in read[number]]
        try:
            tensors = self.rows.answer(
                rows, self.settings, self.common, self.answers, parameters_of(requests[numbers[0]])
            )
        except ValueError as error:
            if len(numbers) == 1:
                return {numbers[0]: failure(str(error), pb_utils.TritonError.INVALID_ARG)}
            return {n: response for number in numbers for n, response in self.answer(requests, read, [number]).items()}
        found, start = {}, 0
        for number in numbers:
            own, wanted = slice(start, start + len(read[number])), requests[number].requested_output_names()
            tensors_of = [pb_utils.Tensor(n, values[own]) for n, values in tensors.items() if n in wanted]
            found[number], start = pb_utils.InferenceResponse(tensors_of), own.stop
        return found


def parameters_of(request):
    """What the request set, as a dict."""
    return json.loads(request.parameters() or "{}")


def failure(message, code):
    """Response that carries only an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
