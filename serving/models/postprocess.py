"""Last step of a classifier as a Triton model: LOGITS -> LABEL, SCORE.

Reads labels.json beside itself: the names in the order of the logits, and how scores are made:
softmax, or sigmoid for a model with several labels at once. A request's parameter top_k (default
1) says how many labels come back, the most likely first. classifier_repository.py copies this
file into a repository as postprocess/1/model.py; nothing else of the project is needed there.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        """Read the labels once and hold them against the config's number of logits."""
        path = Path(args["model_repository"]) / args["model_version"] / "labels.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        self.labels = np.array([name.encode() for name in settings["labels"]], dtype=object)
        self.score = SCORES[settings["score"]]
        classes = int(json.loads(args["model_config"])["input"][0]["dims"][0])
        if len(self.labels) != classes:
            raise pb_utils.TritonModelException(
                f"{path}: expected {classes} labels as in config.pbtxt, found {len(self.labels)}; run classifier_repository.py"
            )

    def execute(self, requests):
        """One answer per request; each has its own top_k, so each is answered alone."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """Response with LABEL and SCORE [batch, top_k], or only an error."""
        try:
            count = read_top_k(request, len(self.labels))
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        logits = pb_utils.get_input_tensor_by_name(request, "LOGITS").as_numpy()
        scores = self.score(logits.astype(np.float64)).astype(np.float32)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("LABEL", self.labels[best]),
                pb_utils.Tensor("SCORE", np.take_along_axis(scores, best, axis=1)),
            ]
        )


def read_top_k(request, classes):
    """The request's top_k. Raises ValueError where it is no number from 1 to the classes."""
    value = json.loads(request.parameters() or "{}").get("top_k", 1)
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if isinstance(value, bool) or not 1 <= count <= classes:
        raise ValueError(f"top_k: expected 1 to {classes}, the model's classes; found {value}")
    return count


def softmax(logits):
    """Scores that add up to 1: one label is right."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(logits):
    """A score of its own for each label: any number of labels may be right."""
    return np.exp(-np.logaddexp(0, -logits))  # without overflow


SCORES = {"softmax": softmax, "sigmoid": sigmoid}
