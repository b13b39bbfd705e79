"""quantize.py: what is in the typed graphs it writes, and what it leaves as it was."""

import contextlib
import errno
import resource
from types import SimpleNamespace

import onnx
import pytest
from conftest import copy_repository, link_copy, run, run_here, succeed
from onnx import TensorProto

import quantize
from core import files, repository, tables
from precision import int8_check, int8_graph, makers
from serving import check

GRAPHS = {p: f"model_TRT_{p}/1/model.onnx" for p in tables.SERVED}


def sensitivity(one):
    """The record of a search: there is one model, on one machine."""
    (path,) = one.results.rglob("sensitivity.json")
    return files.read_json(path, "")


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


def test_sensitivity_has_every_matmul_and_a_reason(exported):
    record = sensitivity(exported)
    shapes = int8_graph.weight_matmuls(onnx.load(exported.repository / "model_ONNX/1/model.onnx"))
    assert {row["matmul"] for row in record["matmuls"]} == set(shapes)
    assert sum(row["flops_share"] for row in record["matmuls"]) == pytest.approx(1)
    assert all(row["why"] for row in record["matmuls"])
    assert all(0 < row["relative_l2_error"] < 0.1 for row in record["matmuls"] if row["int8"])
    shares = [point["int8_flops_share"] for point in record["curve"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.98 and shares[-1] < 0.3
    assert record["curve"][-1]["relative_l2_error"] < record["curve"][0]["relative_l2_error"]


def test_the_search_stays_within_its_time_and_memory(exported):
    record = sensitivity(exported)
    assert record["seconds"] < 600 and record["peak_memory_mib"] < 8 * 1024


def test_in_no_time_all_in_int8_are_measured_and_taken_where_they_meet_the_target(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    (folder / GRAPHS["INT8"]).unlink()
    options = ("--max-minutes", 0, "--target-cosine", 0.9, "--max-selection-texts", 8, "--results", tmp_path)
    succeed("quantize.py", "--only", "INT8", "--repository", folder, *options)
    assert (folder / GRAPHS["INT8"]).is_file()
    record = sensitivity(SimpleNamespace(results=tmp_path))
    assert record["time_was_over"] and len(record["curve"]) == 1 and record["int8_flops_share"] > 0.98


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
    places = ("--repository", exported.repository, "--results", tmp_path)
    done = run("quantize.py", "--only", "INT8", "--max-selection-texts", 1, *options, *places)
    assert done.returncode == 1 and word in done.stderr and "found at best INT8 0.9" in done.stderr, done.stderr
    assert files.sha256(exported.repository / GRAPHS["INT8"]) == before
    record = sensitivity(SimpleNamespace(results=tmp_path))
    assert record["reached"] is None and record["int8_flops_share"] is None
    assert not any(row["int8"] for row in record["matmuls"])


def test_a_service_has_configs_of_the_graphs_that_were_made_before_a_target_was_missed(tiny, tmp_path):
    repository_ = link_copy(tiny.repository, tmp_path / "tiny")
    places = ("--repository", repository_, "--results", tmp_path)
    done = run_here(quantize, "--target-l2", "1e-6", "--max-minutes", 0, *places)
    assert done.returncode == 1 and "raise --target-l2" in done.stderr, done.stderr
    assert repository.present(repository_) == ["ONNX", "TRT_FP32", "TRT_FP16"]
    done = run_here(check, "--repository", repository_)
    assert done.returncode == 0, done.stderr


def test_an_interruption_between_two_graphs_leaves_both_old_ones(exported, tmp_path, monkeypatch):
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    paths = {name: tmp_path / name / "model.onnx" for name in ("INT8", "BEST")}
    for path in paths.values():
        path.parent.mkdir()
        path.write_text("old")

    def make(precision, *_):
        if precision == "BEST":
            raise KeyboardInterrupt
        return load(exported, precision)

    monkeypatch.setattr(quantize, "make_graph", make)
    chosen = int8_check.quantized_matmuls(load(exported, "INT8"))
    with pytest.raises(KeyboardInterrupt):
        quantize.write_graphs(paths, tmp_path / "model.onnx", reference, makers.Learnt(chosen=chosen), {})
    assert [path.read_text() for path in paths.values()] == ["old", "old"] and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_bound_on_the_error_that_is_none_is_bad_usage(value):
    done = run_here(quantize, "--target-l2", value)
    assert done.returncode == 2 and "--target-l2: expected above 0" in done.stderr


def test_fp8_has_no_naive_recipe():
    done = run_here(quantize, "--naive", "--precisions", "INT8", "FP8")
    assert done.returncode == 2 and "--naive: expected no FP8 among --precisions" in done.stderr


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("FP16", (), "expected room for a copy of the graph, found: File too large; free some, or set TMPDIR"),
        ("INT8", ("--naive",), "model_TRT_INT8/1/model.onnx: expected room for it on the disk, found: File too large"),
    ],
)
def test_a_disk_without_room_leaves_the_graph_that_was_there(exported, tmp_path, precision, options, words):
    folder = copy_repository(exported, tmp_path)
    path = folder / GRAPHS[precision]
    before = files.sha256(path)

    def ten_megabytes():  # a limit on the size of a file fails a write as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))

    done = run("quantize.py", "--only", precision, *options, "--repository", folder, preexec_fn=ten_megabytes)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert files.sha256(path) == before and not list(folder.rglob("*.tmp"))


def test_json_on_a_disk_without_room_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text("{}")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(SystemExit, match="record.json: expected room"):
        files.write_json(tmp_path / "record.json", {"a": 1})
    assert (tmp_path / "record.json").read_bytes() == b"{}"


def test_a_folder_where_a_file_is_to_be_is_one_clear_line(tmp_path):
    (tmp_path / "build").mkdir()
    with pytest.raises(SystemExit, match="build: expected a place to write to, found: Is a directory; name another"):
        files.write_json(tmp_path / "build", {})
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_quick_measures_no_sensitivity_where_all_in_int8_meet_the_target(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    (folder / GRAPHS["INT8"]).unlink()
    options = ("--repository", folder, "--results", tmp_path, "--quick", "--only", "INT8", "--target-cosine", 0.9)
    succeed("quantize.py", *options)
    record = sensitivity(SimpleNamespace(results=tmp_path))
    assert record["texts"]["selection"] == 8 and record["int8_flops_share"] > 0.98 and not record["time_was_over"]
    assert all(row["relative_l2_error"] is None for row in record["matmuls"])


def test_quick_searches_where_all_in_int8_miss_the_target(monkeypatch, tmp_path):
    deadlines = []

    def search(reference, recipes, selection, task, target, min_share, deadline, precisions, attention):
        deadlines.append(deadline)
        return ({"a"} if len(deadlines) == 2 else None), {"time_was_over": False}

    monkeypatch.setattr(quantize, "find_recipes", lambda *_: {})
    monkeypatch.setattr(quantize, "search_int8", search)
    args = SimpleNamespace(quick=True, seed=0, max_minutes=1, min_int8_share=0.9, target_cosine=None, target_l2=None)
    args.results, args.attention = tmp_path, False
    parts = dict.fromkeys(("calibration", "held_out", "selection"))
    _, chosen, _ = quantize.find_int8(args, {"task": "embedding", "slug": "a"}, None, parts, {})
    assert chosen == {"a"} and deadlines[0] == 0 and deadlines[1] > 0


def test_a_packed_graph_of_an_older_search_does_not_stay(tmp_path):
    old = tmp_path / "packed.onnx"
    old.write_bytes(b"old")
    with contextlib.ExitStack() as stack:
        quantize.write_packed(old, None, stack, {})
    assert not old.exists()


def test_a_conversion_says_nothing_of_its_own(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    (folder / GRAPHS["FP16"]).unlink()
    done = succeed("quantize.py", "--only", "FP32", "FP16", "--repository", folder)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["FP32", "FP16"]
    assert done.stderr.splitlines() == [
        f"calibration: {sensitivity(exported)['texts']['calibration_tokens']} tokens of 96 texts"
    ]
