"""Python-based Triton backend: executes a SavedModel on the CPU where Triton has no compiled TensorFlow backend.

Serves `platform: "tensorflow_savedmodel"`. Reads <model>/<version>/model.savedmodel, or what default_model_filename names;
names, types and shapes come from the model's config. TensorFlow comes from the model's environment (EXECUTION_ENV_PATH).
"""

import json
import os
from pathlib import Path

import triton_python_backend_utils as pb_utils

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
SIGNATURE = "serving_default"


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Leave the config as it is written: configs are complete."""
        return auto_complete_model_config

    def initialize(self, args):
        """Load the SavedModel once."""
        config = json.loads(args["model_config"])
        name = config.get("default_model_filename") or "model.savedmodel"
        path = Path(args["model_repository"]) / args["model_version"] / name
        self.outputs = {
            tensor["name"]: pb_utils.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]
        }
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.model, self.signature = load(path)
        takes = self.signature.structured_input_signature[1]
        for found, wanted, kind in (
            (takes, self.inputs, "inputs"),
            (self.signature.structured_outputs, self.outputs, "outputs"),
        ):
            if missing := set(wanted) - set(found):
                raise fault(
                    f"{path}: expected the config's {kind} {', '.join(sorted(missing))}, found {', '.join(found)}; correct config.pbtxt"
                )

    def execute(self, requests):
        """One answer for each request; a bad one fails alone."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        import tensorflow as tf

        feeds = {name: tf.constant(pb_utils.get_input_tensor_by_name(request, name).as_numpy()) for name in self.inputs}
        try:
            found = self.signature(**feeds)
        except (tf.errors.OpError, ValueError, TypeError) as error:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"TensorFlow: {error}", pb_utils.TritonError.INVALID_ARG)
            )
        tensors = [
            pb_utils.Tensor(name, found[name].numpy().astype(kind, copy=False)) for name, kind in self.outputs.items()
        ]
        return pb_utils.InferenceResponse(tensors)


def fault(words):
    """What initialize raises: Triton shows it as the reason why the model is not served."""
    return pb_utils.TritonModelException(words)


def load(path):
    """(model, its signature) of a SavedModel; the model has to live as long as the signature."""
    if not (path / "saved_model.pb").is_file():
        found = "a file" if path.is_file() else "none"
        raise fault(f"{path}: expected a SavedModel, a folder with saved_model.pb, found {found}; run build.py again")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise fault(
            f"expected tensorflow in the model's environment, found: {error}; see examples/tensorflow/README.md"
        ) from None
    try:
        model = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow's and protobuf's exceptions share no other base
        raise fault(
            f"{path}: expected a whole SavedModel, found: {str(error).splitlines()[0]}; run build.py again"
        ) from None
    if SIGNATURE not in model.signatures:
        raise fault(
            f"{path}: expected the signature {SIGNATURE}, found {', '.join(model.signatures) or 'none'}; save it with one"
        )
    return model, model.signatures[SIGNATURE]
