"""The makers of precisions: one per row, TF32 bit by bit, float16 as ONNX Runtime executes it, and silence."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from core import onnx_runtime
from core.repository import graph_path, graph_tensors, tokenizer_path
from core.tables import ATTENTION_MASK, INPUT_IDS, PRECISIONS
from core.tokens import encode, load_tokenizer
from precision import int8_recipes, int8_search, makers
from tasks.table import TASKS


def test_every_precision_has_a_maker():
    assert {row.maker for row in PRECISIONS.values()} == set(makers.MAKERS)


def mantissa_rounded(values):
    """float32 rounded to nearest, ties to even, with 10 mantissa bits: by the bits themselves."""
    bits = values.view(np.uint32).astype(np.uint64)
    bits += 0xFFF + ((bits >> 13) & 1)
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def product_graph(weight=None):
    """x [4096, 8] -> MatMul with y [8, 8] or a constant, the identity: the operand itself comes out."""
    names = ("x",) if weight is not None else ("x", "y")
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 8]) for n in names]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 8])]
    constants = [numpy_helper.from_array(weight, "y")] if weight is not None else []
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "y"], ["z"], name="m")], "g", inputs, outputs, constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("constant", [False, True])
def test_tf32_rounds_both_operands_to_ten_mantissa_bits(constant):
    random, one = np.random.default_rng(0), np.eye(8, dtype=np.float32)
    values = (random.normal(size=(4096, 8)) * 10 ** random.uniform(-20, 20, size=(4096, 8))).astype(np.float32)
    expected = mantissa_rounded(values)
    assert (expected != values).mean() > 0.99 and np.array_equal(makers.round_to_tf32(values), expected)
    session = onnx_runtime.open_session(makers.emulate_tf32(product_graph(one if constant else None)))
    feeds = {"x": values} if constant else {"x": values, "y": one}
    assert np.array_equal(session.run(None, feeds)[0], expected)
    session = onnx_runtime.open_session(makers.emulate_tf32(product_graph(values[:8] if constant else None)))
    feeds = {"x": one} if constant else {"x": one, "y": values[:8]}
    assert np.array_equal(session.run(None, feeds)[0], expected[:8])


def test_tf32_of_a_model_is_as_coarse_as_tf32_and_leaves_its_tensors(exported):
    reference = onnx.load(graph_path(exported.repository, "ONNX"))
    graph = makers.emulate_tf32(reference)
    onnx.checker.check_model(graph, full_check=True)
    assert graph_tensors(graph) == graph_tensors(reference)
    served = load_tokenizer(tokenizer_path(exported.repository))
    encoded = encode(served, ["A short text.", "Another one"], (INPUT_IDS, ATTENTION_MASK))
    expected = int8_search.run_graph(reference, encoded, TASKS["embedding"])
    found = int8_search.measure(graph, expected, encoded, TASKS["embedding"])
    assert 2**-15 < found["relative_l2_error"] < 2**-8


def test_an_error_of_modelopt_is_heard(capsys, caplog):
    with makers.quiet_modelopt():
        logging.getLogger("modelopt.onnx").warning("two shared constants")
        logging.getLogger("modelopt.onnx").error("no such tensor")
        print("a step")
    said = "".join(capsys.readouterr()) + caplog.text
    assert "no such tensor" in said and "shared" not in said and "a step" not in said


def test_float16_quantize_is_executed_with_rounding(tmp_path):
    """ONNX Runtime's own CPU kernel truncates; open_session must not."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [numpy_helper.from_array(np.float16(0.1), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "g.onnx")
    x = np.array([0.06, 0.14, -0.06, 0.26], dtype=np.float32)
    found = onnx_runtime.open_session(tmp_path / "g.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(found, [0.1, 0.1, -0.1, 0.3], atol=1e-3)


def test_bf16_has_the_tensors_of_the_reference_and_multiplies_in_bf16(tiny):
    reference = onnx.load(tiny.repository / "model_ONNX/1/model.onnx")
    feeds = {i.name: np.ones((1, 5), dtype=np.int64) for i in reference.graph.input}
    graph = makers.make_graph("BF16", reference, makers.Learnt(feeds))
    onnx.checker.check_model(graph, full_check=True)
    assert graph_tensors(graph) == graph_tensors(reference)
    types = {i.name: i.data_type for i in graph.graph.initializer}
    weights = [types[n.input[1]] for n in graph.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in types]
    assert weights and set(weights) == {TensorProto.BFLOAT16}


def test_on_a_cpu_best_multiplies_no_integers_and_dequantizes_every_weight(tiny, tmp_path):
    reference = onnx.load(tiny.repository / "model_ONNX/1/model.onnx")
    calibration = {i.name: np.arange(8, dtype=np.int64)[None] for i in reference.graph.input}
    calibration["ATTENTION_MASK"][:] = 1
    calibration["TOKEN_TYPE_IDS"][:] = 0
    recipes = int8_recipes.naive_recipes(reference, calibration, 0)
    learnt = makers.Learnt(calibration, recipes, set(int8_recipes.candidate_matmuls(reference, recipes)))
    executed = {
        p: executed_kernels(makers.make_graph(p, reference, learnt), calibration, tmp_path / p)
        for p in ("INT8", "BEST")
    }
    assert executed["INT8"]["MatMulIntegerToFloat"] and not executed["BEST"]["MatMulIntegerToFloat"]
    pairs = len(learnt.chosen)  # one of the input, one of the weight
    assert executed["BEST"]["DequantizeLinear"] >= 2 * pairs > executed["INT8"]["DequantizeLinear"]
    assert executed["BEST"]["Cast"] > pairs


def executed_kernels(graph, feeds, prefix):
    """{operator: how many of its kernels ONNX Runtime runs for a graph}, from its own profile."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    onnx_runtime.quantize_from_float32(graph)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return Counter(e["args"]["op_name"] for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time"))
