"""quantize.py: what is in the typed graphs, and which graphs its check refuses."""

import errno
import resource

import numpy as np
import onnx
import pytest
from conftest import copy_repository, run
from onnx import TensorProto, helper, numpy_helper

import common
import quantize
import repository

GRAPHS = {p: f"model_TRT_{p}/1/model.onnx" for p in common.PRECISIONS}


def load(exported, precision):
    return onnx.load(exported.repository / GRAPHS[precision])


@pytest.mark.parametrize("precision", common.PRECISIONS)
def test_typed_graph_keeps_the_tensors_of_the_reference(exported, precision):
    path = exported.repository / GRAPHS[precision]
    onnx.checker.check_model(str(path), full_check=True)
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    assert repository.graph_tensors(onnx.load(path)) == repository.graph_tensors(reference)


def test_fp32_is_the_reference_itself(exported):
    assert common.sha256(exported.repository / GRAPHS["FP32"]) == common.sha256(
        exported.repository / "model_ONNX/1/model.onnx"
    )


@pytest.mark.parametrize(
    ("precision", "kind"), [("FP16", TensorProto.FLOAT16), ("INT8", TensorProto.FLOAT), ("BEST", TensorProto.FLOAT16)]
)
def test_weights_of_matmuls_have_the_precision_of_the_graph(exported, precision, kind):
    graph = load(exported, precision)
    weights = {i.name: i.data_type for i in graph.graph.initializer if len(i.dims) == 2}
    producer = {o: n for n in graph.graph.node for o in n.output}

    def weight_type(name):
        passing = ("Cast", "Transpose", "QuantizeLinear", "DequantizeLinear")
        while name in producer and producer[name].op_type in passing:
            name = producer[name].input[0]
        return weights.get(name)

    found = {weight_type(n.input[1]) for n in graph.graph.node if n.op_type == "MatMul"} - {None}
    assert found == {kind}


@pytest.mark.parametrize("precision", ["INT8", "BEST"])
def test_int8_is_on_weight_matmuls_only_and_on_most_of_them(exported, precision):
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    shapes = quantize.weight_matmuls(reference)
    allowed = {name: shape for name, shape in shapes.items() if name not in quantize.after_activation(reference)}
    found = quantize.check_quantization(precision, load(exported, precision), allowed)
    assert len(shapes) == 37 and len(allowed) == 31  # 6 layers of 6 and the head; 6 follow GELU
    assert quantize.flops_share(found, shapes) > 0.6


def small_quantized_graph(zero_point, kind):
    """x -> Q -> DQ -> MatMul with a quantized weight."""
    weight = numpy_helper.from_array(np.ones((4, 4), dtype=np.int8 if kind == TensorProto.INT8 else np.uint8), "w")
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    zero = helper.make_tensor("zero", kind, [], [zero_point])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize_x"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dx"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["dw"]),
        helper.make_node("MatMul", ["dx", "dw"], ["y"], name="matmul"),
    ]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [weight, scale, zero])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_check_accepts_signed_symmetric_and_refuses_the_rest():
    asked = {"matmul": (4, 4)}
    assert quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), asked) == {"matmul"}
    for zero_point, kind in ((3, TensorProto.INT8), (0, TensorProto.UINT8)):
        with pytest.raises(SystemExit, match="signed INT8 with zero point 0 at quantize_x"):
            quantize.check_quantization("g", small_quantized_graph(zero_point, kind), asked)
    with pytest.raises(SystemExit, match="asked for, found it on matmul"):
        quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), {"another": (4, 4)})
    with pytest.raises(SystemExit, match="at least 95% of the FLOPs"):
        quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), asked | {"another": (4, 4)})


def test_calibration_rows_hold_no_padding(exported):
    texts, _ = common.split_texts(common.read_texts(common.TEXTS))
    rows = quantize.pack_texts(exported.assets, texts, 128)
    assert rows["INPUT_IDS"].shape[1] == 128 and rows["ATTENTION_MASK"].all()
    assert not (rows["INPUT_IDS"] == 0).any()  # [PAD]


def test_too_few_calibration_texts_are_refused(exported, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("one short text\n")
    before = common.sha256(exported.repository / GRAPHS["INT8"])
    places = ("--repository", exported.repository, "--assets", exported.assets)
    done = run("quantize.py", "--calibration-texts", texts, *places)
    assert done.returncode == 1 and "--calibration-texts" in done.stderr and "give more text" in done.stderr
    assert common.sha256(exported.repository / GRAPHS["INT8"]) == before


def test_a_disk_without_room_leaves_the_graph_that_was_there(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    path = folder / GRAPHS["FP16"]
    before = common.sha256(path)

    def ten_megabytes():  # a limit on the size of a file fails a write as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))

    places = ("--repository", folder, "--assets", exported.assets)
    done = run("quantize.py", "--only", "FP16", *places, preexec_fn=ten_megabytes)
    assert done.returncode != 0
    assert common.sha256(path) == before and not list(folder.rglob("*.tmp"))


def test_json_on_a_disk_without_room_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text("{}")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(SystemExit, match="record.json: expected room"):
        common.write_json(tmp_path / "record.json", {"a": 1})
    assert (tmp_path / "record.json").read_bytes() == b"{}"


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
    found = common.open_session(tmp_path / "g.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(found, [0.1, 0.1, -0.1, 0.3], atol=1e-3)
