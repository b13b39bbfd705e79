"""Python-based Triton backend: executes a TensorRT model's typed graph with ONNX Runtime.

Serves `platform: "tensorrt_plan"` where there is no GPU. The graph beside the plan,
<model>/<version>/model.onnx, holds the precision that TensorRT is asked for, so the
arithmetic is compared, not the speed. It is the onnxruntime backend under this name.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).resolve().parent.parent / "onnxruntime" / "model.py"
_spec = importlib.util.spec_from_file_location("onnxruntime_backend", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
TritonPythonModel = _module.TritonPythonModel
