"""quantize.py: what is in the typed graphs, and which graphs its check refuses."""

import errno
import json
import os
import resource
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import copy_repository, run, run_here, succeed
from onnx import TensorProto, helper, numpy_helper

import quantize
from core import files, onnx_runtime, tables
from precision import int8_check, int8_graph, int8_search
from serving import repository

GRAPHS = {p: f"model_TRT_{p}/1/model.onnx" for p in tables.SERVED}


def load(exported, precision):
    return onnx.load(exported.repository / GRAPHS[precision])


@pytest.mark.parametrize("precision", tables.SERVED)
def test_typed_graph_keeps_the_tensors_of_the_reference(exported, precision):
    path = exported.repository / GRAPHS[precision]
    onnx.checker.check_model(str(path), full_check=True)
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    assert repository.graph_tensors(onnx.load(path)) == repository.graph_tensors(reference)


def test_fp32_is_the_reference_itself(exported):
    assert files.sha256(exported.repository / GRAPHS["FP32"]) == files.sha256(
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
    found = int8_check.quantized_matmuls(load(exported, precision))
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


def test_in_no_time_all_in_int8_are_measured_and_taken_where_they_meet_the_target(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    (folder / GRAPHS["INT8"]).unlink()
    options = ("--max-minutes", 0, "--target-cosine", 0.9, "--max-selection-texts", 8, "--results", tmp_path)
    succeed("quantize.py", "--only", "INT8", "--repository", folder, "--assets", exported.assets, *options)
    assert (folder / GRAPHS["INT8"]).is_file()
    record = files.read_json(tmp_path / "all-MiniLM-L6-v2/sensitivity.json", "")
    assert record["time_was_over"] and len(record["curve"]) == 1 and record["int8_flops_share"] > 0.99


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--target-cosine", "1"), "expected mean cosine 1 and"),
        (("--target-cosine", "0.9999", "--max-minutes", "0"), "in 0 minutes"),
        (("--target-l2", "1e-6", "--max-minutes", "0"), "raise --target-l2 or lower --min-int8-share, or give"),
    ],
)
def test_a_target_that_is_missed_says_what_was_reached_and_leaves_the_graph(exported, tmp_path, options, word):
    before = files.sha256(exported.repository / GRAPHS["INT8"])
    places = ("--repository", exported.repository, "--assets", exported.assets, "--results", tmp_path)
    done = run("quantize.py", "--only", "INT8", "--max-selection-texts", 1, *options, *places)
    assert done.returncode == 1 and word in done.stderr and "found at best INT8 0.9" in done.stderr, done.stderr
    assert files.sha256(exported.repository / GRAPHS["INT8"]) == before
    record = files.read_json(tmp_path / "all-MiniLM-L6-v2/sensitivity.json", "")
    assert record["reached"] is None and record["int8_flops_share"] is None
    assert not any(row["int8"] for row in record["matmuls"])


# --- the choice, on rows made up ------------------------------------------------------


def quality(cosine, error):
    return {"mean_cosine": cosine, "relative_l2_error": error}


TARGET = quality(0.99, 0.1)
CURVE = [
    (["a", "b", "c"], {"int8_flops_share": 1.0} | quality(0.98, 0.2)),
    (["b", "c"], {"int8_flops_share": 0.8} | quality(0.995, 0.09)),
    (["c"], {"int8_flops_share": 0.3} | quality(0.999, 0.01)),
]


def choose(min_share, best_of):
    """int8_search.choose where BEST has these qualities per number of MatMuls."""
    return int8_search.choose(CURVE, TARGET, min_share, lambda n: {"INT8": quality(1, 0), "BEST": best_of[len(n)]})


def test_the_largest_share_that_meets_the_target_is_chosen():
    chosen, tried = choose(0.1, {1: quality(1, 0), 2: quality(0.99, 0.1)})
    assert chosen == ["b", "c"] and [t["int8_flops_share"] for t in tried] == [0.8]


@pytest.mark.parametrize("missed", [quality(0.98, 0.01), quality(1, 0.2), quality(None, None)])
def test_where_best_misses_the_next_smaller_share_is_tried(missed):
    chosen, tried = choose(0.1, {1: quality(1, 0), 2: missed})
    assert chosen == ["c"] and [t["int8_flops_share"] for t in tried] == [0.8, 0.3] and tried[0]["BEST"] == missed


def test_where_best_misses_everywhere_nothing_is_chosen_and_what_was_tried_is_kept():
    chosen, tried = choose(0.5, {2: quality(0.5, 0.5)})
    assert chosen is None and [t["int8_flops_share"] for t in tried] == [0.8]
    assert choose(0.9, {}) == (None, [])


def test_the_curve_has_every_set_down_to_the_least_share_then_coarse_steps():
    shapes = dict.fromkeys("abcdefghij", (4, 5)) | {"k": (4, 100)}  # ten of 1/30, one of 2/3
    sets = int8_search.curve_sets("abcdefghijk", shapes, 0.9)
    shares = [int8_graph.flops_share(names, shapes) for names in sets]
    assert shares == pytest.approx([1, 29 / 30, 28 / 30, 0.9, 0.8, 0.7])
    assert sets[0] == list("abcdefghijk") and all(list(s) == list("abcdefghijk")[-len(s) :] for s in sets)


def test_the_most_squared_error_per_flop_goes_first_and_what_was_not_measured_last():
    rows = [("small", 0.1, 0.02), ("none", 0.1, None), ("large", 0.4, 0.03), ("much", 0.4, 0.05)]
    rows = [{"matmul": name, "flops_share": share, "relative_l2_error": error} for name, share, error in rows]
    assert int8_search.most_harmful_first(rows) == ["much", "small", "large", "none"]


def test_the_reason_says_what_happened():
    row = {"matmul": "a"}
    assert int8_search.reason(row, None) == "no graph met the target"
    assert int8_search.reason(row, ["a"]) == "the target is met with it"
    assert "missed with it" in int8_search.reason(row, ["b"])


def test_a_target_that_best_alone_misses_names_the_bound():
    args = SimpleNamespace(min_int8_share=0.5, max_minutes=1)
    tried = [{"int8_flops_share": 0.8, "INT8": quality(0.995, 0.09), "BEST": quality(0.995, 0.12)}]
    said = quantize.missed_target(args, TARGET, {"tried": tried, "curve": [], "time_was_over": False})
    assert said.startswith("--target-l2: expected") and "BEST 0.9950 and 0.120 with 80%" in said
    assert "raise --target-l2" in said and "--target-cosine" not in said


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("best", "share"), [(0.02, 1.0), (0.15, 0.75), (0.5, None)])
def test_the_record_of_a_search_claims_what_both_graphs_meet(monkeypatch, quick, best, share):
    """All in INT8 meet the target; BEST of all has this error, and less with fewer MatMuls."""
    shapes = dict.fromkeys("abcd", (8, 8))
    monkeypatch.setattr(int8_search, "weight_matmuls", lambda _: shapes)
    monkeypatch.setattr(int8_search, "run_graph", lambda *_: None)
    point = {"mean_cosine": 1.0, "relative_l2_error": 0.05}
    monkeypatch.setattr(int8_search.Search, "point", lambda _, n: {"int8_flops_share": len(n) / 4} | point)
    graphs = {n: {"INT8": point, "BEST": quality(1, best * 0.5 ** (4 - n))} for n in range(1, 5)}
    monkeypatch.setattr(int8_search.Search, "graphs", lambda _, names: graphs[len(names)])
    recipe = {"weights": shapes, "settings": {"alpha": 0.5, "offsets": True, "clip": 1.0}}
    chosen, found = int8_search.search_int8(None, {"x": recipe}, None, TARGET, 0.7, np.inf, None, quick)
    assert found["int8_flops_share"] == share and sum(row["int8"] for row in found["matmuls"]) == 4 * (share or 0)
    assert found["reached"] == (graphs[len(chosen)] if chosen else None)
    assert len(found["tried"]) == (1 if share == 1 else 2) and found["tried"][0]["BEST"] == graphs[4]["BEST"]


# --- a search that leaves MatMuls out -------------------------------------------------


@pytest.fixture(scope="module")
def searched(exported, tmp_path_factory):
    """Two runs with another order of sets each, and a target that all in INT8 miss."""
    texts = tmp_path_factory.mktemp("texts") / "texts.txt"
    texts.write_text("\n".join(files.split_texts(files.read_texts(files.TEXTS))[0][:24]) + "\n")
    runs = []
    for seed in "01":
        folder = tmp_path_factory.mktemp(f"searched{seed}")
        one = SimpleNamespace(repository=copy_repository(exported, folder), results=folder / "results", texts=texts)
        places = ("--repository", one.repository, "--assets", exported.assets, "--results", one.results)
        options = ("--calibration-texts", texts, "--target-l2", 0.045, "--min-int8-share", 0.5)
        succeed("quantize.py", *places, *options, env=os.environ | {"PYTHONHASHSEED": seed})
        runs.append(one)
    return runs


def test_a_strict_target_leaves_some_matmuls_in_floating_point(searched):
    record = sensitivity(searched[0])
    tried = [row for row in record["matmuls"] if row["relative_l2_error"] is not None]
    left_out = [row for row in tried if not row["int8"]]
    assert 0 < len(left_out) < len(tried) and 0.5 <= record["int8_flops_share"] < 0.99
    assert all("the target is missed with it" in row["why"] for row in left_out)
    assert record["target"]["relative_l2_error"] == 0.045
    for precision in ("INT8", "BEST"):
        found = int8_check.quantized_matmuls(load(searched[0], precision))
        assert found == {row["matmul"] for row in record["matmuls"] if row["int8"]}


def test_the_written_graphs_meet_the_strict_target(searched, exported):
    args = SimpleNamespace(calibration_texts=searched[0].texts, assets=exported.assets, max_selection_texts=32)
    parts, facts = quantize.load_texts(args, [tables.INPUT_IDS, tables.ATTENTION_MASK])
    record = sensitivity(searched[0])
    assert facts == record["texts"]
    expected = int8_search.run_graph(onnx.load(searched[0].repository / "model_ONNX/1/model.onnx"), parts["selection"])
    for precision in ("INT8", "BEST"):
        found = int8_search.measure(load(searched[0], precision), expected, parts["selection"])
        assert int8_search.meets(found, record["target"])
        assert found["relative_l2_error"] == pytest.approx(record["reached"][precision]["relative_l2_error"], rel=1e-3)


def test_the_order_of_sets_changes_no_graph(searched):
    for precision in ("FP16", "INT8", "BEST"):
        assert len({files.sha256(one.repository / GRAPHS[precision]) for one in searched}) == 1


def test_int8_and_best_of_two_searches_are_refused_together(searched, exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    assert run("repository.py", "--repository", folder).returncode == 0
    (folder / GRAPHS["BEST"]).unlink()
    os.link(searched[0].repository / GRAPHS["BEST"], folder / GRAPHS["BEST"])
    done = run("repository.py", "--repository", folder)
    assert done.returncode == 1 and "expected INT8 and BEST of one search" in done.stderr
    assert "run quantize.py" in done.stderr and "Traceback" not in done.stderr


def test_an_interruption_between_two_graphs_leaves_both_old_ones(exported, tmp_path):
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    paths = [tmp_path / name / "model.onnx" for name in ("INT8", "BEST")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("old")

    def graphs():
        yield paths[0], load(exported, "INT8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.write_graphs(graphs(), reference, dict.fromkeys(paths, {}))
    assert [path.read_text() for path in paths] == ["old", "old"] and not list(tmp_path.rglob("*.tmp"))


# --- the check of Q/DQ ----------------------------------------------------------------


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
    quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), {"matmul"})
    for zero_point, kind in ((3, TensorProto.INT8), (0, TensorProto.UINT8)):
        with pytest.raises(SystemExit, match="signed INT8 with zero point 0 at quantize_x"):
            quantize.check_quantization("g", small_quantized_graph(zero_point, kind), {"matmul"})
    for asked in ({"another"}, {"matmul", "another"}):
        with pytest.raises(SystemExit, match="another choice at another"):
            quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8), asked)


def test_check_refuses_quantization_without_a_zero_point():
    graph = small_quantized_graph(0, TensorProto.INT8)
    del graph.graph.node[0].input[2]  # unsigned then, as the operator defines it
    with pytest.raises(SystemExit, match="zero point 0 at quantize_x, found another or none"):
        quantize.check_quantization("g", graph, {"matmul"})


@pytest.mark.parametrize("between", [None, "Cast", "Transpose"])
def test_check_refuses_another_reader_than_a_matmul(between):
    more = [helper.make_node("Add", ["dx", "dx"], ["sum"], name="residual")]
    if between:
        more[0].input[0] = more[0].input[1] = "between"
        more.insert(0, helper.make_node(between, ["dx"], ["between"], **({"to": 10} if between == "Cast" else {})))
    with pytest.raises(SystemExit, match="alone behind dequantize_x, found Add residual"):
        quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8, more=more), {"matmul"})


@pytest.mark.parametrize(("steps", "axis"), [(None, 1), (4, 0), (4, 1), (3, 0), (1, 1)])
def test_check_refuses_weights_without_a_step_per_output_channel(steps, axis):
    with pytest.raises(SystemExit, match="expected a step per output channel of matmul, 3 on axis 1"):
        quantize.check_quantization("g", small_quantized_graph(0, TensorProto.INT8, steps, axis), {"matmul"})


def test_check_takes_a_gemm_with_its_weight_transposed():
    graph = small_quantized_graph(0, TensorProto.INT8, 4, 0)
    node = helper.make_node("Gemm", ["dx", "dw"], ["y"], name="matmul", transB=1)
    graph.graph.node[3].CopyFrom(node)
    quantize.check_quantization("g", graph, {"matmul"})
    node.attribute[0].i = 0
    graph.graph.node[3].CopyFrom(node)
    with pytest.raises(SystemExit, match="a step per output channel"):
        quantize.check_quantization("g", graph, {"matmul"})


# --- calibration texts ----------------------------------------------------------------


def encode_two_texts(exported):
    served = quantize.load_tokenizer(exported.assets)
    return quantize.encode(served, ["A short text.", "Another one"], (tables.INPUT_IDS, tables.ATTENTION_MASK))


def test_padding_sets_no_range(exported):
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    encoded = encode_two_texts(exported)
    (tensor,) = {int8_graph.last_hidden_state(reference)}
    found = int8_search.capture_activations(reference, [tensor], encoded, 0)[tensor]
    assert found.shape == (encoded["ATTENTION_MASK"].sum(), 384) and len(found) == 10


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["one short text"], "at least 16 different texts"),
        (["x"] * 40, "found 1 in"),
        ([str(i) for i in range(20)], "tokens, found"),
        ([""], "found none"),
    ],
)
def test_too_few_calibration_texts_are_refused(exported, tmp_path, lines, word):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(lines) + "\n")
    before = files.sha256(exported.repository / GRAPHS["INT8"])
    places = ("--repository", exported.repository, "--assets", exported.assets, "--results", tmp_path)
    done = run("quantize.py", "--calibration-texts", texts, *places)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
    assert files.sha256(exported.repository / GRAPHS["INT8"]) == before


def load_calibration_texts(exported, path, capsys):
    args = SimpleNamespace(calibration_texts=path, assets=exported.assets, max_selection_texts=32)
    _, facts = quantize.load_texts(args, [tables.INPUT_IDS, tables.ATTENTION_MASK])
    return facts, capsys.readouterr().err


def test_texts_that_measure_quality_calibrate_nothing(exported, tmp_path, capsys):
    calibration, measured = files.split_texts(files.read_texts(files.TEXTS))
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*calibration[:30], *calibration[:4], measured[0], f"  {measured[1].upper()} "]) + "\n")
    facts, said = load_calibration_texts(exported, path, capsys)
    assert facts["left_out"] == {"duplicates": 4, "quality_texts": 2}
    assert facts["calibration"] + facts["held_out"] == 30 and "WARNING: 2 calibration texts" in said
    path.write_text("\n".join(calibration[:30]) + "\n")
    clean, said = load_calibration_texts(exported, path, capsys)
    assert clean["sha256"] == facts["sha256"] and not said


def test_the_texts_that_measure_quality_alone_are_too_few(exported, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(files.split_texts(files.read_texts(files.TEXTS))[1]) + "\n")
    with pytest.raises(SystemExit, match="at least 16 different texts that do not measure quality, found 0"):
        load_calibration_texts(exported, path, capsys)


def test_a_missing_file_of_calibration_texts_names_its_option(exported, tmp_path):
    places = ("--repository", exported.repository, "--assets", exported.assets, "--results", tmp_path)
    done = run_here(quantize, "--calibration-texts", tmp_path / "none.txt", *places)
    assert done.returncode == 1 and "none.txt: expected a text file" in done.stderr
    assert "name one with --calibration-texts" in done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_bound_on_the_error_that_is_none_is_bad_usage(value):
    done = run_here(quantize, "--target-l2", value)
    assert done.returncode == 2 and "--target-l2: expected above 0" in done.stderr


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
    before = files.sha256(path)

    def ten_megabytes():  # a limit on the size of a file fails a write as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))

    places = ("--repository", folder, "--assets", exported.assets)
    done = run("quantize.py", "--only", "FP16", *places, preexec_fn=ten_megabytes)
    assert done.returncode != 0
    assert files.sha256(path) == before and not list(folder.rglob("*.tmp"))


def test_json_on_a_disk_without_room_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text("{}")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(SystemExit, match="record.json: expected room"):
        files.write_json(tmp_path / "record.json", {"a": 1})
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
    found = onnx_runtime.open_session(tmp_path / "g.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(found, [0.1, 0.1, -0.1, 0.3], atol=1e-3)
