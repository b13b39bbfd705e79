"""perf.py: real levels on the real server, and windows that must be refused."""

import argparse
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, free_ports, run, start_server, succeed

import client
import perf
from core import files, tables
from serving import perf_analyzer


def perf_py(url, chain, folder, *options, **more):
    places = ("--repository", chain.repository, "--assets", chain.assets, "--results", folder)
    return run("perf.py", "--url", url, *places, *options, **more)


def read_perf(folder):
    return files.read_json(folder / "all-MiniLM-L6-v2/perf.json", "")


@pytest.fixture(scope="module")
def record(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perf")
    done = perf_py(chain.grpc, chain, folder, "--concurrency", 1, 4, "--window-s", 0.5, "--stability-percent", 60)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return read_perf(folder) | {"folder": folder / "all-MiniLM-L6-v2/perf"}


def test_every_model_is_measured_alone_at_every_level_in_order(record):
    assert [(r["model"], r["concurrency"]) for r in record["rows"]] == [(m, c) for m in perf.MODELS for c in (1, 4)]
    for row in record["rows"]:
        assert "error" not in row, row
        assert 0 < row["latency_p50_ms"] <= row["latency_p90_ms"] <= row["latency_p95_ms"] <= row["latency_p99_ms"]
        # Little's law: requests under way = throughput x mean latency
        under_way = row["throughput_infer_per_s"] * row["latency_mean_ms"] / 1e3
        assert under_way == pytest.approx(row["concurrency"], rel=0.25), row
        assert 0 < row["server_cpu_cores"] <= os.cpu_count() + 0.5


def test_the_memory_of_the_server_is_noted(record):
    assert record["server_memory_mib"] > 300  # five sessions of MiniLM


def test_dynamic_batching_is_seen_under_load(record):
    rows = {r["concurrency"]: r for r in record["rows"] if r["model"] == "ONNX"}
    assert rows[1]["mean_batch_size"] == 1 and list(rows[1]["batch_sizes"]) == ["1"]
    assert rows[4]["mean_batch_size"] > 1.2


def test_embedders_are_held_against_the_bare_session(record):
    assert set(record["bare_infer_per_s"]) == set(tables.EMBEDDERS)
    for row in record["rows"]:
        assert ("served_to_bare" in row) == (row["model"] in tables.EMBEDDERS)
    served = [
        r["served_to_bare"] for r in record["rows"] if r["model"] in ("ONNX", "TRT_FP32") and r["concurrency"] == 4
    ]
    assert min(served) > 0.6  # the report holds the measured ratio; this catches a server that halves it


def test_the_tokenizer_is_far_faster_than_an_embedder(record):
    speeds = {m: max(r["throughput_infer_per_s"] for r in record["rows"] if r["model"] == m) for m in perf.MODELS}
    assert speeds["tokenizer"] > 10 * max(speeds[m] for m in tables.EMBEDDERS)


def test_raw_output_is_kept(record):
    assert len(list(record["folder"].glob("*.csv"))) == len(record["rows"])


def test_http_and_a_batch_of_texts_per_request(chain, tmp_path):
    options = ("--protocol", "http", "--models", "TRT_FP16", "--concurrency", 2, "--batch-size", 4)
    done = perf_py(chain.http, chain, tmp_path, *options, "--window-s", 0.5, "--stability-percent", 60)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (row,) = read_perf(tmp_path)["rows"]
    assert row["batch_size"] == 4 and row["mean_batch_size"] >= 4


@pytest.mark.parametrize(
    ("measured", "called"), [("ONNX", "model_TRT_FP32"), ("ONNX", "model_ONNX"), ("ensemble", "model_ONNX")]
)
def test_a_window_that_something_else_called_into_is_refused(chain, tmp_path, measured, called):
    feeds = client.infer("tokenizer", "a text", ["INPUT_IDS", "ATTENTION_MASK"], chain.http, "http")
    stop = threading.Event()

    def disturb():
        import tritonclient.grpc as triton

        with triton.InferenceServerClient(chain.grpc) as connection:
            inputs = [triton.InferInput(name, list(array.shape), "INT64") for name, array in feeds.items()]
            for tensor, array in zip(inputs, feeds.values(), strict=True):
                tensor.set_data_from_numpy(array)
            while not stop.is_set():
                connection.infer(called, inputs)
                time.sleep(0.05)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        done = perf_py(chain.grpc, chain, tmp_path, "--models", measured, "--concurrency", 1, "--window-s", 0.5)
    finally:
        stop.set()
        thread.join()
    assert done.returncode == 1 and "refused" in done.stderr
    (row,) = read_perf(tmp_path)["rows"]
    assert f"inferences of {called} in the window" in row["error"] and "throughput_infer_per_s" not in row


def test_resume_measures_what_is_missing_and_nothing_else(chain, tmp_path):
    options = ("--models", "tokenizer", "--concurrency", 1, 2, "--window-s", 0.3, "--stability-percent", 100)
    assert perf_py(chain.grpc, chain, tmp_path, *options).returncode == 0
    path = tmp_path / "all-MiniLM-L6-v2/perf.json"
    record = read_perf(tmp_path)
    kept = record["rows"][1]
    files.write_json(path, record | {"rows": [{"model": "tokenizer", "concurrency": 1, "error": "refused"}, kept]})
    done = perf_py(chain.grpc, chain, tmp_path, *options, "--resume")
    assert done.returncode == 0 and done.stdout.count("infer/s") == 1
    again = read_perf(tmp_path)
    assert again["rows"][1] == kept and "error" not in again["rows"][0] and len(again["resumed"]) == 1
    other = perf_py(chain.grpc, chain, tmp_path, *options[:-3], 0.4, *options[-2:], "--resume")
    assert other.returncode == 1 and "settings" in other.stderr and "leave --resume out" in other.stderr


def test_a_level_that_never_settles_is_repeated_longer_and_marked(chain, tmp_path):
    options = ("--models", "ONNX", "--concurrency", 1, "--window-s", 0.4, "--stability-percent", 0.0001)
    done = perf_py(chain.grpc, chain, tmp_path, *options)
    assert done.returncode == perf.EXIT_UNSTABLE and "ONNX at concurrency 1" in done.stderr
    (row,) = read_perf(tmp_path)["rows"]
    assert row["stable"] is False and row["spread_percent"] > 0.0001 and len(row["window_throughputs"]) == 3
    assert row["throughput_infer_per_s"] == sorted(row["window_throughputs"])[1]
    assert "UNSTABLE" in done.stdout


def test_a_server_that_dies_leaves_the_finished_rows(chain, tmp_path):
    done, (http, grpc) = start_server(chain.repository)
    assert done.returncode == 0, done.stderr
    command = [
        sys.executable,
        str(ROOT / "perf.py"),
        "--url",
        f"127.0.0.1:{grpc}",
        "--repository",
        str(chain.repository),
    ]
    command += ["--assets", str(chain.assets), "--results", str(tmp_path), "--models", "tokenizer", "--window-s", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()  # the first level is done
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    rows = read_perf(tmp_path)["rows"]
    assert rows and "error" not in rows[0]


def test_an_empty_package_named_perf_analyzer_is_not_taken_for_the_tool(tmp_path, monkeypatch):
    fake = tmp_path / "perf_analyzer"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command, environment = perf_analyzer.find_perf_analyzer(False, tmp_path)
    assert command != [str(fake)] and perf_analyzer.runs(command[0], environment)


def test_a_tool_that_hangs_is_ended_and_tried_again(chain, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    tool = tmp_path / "perf_analyzer"
    tool.write_text(f"#!/bin/sh\necho x >> {calls}\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(perf, "WARMUP_TIMEOUT_S", 0.5)
    args = argparse.Namespace(
        url=chain.grpc, protocol="grpc", batch_size=1, window_s=1, quick=True, stability_percent=10
    )
    row = perf.measure(([str(tool)], None), args, "tokenizer", 1, tmp_path / "in.json", tmp_path / "out.csv")
    assert "found it waiting" in row["error"]
    assert calls.read_text().count("x") == perf.WINDOW_TRIES
    assert "sleep 60" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_docker_without_docker_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="expected a running Docker"):
        perf_analyzer.find_perf_analyzer(True, tmp_path)


def test_ranges_of_concurrency():
    assert perf.parse_range("1:4") == (1, 2, 3, 4) and perf.parse_range("2:8:3") == (2, 5, 8)


@pytest.mark.parametrize(
    "options",
    [("--concurrency-range", "4:1"), ("--concurrency-range", "a"), ("--concurrency", "0"), ("--batch-size", "9")],
)
def test_bad_usage_exits_2(options):
    assert run("perf.py", *options).returncode == 2


def test_no_server_is_one_clear_line(chain, tmp_path):
    (port,) = free_ports(1)
    done = perf_py(f"127.0.0.1:{port}", chain, tmp_path)
    assert done.returncode == 1 and "./serve.sh start" in done.stderr and "Traceback" not in done.stderr
