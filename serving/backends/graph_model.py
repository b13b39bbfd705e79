"""What the Python-based backends share: requests -> one run of a graph -> responses.

serve.sh puts a copy beside each of them. A backend says how its file is opened; names, types and shapes come from the
model's config.
"""

import json
import re
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

TOKENS = ("INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS")


class GraphModel:
    """A backend sets `title`, `file`, and `outside`, the words of its engine for an id outside the vocabulary.

    `requirements`: the file that names its package.
    """

    outside = "out of data bounds"
    requirements = "requirements.txt"

    def open(self, path, config, settings):
        """A function from {input: array} to the outputs in the config's order; settings: the config's parameters."""
        raise NotImplementedError

    def find_file(self, config):
        """Name of the graph's file."""
        return config.get("default_model_filename") or self.file

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Leave the config as it is written: configs are complete."""
        return auto_complete_model_config

    def initialize(self, args):
        """Load the graph once."""
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.output_types = [pb_utils.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]]
        self.batches = config["max_batch_size"] > 0
        path = Path(args["model_repository"]) / args["model_version"] / self.find_file(config)
        settings = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        if not path.is_file():
            raise pb_utils.TritonModelException(
                f"{path}: expected a graph for {self.title}, found none; export it there"
            )
        try:
            self.compute = self.open(path, config, settings)
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{self.title}: expected its package, found none: {error}; pip install -r {self.requirements}"
            ) from None
        except Exception as error:  # the engines' exceptions share no other base
            found = re.sub(r"Exception from \S+:\s+", "", str(error))  # OpenVINO's source files
            raise pb_utils.TritonModelException(
                f"{path}: expected a graph that {self.title} loads, found: {found}; export it again, or name its backend"
            ) from None

    def execute(self, requests):
        """One run for all requests, answers split again along the batch axis; a bad one fails alone."""
        errors = [self.find_error(request) for request in requests]
        good = [request for request, error in zip(requests, errors, strict=True) if not error]
        together = [good] if self.batches and good else [[request] for request in good]
        answers = (answer for part in together for answer in self.run(part))
        return [failure(error, pb_utils.TritonError.INVALID_ARG) if error else next(answers) for error in errors]

    def find_error(self, request):
        """What is wrong with a request's tokens, in words; "" where nothing is. ONNX Runtime reads an id of -1 as the last."""
        tokens = {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self.inputs if n in TOKENS}
        if "PAST" not in self.inputs and len({values.shape for values in tokens.values()}) > 1:
            shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in tokens.items())
            return f"expected tensors of one shape, found {shapes}"
        for name, values in tokens.items():
            if values.size and values.min() < 0:
                return f"{name}: expected numbers from 0 on, found {values.min()}"
        mask = tokens.get("ATTENTION_MASK")
        if mask is not None and mask.size and (mask.max() > 1 or not mask.any(axis=-1).all()):
            return f"ATTENTION_MASK: expected 0 and 1, and a 1 in each row, found {mask.max()} as the largest"
        return ""

    def run(self, requests):
        """Responses to requests that are executed as one batch."""
        feeds = {}
        for name in self.inputs:
            parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        sizes = [len(pb_utils.get_input_tensor_by_name(request, self.inputs[0]).as_numpy()) for request in requests]
        try:
            results = self.compute(feeds)
        except Exception as error:  # as above
            if len(requests) > 1:  # one bad request must not fail its neighbours
                return [self.run([request])[0] for request in requests]
            if self.outside in str(error):
                words = "INPUT_IDS: expected ids of the vocabulary, and no more of them than the model has positions"
                return [failure(f"{words}; found others", pb_utils.TritonError.INVALID_ARG)]
            return [failure(f"{self.title}: {error}", pb_utils.TritonError.INTERNAL)]
        results = [result.astype(kind, copy=False) for result, kind in zip(results, self.output_types, strict=True)]
        if len(requests) == 1:
            return [self.response(results)]
        stops = np.cumsum(sizes)
        return [
            self.response([r[stop - size : stop] for r in results]) for size, stop in zip(sizes, stops, strict=True)
        ]

    def response(self, arrays):
        """Arrays in the order of the config's outputs -> response."""
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, a) for n, a in zip(self.outputs, arrays, strict=True)])


def failure(message, code):
    """Response that carries only an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
