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
    graph = str(path) if not hasattr(path, "SerializeToString") and is_executable(path) else mended(path)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def is_executable(path):
    """Whether the file of a graph names neither QuantizeLinear nor BF16; ONNX Runtime reads such a one by itself."""
    if not os.path.getsize(path):
        return True  # nothing that could be mapped; ONNX Runtime says what it thinks of it
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"QuantizeLinear") < 0 and content.find(b"BF16") < 0  # quantize.py notes the precision


def mended(path):
    """Bytes of a graph (path or ModelProto) that quantizes as ONNX says, FP8 and BF16 emulated."""
    import onnx  # here: it takes a tenth of the time in which a service starts

    model = copy.deepcopy(path) if isinstance(path, onnx.ModelProto) else onnx.load(path)
    quantize_from_float32(model)
    emulate_fp8(model)
    emulate_bf16(model)
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
        replace_nodes(model, nodes)
        model.graph.initializer.extend(added.values())


def replace_nodes(model, nodes):
    """Give a graph these nodes, some of which may be its own."""
    nodes = [copy.deepcopy(node) for node in nodes]  # before the field they live in is cleared
    del model.graph.node[:]
    model.graph.node.extend(nodes)


# --- what no kernel of the CPU computes: exact rounding of operands, sums in FP32 ----------------


def emulate_fp8(model):
    """Let Q/DQ in FP8 (E4M3) be a cast to FP8 and back, which rounds to nearest and saturates, and a product.

    ONNX Runtime's optimizer takes such pairs for INT8, and its CPU kernels multiply no FP8.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants = {i.name: i for i in model.graph.initializer}
    if not any(i.data_type == TensorProto.FLOAT8E4M3FN for i in constants.values()):
        return
    nodes, weights = [], {}
    for node in model.graph.node:
        pair = node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
        zero = constants.get(node.input[2]) if pair else None
        if zero is None or zero.data_type != TensorProto.FLOAT8E4M3FN:
            nodes.append(node)
            continue
        value, scale, name = node.input[0], node.input[1], node.output[0]
        if value in constants:  # a weight with a step per output channel
            steps, axis = numpy_helper.to_array(constants[scale]), next(a.i for a in node.attribute if a.name == "axis")
            steps = steps[None] if axis == 1 else steps[:, None]
            product = numpy_helper.to_array(constants[value]).astype(np.float32) * steps.astype(np.float32)
            weights[name] = numpy_helper.from_array(product.astype(steps.dtype), name)
        elif node.op_type == "QuantizeLinear":
            nodes.append(helper.make_node("Div", [value, scale], [f"{name}_quotient"]))
            nodes.append(helper.make_node("Cast", [f"{name}_quotient"], [name], to=TensorProto.FLOAT8E4M3FN))
        else:  # every value of FP8 is one of FP16 too
            nodes.append(helper.make_node("Cast", [value], [f"{name}_cast"], to=constants[scale].data_type))
            nodes.append(helper.make_node("Mul", [f"{name}_cast", scale], [name]))
    replace_nodes(model, nodes)
    model.graph.initializer.extend(weights.values())


def emulate_bf16(model):
    """Let tensors in BF16 be FP32 that is rounded to BF16 behind every operation: ONNX Runtime's CPU has no such kernels.

    A GPU that fuses operations rounds less often.
    """
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    low = TensorProto.BFLOAT16
    if not any(i.data_type == low for i in model.graph.initializer):
        return
    inferred = shape_inference.infer_shapes(model).graph.value_info
    typed = {v.name for v in inferred if v.type.tensor_type.elem_type == low}
    for constant in model.graph.initializer:
        if constant.data_type == low:
            value = numpy_helper.to_array(constant).astype(np.float32)
            constant.CopyFrom(numpy_helper.from_array(value, constant.name))
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == low:
                attribute.i = TensorProto.FLOAT
            elif attribute.t.data_type == low:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
        for index, name in enumerate(node.output):
            if name in typed and node.op_type != "Constant":
                node.output[index] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_low"], to=low))
                nodes.append(helper.make_node("Cast", [f"{name}_low"], [name], to=TensorProto.FLOAT))
    replace_nodes(model, nodes)
    del model.graph.value_info[:]  # they name types that were
