"""What executes a graph in a service on a CPU: ONNX Runtime or OpenVINO; a copy lies beside the service's model."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def open_onnxruntime(path, output, precision, sizes):
    """A function from feeds to one output for each of some sizes, (threads, streams).

    As many threads as there are streams may call it at once, each with `threads` cores of its own.
    """
    try:
        from onnx_runtime import open_session  # beside this file in a service
    except ImportError:
        from core.onnx_runtime import open_session

    def open_one(size):
        # a lone text has all cores to itself: its threads then wait for one another awake, and sleep between two runs
        session = open_session(path, size[0], "stop" if size[0] > 1 else "off")
        return lambda feeds: session.run([output], feeds)[0]

    return at_once(open_one, sizes)


def open_openvino(path, output, precision, sizes):
    """The same through OpenVINO. precision: FP32, which is forced, or BF16; a graph with Q/DQ pairs is executed in INT8.

    Without a precision OpenVINO takes BF16 wherever the CPU has it. Its threads are not pinned: two processes would sit
    on one core.
    """
    import openvino

    core = openvino.Core()
    graph = core.read_model(str(path))  # once: what is compiled of it shares its weights
    if precision == "BF16":
        round_weights(graph)
    number = next(n for n, port in enumerate(graph.outputs) if output in port.names)
    hint = {"FP32": "f32", "BF16": "bf16"}.get(precision, "f32")

    def open_one(size):
        threads, streams = size
        options = {"INFERENCE_NUM_THREADS": threads * streams, "NUM_STREAMS": streams, "ENABLE_CPU_PINNING": False}
        model = core.compile_model(graph, "CPU", options | {"INFERENCE_PRECISION_HINT": hint})
        own = threading.local()

        def run(feeds):
            if not hasattr(own, "request"):  # one for each thread
                own.request = model.create_infer_request()
            own.request.infer(feeds, share_inputs=True)
            return own.request.get_output_tensor(number).data.copy()  # the next run writes there

        return run

    return at_once(open_one, sizes)


def round_weights(graph):
    """Hold the weights in BF16, to which OpenVINO would round a copy of them for each model that it compiles."""
    import openvino
    from openvino import opset13

    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32 or node.data.size < 1000:
            continue
        bits = node.data.view(np.uint32)
        rounded = openvino.Tensor(openvino.Type.bf16, openvino.Shape(node.data.shape))
        rounded.data.view(np.uint16)[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
        weight = opset13.convert(openvino.op.Constant(rounded), "f32")
        weight.get_rt_info()["decompression_0"] = ""  # else it is computed once, and the copy is there again
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(weight.output(0))


def at_once(open_one, sizes):
    """What opens for each size, in threads: a start waits for them."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(open_one, sizes))


ENGINES = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

OPENVINO = "pip install -r serving/requirements-openvino.txt"


def why_missing(engine):
    """Why this machine cannot execute with an engine, in words; "" where it can."""
    if engine == "openvino" and importlib.util.find_spec("openvino") is None:
        return f"expected the package openvino, found none; {OPENVINO}"
    return ""


def has_bf16():
    """Whether this CPU multiplies BF16: elsewhere OpenVINO would compute FP32 under its name."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
