"""Last step of a service as a Triton model: a graph's tensors -> an answer.

It lies in a repository as postprocess/1/model.py, beside answers/, the functions of its task, and settings.json,
what they need of the record. A tensor that came in may be asked for too: it is handed on as it is, since an
ensemble's tensor cannot be both an intermediate one and an output.
"""

import importlib
import json
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        """Read the settings once and hold them against the config."""
        path = Path(args["model_repository"]) / args["model_version"] / "settings.json"
        self.settings = json.loads(path.read_text(encoding="utf-8"))
        # beside this file, which only Triton has put on the path
        self.common = importlib.import_module("answers")
        self.answers = importlib.import_module(f"answers.{self.settings['answers']}")
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        try:
            self.answers.check_settings(self.settings, config)
        except ValueError as error:
            raise pb_utils.TritonModelException(f"{path}: {error}; run torch2onnx.py") from None

    def execute(self, requests):
        """One answer per request; each has its own parameters, so each is answered alone."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """Response with the outputs that are asked for, or only an error."""
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        parameters = json.loads(request.parameters() or "{}")
        try:
            self.common.check_known(parameters, self.answers.PARAMETERS)
            found = self.answers.answer(tensors, self.settings, parameters)
        except ValueError as error:
            error = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        wanted = request.requested_output_names()
        found = {name: values for name, values in (tensors | found).items() if name in wanted}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in found.items()])
