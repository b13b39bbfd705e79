"""A stand-in for Triton's DALI backend: a Python-based backend that runs a serialized pipeline with the DALI package.

Serves `backend: "dali"` where Triton has no compiled DALI backend. Reads <model>/<version>/model.dali and the parameter
num_threads. A pipeline that needs a GPU is refused, and so is one that was not serialized (dali.py), which the compiled
backend takes. Packages: build/dali/packages, which serve.sh links beside this file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

INSTALL = "pip install --no-deps --target build/dali/packages -r examples/dali/requirements.txt"
TYPES = {"UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64", "FLOAT16": "FP16", "FLOAT": "FP32", "FLOAT64": "FP64"}


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Leave the config as it is written: configs are complete."""
        return auto_complete_model_config

    def initialize(self, args):
        """Load the pipeline and hold it against the config."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.path = folder / args["model_version"] / (config.get("default_model_filename") or "model.dali")
        threads = config.get("parameters", {}).get("num_threads", {}).get("string_value", "1")
        self.settings = {"batch_size": config["max_batch_size"], "num_threads": int(threads), "device_id": None}
        try:
            if config["max_batch_size"] < 1:
                raise ValueError(f"max_batch_size: expected at least 1, found {config['max_batch_size']}")
            self.pipeline = open_pipeline(self.path, self.settings)
            check_config(self.pipeline, config, self.path)
        except ValueError as error:
            raise pb_utils.TritonModelException(f"{folder.name}: {error}") from None

    def execute(self, requests):
        """One run for all requests; where that fails, each alone, so that a bad image fails no other request."""
        try:
            return self.run(requests)
        except RuntimeError as error:  # the pipeline is of no use after that
            self.pipeline = open_pipeline(self.path, self.settings)
            if len(requests) > 1:
                return [self.execute([request])[0] for request in requests]
            message = f"expected what the pipeline reads, found: {reason(error)}"
            code = pb_utils.TritonError.INVALID_ARG
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))]

    def run(self, requests):
        """A response for each request; RuntimeError where the pipeline fails, or an output has several shapes."""
        for name in self.inputs:
            parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            self.pipeline.feed_input(name, [row for part in parts for row in part])
        sizes = [len(part) for part in parts]
        outputs = [[np.array(output.at(row)) for row in range(sum(sizes))] for output in self.pipeline.run()]
        stops = np.cumsum(sizes)
        responses = []
        for size, stop in zip(sizes, stops, strict=True):
            rows = [output[stop - size : stop] for output in outputs]
            if any(len({row.shape for row in of_output}) > 1 for of_output in rows):
                raise RuntimeError("images of several sizes in one request")
            tensors = [pb_utils.Tensor(name, np.stack(r)) for name, r in zip(self.outputs, rows, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def open_pipeline(path, settings):
    """The pipeline of a file, built; ValueError in one line where there is none that runs on a CPU."""
    packages = str(Path(__file__).with_name("packages"))
    if packages not in sys.path:
        sys.path.insert(0, packages)  # first: another package may have a folder nvidia too
    try:
        from nvidia import dali
    except ImportError as error:
        raise ValueError(f"expected the package nvidia-dali-cuda120, found none ({error}); {INSTALL}") from None
    if not path.is_file():
        raise ValueError(f"{path}: expected a serialized pipeline, found no file")
    try:
        pipeline = dali.Pipeline.deserialize(path.read_bytes(), **settings)
        pipeline.build()
    except RuntimeError as error:
        raise ValueError(f"{path}: expected a pipeline for a CPU, found another file: {reason(error)}") from None
    return pipeline


def check_config(pipeline, config, path):
    """ValueError where inputs or outputs of the config are not the pipeline's."""
    for tensor in config["input"]:
        try:
            pipeline.input_feed_count(tensor["name"])
        except RuntimeError:
            raise ValueError(f"{path}: expected an input {tensor['name']} as in config.pbtxt, found none") from None
    if pipeline.num_outputs != len(config["output"]):
        raise ValueError(
            f"{path}: expected {len(config['output'])} outputs as in config.pbtxt, found {pipeline.num_outputs}"
        )
    declared = zip(config["output"], pipeline.output_dtype(), pipeline.output_ndim(), strict=True)
    for tensor, kind, dimensions in declared:
        found = TYPES.get(kind.name, kind.name) if kind is not None else None
        if found and tensor["data_type"] != f"TYPE_{found}":
            raise ValueError(f"{tensor['name']}: expected TYPE_{found} of {path}, found {tensor['data_type']}")
        if dimensions is not None and dimensions != len(tensor["dims"]):
            raise ValueError(f"{tensor['name']}: expected {dimensions} dims of {path}, found {len(tensor['dims'])}")


def reason(error):
    """What DALI says, in one line, without the lines of the script that made the pipeline."""
    said = str(error).split("encountered:")[-1].split("Current pipeline object")[0]
    return " ".join(said.split())[:200]
