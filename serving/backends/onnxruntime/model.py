"""Python-based Triton backend: executes a model's ONNX graph with ONNX Runtime on the CPU.

Serves `platform: "onnxruntime_onnx"` where Triton has no compiled ONNX Runtime backend.
Reads <model>/<version>/model.onnx. Understands the compiled backend's parameter
intra_op_thread_count, and spinning (see core/onnx_runtime.py).
"""

import sys
from pathlib import Path

# serve.sh puts graph_model.py and onnx_runtime.py beside this file: the server may have been started anywhere
sys.path.insert(0, str(Path(__file__).parent))

from graph_model import GraphModel
from onnx_runtime import open_session


class TritonPythonModel(GraphModel):
    title = "ONNX Runtime"

    def find_file(self, config):
        return "model.onnx"  # also beside a plan

    def open(self, path, config, settings):
        threads = int(settings.get("intra_op_thread_count", 0))
        options = {"spinning": settings["spinning"]} if "spinning" in settings else {}
        session = open_session(path, threads, **options)
        return lambda feeds: session.run(self.outputs, feeds)
