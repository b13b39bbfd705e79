"""quantize.py: what is in the typed graphs, and which graphs its check refuses."""

import errno
import json
import resource

import numpy as np
import onnx
import pytest
from conftest import copy_repository, run, succeed
from onnx import TensorProto, helper, numpy_helper

import common
import int8_graph
import int8_search
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
    ("precision", "kinds"),
    [
        ("FP16", {TensorProto.FLOAT16}),
        ("INT8", {TensorProto.INT8, TensorProto.FLOAT}),  # the output layer is too small for INT8
        ("BEST", {TensorProto.INT8, TensorProto.FLOAT16}),
    ],
)
def test_weights_of_matmuls_have_the_precision_of_the_graph(exported, precision, kinds):
    graph = load(exported, precision)
    weights = {i.name: i.data_type for i in graph.graph.initializer if len(i.dims) == 2}
    producer = {o: n for n in graph.graph.node for o in n.output}

    def weight_type(name):
        passing = ("Cast", "Transpose", "QuantizeLinear", "DequantizeLinear")
        while name in producer and producer[name].op_type in passing:
            name = producer[name].input[0]
        return weights.get(name)

    found = {weight_type(n.input[1]) for n in graph.graph.node if n.op_type == "MatMul"} - {None}
    assert found == kinds


@pytest.mark.parametrize("precision", ["INT8", "BEST"])
def test_int8_is_on_weight_matmuls_only_and_on_nine_tenths_of_their_flops(exported, precision):
    shapes = int8_graph.weight_matmuls(onnx.load(exported.repository / "model_ONNX/1/model.onnx"))
    found = quantize.quantized_matmuls(load(exported, precision))
    assert len(shapes) == 37 and found < set(shapes)  # 6 layers of 6 and the head
    assert int8_graph.flops_share(found, shapes) >= 0.9
    assert found == {row["matmul"] for row in sensitivity(exported)["matmuls"] if row["int8"]}


def sensitivity(exported):
    return json.loads((exported.results / "all-MiniLM-L6-v2/sensitivity.json").read_text())


def test_sensitivity_has_every_matmul_and_a_reason(exported):
    record = sensitivity(exported)
    shapes = int8_graph.weight_matmuls(onnx.load(exported.repository / "model_ONNX/1/model.onnx"))
    assert {row["matmul"] for row in record["matmuls"]} == set(shapes)
    assert sum(row["flops_share"] for row in record["matmuls"]) == pytest.approx(1)
    assert all(row["why"] for row in record["matmuls"])
    assert all(0 < row["relative_l2_error"] < 0.1 for row in record["matmuls"] if row["int8"])
    shares = [point["int8_flops_share"] for point in record["curve"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.99 and shares[-1] < 0.3
    assert record["curve"][-1]["relative_l2_error"] < record["curve"][0]["relative_l2_error"]


def test_the_search_stays_within_its_time_and_memory(exported):
    record = sensitivity(exported)
    assert record["seconds"] < 600 and record["peak_memory_mib"] < 8 * 1024


def test_the_same_seed_and_texts_give_the_same_graph_even_in_no_time(exported, tmp_path):
    digests = []
    for name in "ab":
        (tmp_path / name).mkdir()
        folder = copy_repository(exported, tmp_path / name)
        (folder / GRAPHS["INT8"]).unlink()
        options = ("--max-minutes", 0, "--target-cosine", 0.9, "--max-selection-texts", 8, "--results", tmp_path)
        succeed("quantize.py", "--only", "INT8", "--repository", folder, "--assets", exported.assets, *options)
        digests.append(common.sha256(folder / GRAPHS["INT8"]))
    assert digests[0] == digests[1]
    record = common.read_json(tmp_path / "all-MiniLM-L6-v2/sensitivity.json", "")
    assert record["time_was_over"] and len(record["curve"]) == 1 and record["int8_flops_share"] > 0.99


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--target-cosine", "1"), "expected mean cosine 1"),
        (("--target-cosine", "0.9999", "--max-minutes", "0"), "in 0 minutes"),
    ],
)
def test_a_target_that_is_missed_says_what_was_reached_and_leaves_the_graph(exported, tmp_path, options, word):
    before = common.sha256(exported.repository / GRAPHS["INT8"])
    places = ("--repository", exported.repository, "--assets", exported.assets, "--results", tmp_path)
    done = run("quantize.py", "--only", "INT8", "--max-selection-texts", 1, *options, *places)
    assert done.returncode == 1 and word in done.stderr and "found at best 0.9" in done.stderr, done.stderr
    assert common.sha256(exported.repository / GRAPHS["INT8"]) == before
    record = common.read_json(tmp_path / "all-MiniLM-L6-v2/sensitivity.json", "")
    assert record["reached"] is None and not any(row["int8"] for row in record["matmuls"])


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
    quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), {"matmul"})
    for zero_point, kind in ((3, TensorProto.INT8), (0, TensorProto.UINT8)):
        with pytest.raises(SystemExit, match="signed INT8 with zero point 0 at quantize_x"):
            quantize.check_quantization("g", small_quantized_graph(zero_point, kind), {"matmul"})
    for asked in ({"another"}, {"matmul", "another"}):
        with pytest.raises(SystemExit, match="another choice at another"):
            quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), asked)


def encode_two_texts(exported):
    served = quantize.load_tokenizer(exported.assets)
    return quantize.encode(served, ["A short text.", "Another one"], (common.INPUT_IDS, common.ATTENTION_MASK))


def test_padding_sets_no_range(exported):
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    encoded = encode_two_texts(exported)
    (tensor,) = {int8_graph.last_hidden_state(reference)}
    found = int8_search.capture_activations(reference, [tensor], encoded, 0)[tensor]
    assert found.shape == (encoded["ATTENTION_MASK"].sum(), 384) and len(found) == 10


@pytest.mark.parametrize(
    ("lines", "word"), [(["one short text"], "at least 16 texts"), (["x"] * 40, "tokens, found"), ([""], "found none")]
)
def test_too_few_calibration_texts_are_refused(exported, tmp_path, lines, word):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(lines) + "\n")
    before = common.sha256(exported.repository / GRAPHS["INT8"])
    places = ("--repository", exported.repository, "--assets", exported.assets, "--results", tmp_path)
    done = run("quantize.py", "--calibration-texts", texts, *places)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
    assert common.sha256(exported.repository / GRAPHS["INT8"]) == before


def test_texts_that_are_all_too_long_are_told(exported, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{i} " + "many words " * 100 for i in range(16)) + "\n")
    places = ("--repository", copy_repository(exported, tmp_path), "--assets", exported.assets, "--results", tmp_path)
    done = run("quantize.py", "--naive", "--only", "INT8", "--calibration-texts", texts, *places)
    assert done.returncode == 0 and "all 16 calibration texts are longer than the length" in done.stderr


def test_smoothing_alone_changes_nothing(exported):
    """With steps too fine to matter, the smoothed graph answers as the reference: the surgery is exact."""
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    index, random = int8_graph.GraphIndex(reference), np.random.default_rng(0)
    weights, recipes, places = int8_graph.matmul_weights(reference), {}, set()
    for tensor, names in int8_graph.matmul_groups(reference).items():
        width = len(weights[names[0]])
        recipe = {"offsets": random.normal(size=width).astype(np.float32) / 10, "weights": {}, "mean_errors": {}}
        recipe |= {"factors": random.uniform(0.5, 2, size=width).astype(np.float32), "scale": np.float32(0.1)}
        for name in names:
            recipe["weights"][name] = (np.zeros(weights[name].shape, np.int8), np.ones(weights[name].shape[1]))
            recipe["mean_errors"][name] = -recipe["offsets"] @ weights[name]
        recipes[tensor] = recipe
        others = [n for n in index.readers[tensor] if n.name not in names]
        places.add(int8_graph.smoothing_place(index, tensor, recipe, int8_graph.last_hidden_state(reference), others))
    assert places == {"linear", "layernorm", "mul"}
    chosen = [name for recipe in recipes.values() for name in recipe["weights"]]
    graph = int8_graph.insert_int8(reference, recipes, set(chosen))
    bypass_quantization(graph, weights, recipes)
    encoded = encode_two_texts(exported)
    expected = int8_search.run_graph(reference, encoded)
    assert int8_search.measure(graph, expected, encoded)["relative_l2_error"] < 1e-4


def bypass_quantization(graph, weights, recipes):
    """Read each activation before its Q/DQ, and each weight, multiplied by its factors, in float32."""
    producer = {output: node for node in graph.graph.node for output in node.output}
    scales = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    factors = {name: recipe["factors"] for recipe in recipes.values() for name in recipe["weights"]}
    for node in graph.graph.node:
        if node.name in weights:
            source = producer[producer[node.input[0]].input[0]]
            node.input[0] = source.input[0]
            step = scales[producer[node.input[1]].input[1]]  # one, or one over the next MatMul's factors
            weight = weights[node.name] * factors[node.name][:, None] * step
            node.input[1] = f"{node.name}/float"
            graph.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), node.input[1]))


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
