"""client.py: metrics, gates on the real deviations, and what makes it fail."""

import csv

import numpy as np
import onnx
import pytest
from conftest import copy_repository, free_ports, run, start_server, succeed
from onnx import numpy_helper

import client
from core import files, metrics, tables


def result(results, name):
    """A result file: there is one model, on one machine."""
    (path,) = results.rglob(name)
    return path


def test_deviations_follow_their_definitions():
    reference = np.array([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    candidate = np.array([[[3.0, 4.5], [0.0, 1.0], [0.0, 0.0]]])
    mask = np.array([[1, 1, 0]])
    found = metrics.deviations(reference, candidate, mask)
    assert found["tokens"] == 2
    assert found["max_abs_error"] == 1.0
    assert found["mean_abs_error"] == pytest.approx((0.5 + 1 + 1) / 4)
    assert found["relative_l2_error"] == pytest.approx(np.sqrt(0.25 + 2) / np.sqrt(26))
    assert found["mean_cosine"] == pytest.approx((27 / (5 * np.hypot(3, 4.5)) + 0) / 2)
    assert found["argmax_flip_share"] == 0.5


def test_padding_does_not_count():
    reference, mask = np.ones((1, 4, 2)), np.array([[1, 1, 0, 0]])
    candidate = reference.copy()
    candidate[:, 2:] = 1e6
    assert metrics.deviations(reference, candidate, mask)["max_abs_error"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(value):
    reference = np.ones((1, 2, 2))
    candidate = reference.copy()
    candidate[0, 1, 0] = value
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 2 tokens of the candidate"):
        metrics.deviations(reference, candidate, np.ones((1, 2)))


def test_fp32_and_fp16_deviate_as_their_arithmetic_does(quality):
    averages = quality["averages"]
    assert averages["TRT_FP32"]["relative_l2_error"] < 1e-5
    assert 1e-5 < averages["TRT_FP16"]["relative_l2_error"] < 1e-2
    for plan in ("TRT_INT8", "TRT_BEST"):
        assert 1e-2 < averages[plan]["relative_l2_error"] <= 0.1
        assert averages[plan]["mean_cosine"] >= 0.99


def test_the_found_graphs_pass_their_gates(chain, quality, tmp_path):
    options = ("--repository", chain.repository, "--results", tmp_path, "--max-texts", 48)
    succeed("client.py", "--check", "--url", chain.http, *options)


def test_the_naive_int8_graph_fails_its_gate(chain, tmp_path):
    folder = copy_repository(chain, tmp_path)
    places = ("--repository", folder, "--results", tmp_path)
    succeed("quantize.py", "--naive", "--only", "INT8", *places)
    done, (http, _) = start_server(folder)
    assert done.returncode == 0, done.stderr
    try:
        checked = run("client.py", "--check", "--url", f"127.0.0.1:{http}", *places, "--max-texts", 12)
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    assert checked.returncode == 1 and "TRT_INT8: expected relative L2 error at most 0.12" in checked.stderr
    assert "TRT_BEST" not in checked.stderr and "TRT_FP16" not in checked.stderr


@pytest.mark.parametrize("precision", tables.SERVED)
def test_each_gate_can_fail(precision):
    gate = tables.PRECISIONS[precision].gate
    assert not client.failed_gates({f"TRT_{precision}": gate})
    for key, factor in (("relative_l2_error", 1.01), ("mean_cosine", 0.99)):
        assert len(client.failed_gates({f"TRT_{precision}": gate | {key: gate[key] * factor}})) == 1
    assert client.failed_gates({f"TRT_{precision}": {"error": "NaN"}})


def test_engines_are_those_the_server_reports(quality):
    assert set(quality["server"]["engines"].values()) == {"ONNX Runtime, CPU"}
    assert quality["model"]["name"] == "all-MiniLM-L6-v2"


def test_averages_are_those_of_the_texts(quality, chain):
    with open(result(chain.results, "quality.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["plan"] == "TRT_INT8"]
    assert len(rows) == quality["texts"]["count"] == 48
    average = quality["averages"]["TRT_INT8"]
    mean = np.mean([float(row["relative_l2_error"]) for row in rows])
    assert mean == pytest.approx(average["relative_l2_error"], rel=1e-4)
    assert max(float(row["max_abs_error"]) for row in rows) == pytest.approx(average["max_abs_error"], rel=1e-4)


def test_fp32_as_tf32_is_emulated_on_the_same_texts(quality):
    found, plain = quality["emulated"]["TF32"], quality["averages"]["TRT_FP32"]
    assert found["tokens"] == plain["tokens"] and found.keys() == plain.keys()
    assert 2**-15 < found["relative_l2_error"] < tables.PRECISIONS["TF32"].gate["relative_l2_error"]


def test_texts_stay_out_of_the_results_where_asked(chain, tmp_path):
    (tmp_path / "texts.txt").write_text("A secret of mine.\nAnother secret.\n")
    options = ("--repository", chain.repository, "--url", chain.http, "--texts", tmp_path / "texts.txt")
    for option, words in (((), True), (("--no-texts",), False)):
        done = succeed("client.py", *options, *option, "--results", tmp_path / "r")
        assert "FP32 as TF32" in done.stdout and "emulated on this CPU" in done.stdout
        written = result(tmp_path / "r", "quality.csv").read_text() + result(tmp_path / "r", "quality.json").read_text()
        assert ("secret" in written) is words


def test_check_quality_returns_each_plan(chain):
    found = client.check_quality("A short text.", chain.http)
    assert list(found) == ["TRT_FP32", "TRT_FP16", "TRT_INT8", "TRT_BEST"]
    assert found["TRT_FP32"]["tokens"] == 6  # [CLS] a short text . [SEP]


def test_grpc_gives_the_same_averages(chain, quality, tmp_path):
    options = ("--repository", chain.repository, "--results", tmp_path, "--max-texts", 48)
    succeed("client.py", "--protocol", "grpc", "--url", chain.grpc, *options)
    other = files.read_json(result(tmp_path, "quality.json"), "")["averages"]
    for plan, row in other.items():
        assert row["relative_l2_error"] == pytest.approx(quality["averages"][plan]["relative_l2_error"], rel=0.05)


def test_an_embedder_that_answers_nan_fails_the_run_and_is_named(chain, tmp_path):
    folder = copy_repository(chain, tmp_path)
    path = folder / "model_TRT_INT8/1/model.onnx"
    graph = onnx.load(path)
    path.unlink()  # a link to the graph that other tests use
    (bias,) = (i for i in graph.graph.initializer if i.name == "linear.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(2, np.nan, dtype=np.float32), bias.name))
    onnx.save(graph, path)
    done, (http, _) = start_server(folder)
    assert done.returncode == 0, done.stderr
    try:
        options = ("--repository", folder, "--results", tmp_path, "--max-texts", 3)
        measured = run("client.py", "--url", f"127.0.0.1:{http}", *options)
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    assert measured.returncode == 1 and "TRT_INT8" in measured.stderr and "NaN or Inf" in measured.stderr
    averages = files.read_json(result(tmp_path, "quality.json"), "")["averages"]
    assert "error" in averages["TRT_INT8"] and "error" not in averages["TRT_FP16"]


def test_a_server_with_another_model_than_the_file_is_refused(chain, tmp_path):
    folder = copy_repository(chain, tmp_path)
    path = folder / "model_ONNX/1/model.onnx"
    graph = onnx.load(path)
    path.unlink()  # a link to the graph that is served
    (weight,) = (i for i in graph.graph.initializer if i.name == "linear.bias")
    weight.CopyFrom(numpy_helper.from_array(np.array([3, -3], dtype=np.float32), weight.name))
    onnx.save(graph, path)
    for script in ("client.py", "perf.py"):
        url = chain.http if script == "client.py" else chain.grpc
        done = run(script, "--url", url, "--repository", folder, "--results", tmp_path / "r")
        assert done.returncode == 1 and "found another" in done.stderr, done.stderr
    assert not (tmp_path / "r").exists()


def test_a_url_with_a_scheme_is_one_clear_line(chain):
    done = run("client.py", "--url", f"http://{chain.http}", "--repository", chain.repository)
    assert done.returncode == 1 and "HOST:PORT" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server_is_one_clear_line(chain, protocol, tmp_path):
    (port,) = free_ports(1)
    options = ("--repository", chain.repository, "--results", tmp_path)
    done = run("client.py", "--protocol", protocol, "--url", f"127.0.0.1:{port}", *options)
    assert done.returncode == 1 and "./serve.sh start" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_texts_of_a_missing_or_empty_or_foreign_file_are_refused(chain, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, word in (("missing.txt", "found No such file"), ("empty.txt", "found none"), ("latin.txt", "UTF-8")):
        done = run("client.py", "--url", chain.http, "--repository", chain.repository, "--texts", tmp_path / name)
        assert done.returncode == 1 and word in done.stderr, done.stderr
