"""Python-based Triton backend: executes a model's graph, ONNX or OpenVINO's own, with OpenVINO on the CPU.

Serves `backend: "openvino"` where Triton has no compiled OpenVINO backend, takes its parameters and refuses what it
refuses. INFERENCE_PRECISION_HINT (f32, bf16) is this project's: the compiled backend reads no such parameter, and
OpenVINO then computes in BF16 wherever the CPU has it.
"""

import sys
from pathlib import Path

# serve.sh puts graph_model.py beside this file: the server may have been started anywhere
sys.path.insert(0, str(Path(__file__).parent))

import triton_python_backend_utils as pb_utils
from graph_model import GraphModel

HINT = "INFERENCE_PRECISION_HINT"
AS_IT_IS = ("INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT", HINT)
KNOWN = (*AS_IT_IS, "HINT_BF16")


class TritonPythonModel(GraphModel):
    title, file, requirements = "OpenVINO", "model.xml", "serving/requirements-openvino.txt"

    def open(self, path, config, settings):
        import openvino

        model = openvino.Core().read_model(str(path))
        if (count := len(model.inputs)) != len(self.inputs):
            raise ValueError(f"{count} inputs, where the config has {len(self.inputs)}")
        if size := config["max_batch_size"]:
            for tensor in model.inputs:
                tensor.node.layout = openvino.Layout("N...")
            openvino.set_batch(model, size)
        compiled = openvino.Core().compile_model(model, "CPU", self.options(settings))
        self.note_precision(config["name"], settings, compiled.get_property(HINT).get_type_name())
        request = compiled.create_infer_request()
        return lambda feeds: self.infer(request, feeds, size)

    def infer(self, request, feeds, size):
        """Outputs of a batch; with a max_batch_size every batch is exactly so large, as the compiled backend has it."""
        found = len(next(iter(feeds.values())))
        if size and found != size:
            raise ValueError(f"expected requests with batch size {size}, got {found}; set max_batch_size to 0")
        answer = request.infer(feeds)
        return [answer[name] for name in self.outputs]

    def options(self, settings):
        """OpenVINO's own from the config's parameters."""
        if unknown := sorted(settings.keys() - set(KNOWN)):
            raise ValueError(f"parameter {unknown[0]}, where {', '.join(KNOWN)} are understood")
        if settings.get("HINT_BF16", "YES").upper() != "YES":
            raise ValueError(f"HINT_BF16 {settings['HINT_BF16']}, where only YES is understood")
        found = {name: settings[name] for name in AS_IT_IS if name in settings}
        found |= {HINT: "bf16"} if "HINT_BF16" in settings else {}
        return {"ENABLE_CPU_PINNING": False} | found  # pinned, two processes would sit on one core

    def note_precision(self, name, settings, found):
        """Refuse another precision than the config asks for, and say which one it is where the config asks for none."""
        asked = "bf16" if "HINT_BF16" in settings else settings.get(HINT)
        if asked and asked != found:
            raise ValueError(f"that this CPU computes it in {found}, where the config asks for {asked}")
        if found != "f32" and not asked:
            pb_utils.Logger.log_warn(f"{name}: OpenVINO computes FP32 in {found} on this CPU; {HINT} f32 forbids it")
