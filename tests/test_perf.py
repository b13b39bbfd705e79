"""perf.py: real levels on the real server, and windows that must be refused."""

import csv
import math
import os
import statistics
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import free_ports, run

import perf
from core import files, tables
from serving import load, server
from serving.levels import csv_name

MEASURED = ("ONNX", "TRT_INT8", "tokenizer", "ensemble")  # run.sh's test measures all


def perf_py(url, chain, folder, *options, **more):
    return run("perf.py", "--url", url, "--repository", chain.repository, "--results", folder, *options, **more)


def read_perf(folder):
    """(perf.json, its folder) of the one machine."""
    (path,) = folder.glob("all-MiniLM-L6-v2/*/perf.json")
    return files.read_json(path, ""), path.parent


@pytest.fixture(scope="module")
def measured(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perf")
    options = ("--quick", "--models", *MEASURED, "--concurrency", 1, 4, "--window-s", 0.5)
    done = perf_py(chain.grpc, chain, folder, *options, timeout_s=900)
    assert done.returncode in (0, perf.EXIT_UNSTABLE), done.stdout + done.stderr[-2000:]
    record, folder = read_perf(folder)
    return SimpleNamespace(record=record, rows=record["rows"], folder=folder)


def test_every_model_is_measured_alone_at_every_level_in_order(measured):
    levels = [(m, c) for m in MEASURED for c in (1, 4)]
    assert [(r["model"], r["concurrency"]) for r in measured.rows] == levels
    assert measured.record["planned"] == list(map(list, levels))
    for row in measured.rows:
        assert "error" not in row, row
        assert 0 < row["latency_p50_ms"] <= row["latency_p90_ms"] <= row["latency_p95_ms"]
        assert row["throughput_min_infer_per_s"] <= row["throughput_infer_per_s"] <= row["throughput_max_infer_per_s"]
        assert 0 < row["server_cpu_cores"] <= os.cpu_count() + 0.5


def test_littles_law_holds(measured):
    for row in measured.rows:  # requests under way = requests x their mean latency / seconds; fewer at a window's end
        seconds = sum(r["seconds"] for r in row["rounds"])
        under_way = row["n"] * row["latency_mean_ms"] / 1e3 / seconds
        assert 0.5 * row["concurrency"] < under_way < 1.05 * row["concurrency"], row


def test_n_is_the_requests_of_all_rounds_and_p99_needs_200_of_them(measured):
    for row in measured.rows:
        assert len(row["rounds"]) == load.ROUNDS and row["n"] == sum(r["requests"] for r in row["rounds"])
        assert (row["latency_p99_ms"] is None) == (row["n"] < load.P99_FROM)
        medians = [r["latency_p50_ms"] for r in row["rounds"]]
        assert min(medians) <= row["latency_p50_ms"] <= max(medians)
        assert sum(row.get("batch_sizes", {}).values()) <= row["n"]
    tokenizer = next(r for r in measured.rows if r["model"] == "tokenizer")
    assert tokenizer["latency_p99_ms"] >= tokenizer["latency_p95_ms"]


def test_the_models_are_measured_in_turn_round_by_round(measured):
    rows = [r for r in measured.rows if r["concurrency"] == 4 and "rounds_set_aside" not in r]
    starts = [[row["rounds"][number]["utc"] for row in rows] for number in range(load.ROUNDS)]
    assert sum(starts, []) == sorted(sum(starts, []))
    assert starts[0][-1] < starts[2][0]


def test_the_memory_of_the_server_is_noted(measured):
    assert measured.record["server_memory_mib"] > 300  # five sessions of MiniLM


def test_dynamic_batching_is_seen_under_load(measured):
    rows = {r["concurrency"]: r for r in measured.rows if r["model"] == "ONNX"}
    assert rows[1]["mean_batch_size"] == 1 and list(rows[1]["batch_sizes"]) == ["1"]
    assert rows[4]["mean_batch_size"] > 1.2


def test_embedders_are_held_against_the_bare_session(measured):
    assert set(measured.record["bare_infer_per_s"]) == set(MEASURED) & set(tables.EMBEDDERS)
    assert all(set(bare) == {"1", "8"} for bare in measured.record["bare_infer_per_s"].values())
    for row in measured.rows:
        assert ("served_to_bare" in row) == (row["model"] in tables.EMBEDDERS)


@pytest.mark.timing
def test_serving_does_not_halve_the_bare_speed(measured):
    rows = [r for r in measured.rows if r["model"] in ("ONNX", "TRT_FP32") and r["concurrency"] == 4]
    assert min(r["served_to_bare"] for r in rows) > 0.5  # the report holds the measured ratio


def test_the_tokenizer_is_far_faster_than_an_embedder(measured):
    speeds = {m: max(r["throughput_infer_per_s"] for r in measured.rows if r["model"] == m) for m in MEASURED}
    assert speeds["tokenizer"] > 10 * max(speeds[m] for m in MEASURED if m in tables.EMBEDDERS)


def test_the_raw_output_is_that_of_the_last_round(measured):
    assert len(list((measured.folder / "perf").glob("*.csv"))) == len(measured.rows)
    assert not (measured.folder / "perf.partial").exists()
    for row in measured.rows:
        path = measured.folder / "perf" / csv_name(row)
        (line,) = csv.DictReader(path.read_text().splitlines())
        if row["n"] > 600:  # of few requests, the tool's percentile is another than ours
            assert int(line["p50 latency"]) / 1e3 == pytest.approx(row["rounds"][-1]["latency_p50_ms"], rel=0.05), row


def test_http_and_a_batch_of_texts_per_request(chain, tmp_path):
    options = ("--protocol", "http", "--models", "TRT_FP16", "--concurrency", 2, "--batch-size", 4)
    done = perf_py(chain.http, chain, tmp_path, *options, "--window-s", 0.5, "--quick", "--stability-percent", 100)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (row,) = read_perf(tmp_path)[0]["rows"]
    assert row["batch_size"] == 4 and row["mean_batch_size"] >= 4
    assert sum(int(size) * count for size, count in row["batch_sizes"].items()) == 4 * row["n"]


@pytest.mark.parametrize(
    ("measured", "called"), [("ONNX", "model_TRT_FP32"), ("ONNX", "model_ONNX"), ("ensemble", "model_ONNX")]
)
def test_a_window_that_something_else_called_into_is_refused(chain, tmp_path, measured, called):
    feeds = server.infer("tokenizer", server.text_tensor(["a text"]), ["INPUT_IDS", "ATTENTION_MASK"], chain.http)
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            server.infer(called, feeds, ["EMBEDDING"], chain.grpc, "grpc")
            time.sleep(0.05)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        options = ("--models", measured, "--concurrency", 1, "--window-s", 0.2)
        done = perf_py(chain.grpc, chain, tmp_path, *options)
    finally:
        stop.set()
        thread.join()
    assert done.returncode == 1 and "refused" in done.stderr
    (row,) = read_perf(tmp_path)[0]["rows"]
    assert f"inferences of {called} in the window" in row["error"] and "throughput_infer_per_s" not in row


def test_a_level_that_never_settles_is_repeated_longer_and_marked(chain, tmp_path):
    options = ("--models", "tokenizer", "--concurrency", 1, "--window-s", 0.4, "--stability-percent", 0.0001)
    done = perf_py(chain.grpc, chain, tmp_path, *options)
    assert done.returncode == perf.EXIT_UNSTABLE and "tokenizer at concurrency 1" in done.stderr
    (row,) = read_perf(tmp_path)[0]["rows"]
    assert row["stable"] is False and row["spread_percent"] > 0.0001
    assert [r["requests"] for r in row["rounds"]] == [2 * r["requests"] for r in row["rounds_set_aside"]]
    assert row["throughput_infer_per_s"] == sorted(r["throughput_infer_per_s"] for r in row["rounds"])[1]
    assert "UNSTABLE" in done.stdout


# --- requests at a rate --------------------------------------------------------------


def test_requests_come_at_shares_of_the_best_throughput(chain, tmp_path):
    options = ("--quick", "--models", "tokenizer", "--concurrency", 4, "--window-s", 0.4, "--stability-percent", 1000)
    done = perf_py(chain.grpc, chain, tmp_path, *options, "--rates", 0.7, 0.3)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record, folder = read_perf(tmp_path)
    (closed,), rates = record["rows"], record["rates"]
    assert record["planned"] == [["tokenizer", 4]] and [row["share"] for row in rates] == [0.3, 0.7]
    for row in rates:
        assert "error" not in row, row
        assert row["asked_requests_per_s"] == pytest.approx(row["share"] * closed["throughput_infer_per_s"])
        assert row["throughput_infer_per_s"] < 1.5 * row["asked_requests_per_s"]
        assert row["n"] == sum(r["requests"] for r in row["rounds"]) and row["lost"] == 0
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"]
        assert (row["latency_p99_ms"] is None) == (row["n"] < load.P99_FROM)
        assert row["mean_batch_size"] >= 1 and row["server_queue_ms"] > 0
        assert (folder / "perf" / csv_name(row)).is_file()
        assert f"{row['asked_requests_per_s']:6.1f} requests/s" in done.stdout


@pytest.fixture
def level(tmp_path):
    return load.Level("ONNX", "model_ONNX", None, tmp_path / "in.json", 0.5, 20.0)


def gaps_of(level, requests):
    """Seconds between requests as they are handed to perf_analyzer."""
    *options, path = load.load_options(level, requests)
    assert options == ["--async", "--request-intervals"]
    return [int(line) / 1e6 for line in Path(path).read_text().split()]


def test_they_come_at_random_in_every_round_anew_and_as_many_as_asked_for(level):
    gaps = gaps_of(level, 2000)
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=1e-3)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 20, rel=0.1)  # as long as the mean: a Poisson process
    assert sum(gap < 1 / 40 for gap in gaps) / 2000 == pytest.approx(1 - math.exp(-1 / 2), abs=0.03)
    assert gaps == gaps_of(level, 2000)
    level.windows.append({})
    assert gaps != gaps_of(level, 2000)


@pytest.mark.parametrize(("quick", "window_s", "requests"), [(False, 1, 67), (False, 6, 120), (True, 1, 20)])
def test_three_windows_at_a_rate_have_a_p99(level, quick, window_s, requests):
    args, level.speed = SimpleNamespace(quick=quick, window_s=window_s), level.rate
    assert load.window_requests(args, level, 1) == requests and load.window_requests(args, level, 2) == 2 * requests


@pytest.mark.parametrize(
    "options",
    [("--concurrency", "a"), ("--concurrency", "0"), ("--batch-size", "9"), ("--rates", "0"), ("--rates", "1.1")],
)
def test_bad_usage_exits_2(options):
    assert run("perf.py", *options).returncode == 2


def test_no_server_is_one_clear_line(chain, tmp_path):
    (port,) = free_ports(1)
    done = perf_py(f"127.0.0.1:{port}", chain, tmp_path)
    assert done.returncode == 1 and "./serve.sh start" in done.stderr and "Traceback" not in done.stderr
