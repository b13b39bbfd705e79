"""ONNX graphs on the CPU: how a session is opened, the same in the server, the checks and the tests."""

import copy
import mmap
import os

import numpy as np
import onnxruntime


def open_session(path, threads=0, spinning="off"):
    """ONNX Runtime session of a graph (path or ModelProto) on the CPU, the same in server, checks and tests.

    threads: how many compute one operator; 0 leaves the choice to ONNX Runtime. spinning:
    what its threads do between two operators, "on" (its default), "off" (they sleep) or
    "stop" (they spin in a run, and stop at its end).
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; it warns about each constant that a conversion left behind
    # off: threads that spin between two requests take the cores from the server and from the
    # other embedders
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if spinning == "off" else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1" if spinning == "stop" else "0")
    graph = str(path) if not hasattr(path, "SerializeToString") and not has_quantizer(path) else mended(path)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def has_quantizer(path):
    """Whether the file of a graph names QuantizeLinear; most do not, and ONNX Runtime reads those by itself."""
    if not os.path.getsize(path):
        return False  # nothing that could be mapped; ONNX Runtime says what it thinks of it
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"QuantizeLinear") >= 0


def mended(path):
    """Bytes of a graph (path or ModelProto) that quantizes as ONNX says."""
    import onnx  # here: it takes a tenth of the time in which a service starts

    model = copy.deepcopy(path) if isinstance(path, onnx.ModelProto) else onnx.load(path)
    quantize_from_float32(model)
    return model.SerializeToString()


def quantize_from_float32(model):
    """Let each float16 QuantizeLinear read float32: the same values, rounded to nearest.

    ONNX Runtime's CPU kernel for float16 truncates where ONNX says round (its pull request
    32452); executed as they are, graphs with Q/DQ in FP16 deviate more than twice too much.
    """
    from onnx import TensorProto, helper, numpy_helper

    scales = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT16}
    nodes, added = [], {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in scales:
            scale = numpy_helper.to_array(scales[node.input[1]]).astype(np.float32)
            name = f"{node.input[1]}_float32"
            added[name] = numpy_helper.from_array(scale, name)
            values = f"{node.output[0]}_float32"
            nodes.append(helper.make_node("Cast", [node.input[0]], [values], to=TensorProto.FLOAT))
            node.input[0], node.input[1] = values, name
        nodes.append(node)
    if added:
        nodes = [copy.deepcopy(node) for node in nodes]  # before the field they live in is cleared
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(added.values())
