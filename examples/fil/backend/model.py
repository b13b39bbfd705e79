"""A stand-in for Triton's FIL backend: a Python-based backend that computes trees with treelite's GTIL on the CPU.

Serves `backend: "fil"` where Triton has no compiled FIL backend. Reads <model>/<version>/ and the file that the
parameter model_type names. What the compiled backend refuses this one refuses too, and some of it when the model is
loaded rather than at the first request. Packages: build/fil/packages, which serve.sh links beside this file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FILES = {
    "xgboost": "xgboost.model",
    "xgboost_json": "xgboost.json",
    "xgboost_ubj": "xgboost.ubj",
    "lightgbm": "model.txt",
    "treelite_checkpoint": "checkpoint.tl",
}
INPUT, OUTPUT = "input__0", "output__0"
INSTALL = "pip install --no-deps --target build/fil/packages -r examples/fil/requirements.txt"


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Leave the config as it is written: configs are complete."""
        return auto_complete_model_config

    def initialize(self, args):
        """Read the parameters, load the trees and hold both against each other."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        try:
            self.read_parameters({key: v["string_value"] for key, v in config.get("parameters", {}).items()})
            features = only_tensor(config["input"], INPUT)
            self.columns = only_tensor(config["output"], OUTPUT)
            path = folder / args["model_version"] / (config.get("default_model_filename") or FILES[self.model_type])
            self.trees, self.predict = load_trees(path, self.model_type)
            if features != self.trees.num_feature:
                raise ValueError(f"{INPUT}: expected dims [ {self.trees.num_feature} ] of {path}, found [ {features} ]")
            self.answer(np.zeros((1, features), np.float32))
        except ValueError as error:
            raise pb_utils.TritonModelException(f"{folder.name}: {error}") from None

    def read_parameters(self, given):
        """The parameters of config.pbtxt; ValueError where the compiled backend would refuse them."""
        self.model_type = given.get("model_type", "xgboost")
        if self.model_type not in FILES:
            raise ValueError(f"model_type: expected {', '.join(FILES)}, found {self.model_type}")
        name = "output_class" if "output_class" in given else "is_classifier"  # the old name has its say first
        self.is_classifier = read_bool(given, name)
        self.predict_proba = read_bool(given, "predict_proba", "false")
        self.threads = int(given.get("cpu_nthread", -1))
        if self.is_classifier:
            try:
                self.threshold = float(given["threshold"])
            except (KeyError, ValueError):
                found = given.get("threshold", "none")
                raise ValueError(f"threshold: expected a number for a classifier, found {found}; write 0.5") from None

    def answer(self, rows):
        """What the trees say of rows, float32 [rows, columns]."""
        scores = self.predict(self.trees, rows, nthread=self.threads)
        scores = scores.reshape(len(rows), -1).astype(np.float32)
        if self.is_classifier and not self.predict_proba:
            scores = scores.argmax(1, keepdims=True) if scores.shape[1] > 1 else scores > self.threshold
        elif self.is_classifier and scores.shape[1] == 1 and self.columns == 2:
            scores = np.hstack([1 - scores, scores])
        if scores.shape[1] != self.columns:
            raise ValueError(f"{OUTPUT}: expected dims [ {scores.shape[1]} ], found [ {self.columns} ]")
        return scores.astype(np.float32)

    def execute(self, requests):
        """One run for all requests, answers split again."""
        parts = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        answers = np.split(self.answer(np.concatenate(parts)), np.cumsum([len(part) for part in parts])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUT, answer)]) for answer in answers]


def read_bool(given, name, default=None):
    """A parameter that is true or false."""
    value = given.get(name, default)
    if value not in ("true", "false"):
        raise ValueError(f"{name}: expected true or false, found {value or 'none'}; write it into config.pbtxt")
    return value == "true"


def only_tensor(tensors, name):
    """The one dimension of the only tensor of a config."""
    (tensor, *others) = tensors
    if others or tensor["name"] != name or tensor["data_type"] != "TYPE_FP32" or len(tensor["dims"]) != 1:
        found = "; ".join(f"{t['name']}, {t['data_type']}, {t['dims']}" for t in tensors)
        raise ValueError(f"expected one tensor {name}, TYPE_FP32, of one dimension, found {found}")
    return int(tensor["dims"][0])


def load_trees(path, model_type):
    """(treelite's model of a file, the function that computes it); ValueError in one line where there is none."""
    sys.path.append(str(Path(__file__).with_name("packages")))
    try:
        import treelite
        from treelite import frontend
        from treelite.gtil import predict
    except ImportError as error:
        raise ValueError(f"expected the package treelite, found none ({error}); {INSTALL}") from None
    if not path.is_file():
        raise ValueError(f"{path}: expected the trees of model_type {model_type}, found no file")
    if (
        model_type == "lightgbm" and b"\nend of trees\n" not in path.read_bytes()
    ):  # treelite takes the trees that are left
        raise ValueError(f"{path}: expected trees of model_type lightgbm, found another file, or one that was cut")
    loaders = {
        "xgboost": frontend.load_xgboost_model_legacy_binary,
        "lightgbm": frontend.load_lightgbm_model,
        "treelite_checkpoint": treelite.Model.deserialize,
    }
    formats = {"xgboost_json": {"format_choice": "json"}, "xgboost_ubj": {"format_choice": "ubjson"}}
    try:
        return loaders.get(model_type, frontend.load_xgboost_model)(path, **formats.get(model_type, {})), predict
    except Exception as error:  # treelite's own, and what its readers raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: expected trees of model_type {model_type}, found another file: {reason}") from None
