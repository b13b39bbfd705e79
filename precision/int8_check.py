"""Check of a graph with Q/DQ: signed, symmetric, weights per channel, and at the inputs of MatMuls alone."""

from collections import Counter

import onnx
from onnx import numpy_helper

from core.repository import transposed
from precision.surgery import GraphIndex


def quantized_matmuls(graph):
    """Names of MatMul and Gemm nodes whose both operands come from DequantizeLinear."""
    index = GraphIndex(graph)
    ends = [node.output[0] for node in index.nodes if node.op_type == "DequantizeLinear"]
    read = Counter(reader.name for end in ends for reader, _ in readers_of(index, end))
    return {n.name for n in index.nodes if n.op_type in ("MatMul", "Gemm") and read[n.name] >= 2}


def readers_of(index, name, transposes=0):
    """[(node, how many Transposes are before it)] of what reads a tensor, through Transpose and Cast."""
    found = []
    for node in index.readers.get(name, []):
        if node.op_type in ("Transpose", "Cast"):
            found += readers_of(index, node.output[0], transposes + (node.op_type == "Transpose"))
        else:
            found.append((node, transposes))
    return found


def check_dequantized(path, index, node):
    """Exit unless MatMuls alone read a DequantizeLinear, and a weight has one step per output channel."""
    readers = readers_of(index, node.output[0])
    other = [f"{r.op_type} {r.name}" for r, _ in readers if r.op_type not in ("MatMul", "Gemm")]
    if other or not readers:
        raise SystemExit(
            f"{path}: expected MatMul or Gemm alone behind {node.name}, found {(other or ['nothing'])[0]}; "
            "report it with the model's name"
        )
    weight, scale = (index.constants.get(name) for name in node.input[:2])
    if weight is None:
        return
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    for reader, transposes in readers:
        output_axis = (1 + transposes + transposed(reader)) % 2
        if scale is None or list(scale.dims) != [weight.dims[output_axis]] or axis != output_axis:
            raise SystemExit(
                f"{path}: expected a step per output channel of {reader.name}, {weight.dims[output_axis]} on axis "
                f"{output_axis}, found {list(scale.dims) if scale else 'none'} on {axis}; report it with the model's name"
            )


def check_quantization(path, graph, asked, kind=onnx.TensorProto.INT8):
    """Exit unless Q/DQ is what TensorRT takes: signed, symmetric, per channel, and on the MatMuls asked for.

    kind: the type of the quantized tensors.
    """
    index = GraphIndex(graph)
    for node in index.nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            index.constants[node.output[0]] = node.attribute[0].t
    for node in index.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = index.constants.get(node.input[2]) if len(node.input) > 2 else None  # without one: unsigned
        if zero is None or zero.data_type != kind or numpy_helper.to_array(zero).astype(float).any():
            raise SystemExit(
                f"{path}: expected signed {onnx.TensorProto.DataType.Name(kind)} with zero point 0 at {node.name}, found another or none; TensorRT refuses it"
            )
        if node.op_type == "DequantizeLinear":
            check_dequantized(path, index, node)
    found = quantized_matmuls(graph)
    if found != set(asked):
        other = sorted(found ^ set(asked))[0]
        raise SystemExit(
            f"{path}: expected INT8 on the MatMuls asked for, found another choice at {other}; report it with the model's name"
        )
