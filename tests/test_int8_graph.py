"""Graphs with Q/DQ: the surgery is exact, and the check refuses what TensorRT would."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from core.repository import tokenizer_path
from core.tables import ATTENTION_MASK, INPUT_IDS
from core.tokens import encode, load_tokenizer
from precision import int8_graph, int8_search, surgery
from precision.int8_check import check_quantization
from tasks.table import TASKS


def small_quantized_graph(zero_point, kind, steps=3, axis=1, more=()):
    """x -> Q -> DQ -> MatMul with a quantized weight [4, 3]; more: further nodes. steps None: one for all."""
    weight = numpy_helper.from_array(np.ones((4, 3), dtype=np.int8 if kind == TensorProto.INT8 else np.uint8), "w")
    shape = [] if steps is None else [steps]
    constants = [
        weight,
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.full(shape, 0.1, dtype=np.float32), "scales"),
        helper.make_tensor("zero", kind, [], [zero_point]),
        helper.make_tensor("zeros", kind, shape, [zero_point] * (steps or 1)),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize_x"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dx"], name="dequantize_x"),
        helper.make_node("DequantizeLinear", ["w", "scales", "zeros"], ["dw"], name="dequantize_w", axis=axis),
        helper.make_node("MatMul", ["dx", "dw"], ["y"], name="matmul"),
        *more,
    ]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_check_accepts_signed_symmetric_and_refuses_the_rest():
    check_quantization("g", small_quantized_graph(0, TensorProto.INT8), {"matmul"})
    for zero_point, kind in ((3, TensorProto.INT8), (0, TensorProto.UINT8)):
        with pytest.raises(SystemExit, match="signed INT8 with zero point 0 at quantize_x"):
            check_quantization("g", small_quantized_graph(zero_point, kind), {"matmul"})
    for asked in ({"another"}, {"matmul", "another"}):
        with pytest.raises(SystemExit, match="another choice at another"):
            check_quantization("g", small_quantized_graph(0, TensorProto.INT8), asked)


def test_check_refuses_quantization_without_a_zero_point():
    graph = small_quantized_graph(0, TensorProto.INT8)
    del graph.graph.node[0].input[2]  # unsigned then, as the operator defines it
    with pytest.raises(SystemExit, match="zero point 0 at quantize_x, found another or none"):
        check_quantization("g", graph, {"matmul"})


@pytest.mark.parametrize("between", [None, "Cast", "Transpose"])
def test_check_refuses_another_reader_than_a_matmul(between):
    more = [helper.make_node("Add", ["dx", "dx"], ["sum"], name="residual")]
    if between:
        more[0].input[0] = more[0].input[1] = "between"
        more.insert(0, helper.make_node(between, ["dx"], ["between"], **({"to": 10} if between == "Cast" else {})))
    with pytest.raises(SystemExit, match="alone behind dequantize_x, found Add residual"):
        check_quantization("g", small_quantized_graph(0, TensorProto.INT8, more=more), {"matmul"})


@pytest.mark.parametrize(("steps", "axis"), [(None, 1), (4, 0), (4, 1), (3, 0), (1, 1)])
def test_check_refuses_weights_without_a_step_per_output_channel(steps, axis):
    with pytest.raises(SystemExit, match="expected a step per output channel of matmul, 3 on axis 1"):
        check_quantization("g", small_quantized_graph(0, TensorProto.INT8, steps, axis), {"matmul"})


def test_check_takes_a_gemm_with_its_weight_transposed():
    graph = small_quantized_graph(0, TensorProto.INT8, 4, 0)
    node = helper.make_node("Gemm", ["dx", "dw"], ["y"], name="matmul", transB=1)
    graph.graph.node[3].CopyFrom(node)
    check_quantization("g", graph, {"matmul"})
    node.attribute[0].i = 0
    graph.graph.node[3].CopyFrom(node)
    with pytest.raises(SystemExit, match="a step per output channel"):
        check_quantization("g", graph, {"matmul"})


# --- the surgery ----------------------------------------------------------------------


def test_smoothing_alone_changes_nothing(exported):
    """With steps too fine to matter, the smoothed graph answers as the reference: the surgery is exact."""
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    index, random = surgery.GraphIndex(reference), np.random.default_rng(0)
    weights, recipes, places = int8_graph.matmul_weights(reference), {}, set()
    for tensor, names in int8_graph.matmul_groups(reference).items():
        width = len(weights[names[0]])
        recipe = {"offsets": random.normal(size=width).astype(np.float32) / 10, "weights": {}, "mean_errors": {}}
        recipe |= {"factors": random.uniform(0.5, 2, size=width).astype(np.float32), "scale": np.float32(0.1)}
        recipe |= {"outliers": np.array([1, width - 1]), "rows": {}}
        for name in names:
            recipe["rows"][name] = (weights[name] * recipe["factors"][:, None])[recipe["outliers"]]
            recipe["weights"][name] = (np.zeros(weights[name].shape, np.int8), np.ones(weights[name].shape[1]))
            recipe["mean_errors"][name] = -recipe["offsets"] @ weights[name]
        recipes[tensor] = recipe
        others = [n for n in index.readers[tensor] if n.name not in names]
        places.add(int8_graph.smoothing_place(index, tensor, recipe, int8_graph.last_hidden_state(reference), others))
    assert places == {"linear", "layernorm", "mul"}
    chosen = [name for recipe in recipes.values() for name in recipe["weights"]]
    graph = int8_graph.insert_int8(reference, recipes, set(chosen))
    bypass_quantization(graph, weights, recipes)
    served = load_tokenizer(tokenizer_path(exported.repository))
    encoded = encode(served, ["A short text.", "Another one"], (INPUT_IDS, ATTENTION_MASK))
    expected = int8_search.run_graph(reference, encoded, TASKS["embedding"])
    assert int8_search.measure(graph, expected, encoded, TASKS["embedding"])["relative_l2_error"] < 1e-4


def bypass_quantization(graph, weights, recipes):
    """Read each activation before its Q/DQ, and each weight, multiplied by its factors, in float32."""
    producer = {output: node for node in graph.graph.node for output in node.output}
    scales = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    factors, outliers = ({n: r[key] for r in recipes.values() for n in r["weights"]} for key in ("factors", "outliers"))
    for node in graph.graph.node:
        if node.name in weights:
            source = producer[producer[node.input[0]].input[0]]
            node.input[0] = source.input[0]
            step = scales[producer[node.input[1]].input[1]]  # one, or one over the next MatMul's factors
            weight = weights[node.name] * factors[node.name][:, None] * step
            weight[outliers[node.name]] = 0  # a MatMul of their own has them
            node.input[1] = f"{node.name}/float"
            graph.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), node.input[1]))
