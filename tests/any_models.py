"""Two models in Python with every kind of input and answer, and a server that serves them beside others."""

import subprocess

from conftest import ROOT, free_ports, link_copy

# streams the words of a text; fails or waits where a word says so
WORDS = """
import json, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            text = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().flat[0].decode()
            weights = pb_utils.get_input_tensor_by_name(request, "WEIGHTS")
            weight = 1 if weights is None else weights.as_numpy().sum()
            limit = json.loads(request.parameters() or "{}").get("limit", 99)
            for word in text.split()[:limit]:
                if word == "fail":
                    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("told to fail")))
                    break
                if word == "wait":
                    time.sleep(2)
                piece = np.array([[(word + " ").encode()]], dtype=object)
                tensors = [pb_utils.Tensor("PIECE", piece), pb_utils.Tensor("SHARE", np.array([[weight / 3]], np.float32))]
                sender.send(pb_utils.InferenceResponse(tensors))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
WORDS_CONFIG = """
name: "words"
backend: "python"
max_batch_size: 4
input [
  { name: "TEXT" data_type: TYPE_STRING dims: 1 },
  { name: "WEIGHTS" data_type: TYPE_FP32 dims: 2 optional: true }
]
output [ { name: "PIECE" data_type: TYPE_STRING dims: 1 }, { name: "SHARE" data_type: TYPE_FP32 dims: 1 } ]
model_transaction_policy { decoupled: true }
"""
# does not batch; says what it got
MIXED = """
import json, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        found = {t.name(): t.as_numpy() for t in request.inputs()}
        question, context = (found[name][0].decode() for name in ("QUESTION", "CONTEXT"))
        if question == "wait":
            time.sleep(3)
        if not question:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("expected a question,\\nfound none"))
        seen = {name: array.tolist() for name, array in found.items() if array.dtype != object}
        seen["parameters"] = json.loads(request.parameters() or "{}")
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("SUM", np.array([found["NUMBERS"].sum()], dtype=np.int64)),
            pb_utils.Tensor("INSIDE", np.array([question in context])),
            pb_utils.Tensor("HALF", np.array([found["NUMBERS"], found["NUMBERS"] / 0], dtype=np.float32) / 3),
            pb_utils.Tensor("SEEN", np.array([json.dumps(seen).encode()], dtype=object)),
        ])
"""
MIXED_CONFIG = """
name: "mixed"
backend: "python"
input [
  { name: "QUESTION" data_type: TYPE_STRING dims: 1 },
  { name: "CONTEXT" data_type: TYPE_STRING dims: 1 },
  { name: "NUMBERS" data_type: TYPE_FP32 dims: 3 },
  { name: "FLAG" data_type: TYPE_BOOL dims: 1 optional: true },
  { name: "BYTE" data_type: TYPE_UINT8 dims: 1 optional: true }
]
output [
  { name: "SUM" data_type: TYPE_INT64 dims: 1 },
  { name: "INSIDE" data_type: TYPE_BOOL dims: 1 },
  { name: "HALF" data_type: TYPE_FP32 dims: [ 2, 3 ] },
  { name: "SEEN" data_type: TYPE_STRING dims: 1 }
]
"""
# serve.sh without its check, which knows only repositories of the project's own making
START = 'source "$1"; check() { repositories[0]=$(realpath "${repositories[0]}"); shared=(); }; shift; main "$@"'


def serve_any(repository, folder):
    """Serve a copy of a repository with the two models in it; returns the ports of HTTP and gRPC."""
    repository = link_copy(repository, folder)
    for name, code, config in (("words", WORDS, WORDS_CONFIG), ("mixed", MIXED, MIXED_CONFIG)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1/model.py").write_text(code)
        (repository / name / "config.pbtxt").write_text(config)
    http, grpc, metrics = map(str, free_ports(3))
    ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    command = ["bash", "-c", START, "_", ROOT / "serve.sh", "start", "--device", "cpu", "--path", "ensemble"]
    command += ["--model-repository", repository, *ports]
    started = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert started.returncode == 0, started.stderr
    return http, grpc
