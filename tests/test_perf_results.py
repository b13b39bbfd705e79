"""perf.py: what it leaves on disk when it ends early, and that nothing of perf_analyzer goes on."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, start_server, succeed
from test_perf import perf_py, read_perf

import perf
from core import files
from serving import levels, load, perf_analyzer, server

OPTIONS = ("--models", "tokenizer", "--window-s", 0.3, "--stability-percent", 1000)


def start_perf(url, chain, folder, *options, environment=None):
    """perf.py in the background."""
    argv = [sys.executable, ROOT / "perf.py", "--url", url, "--repository", chain.repository, "--results", folder]
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, [*argv, *options])), stdout=pipe, stderr=pipe, text=True, env=environment)


def contents(folder):
    """{name: bytes} of perf.json and perf/."""
    return {path.name: path.read_bytes() for path in (folder / "perf.json", *sorted((folder / "perf").iterdir()))}


@pytest.fixture
def earlier(chain, tmp_path):
    """Results of an earlier run: their folder."""
    done = perf_py(chain.grpc, chain, tmp_path, *OPTIONS, "--concurrency", 1, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_perf(tmp_path)[1]


# --- ended early ---------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_the_earlier_results_whole_and_the_next_takes_its_levels_in(
    chain, tmp_path, earlier, end
):
    before = contents(earlier)
    process = start_perf(chain.grpc, chain, tmp_path, *OPTIONS, "--concurrency", 1, 3, 4)
    process.stdout.readline()  # the first level is done
    process.send_signal(end)
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, perf.EXIT_UNSTABLE) and "Traceback" not in errors
    assert end == signal.SIGTERM or ("perf.partial" in errors and "found: an interruption" in errors)
    assert contents(earlier) == before
    (first, *_) = files.read_json(earlier / "perf.partial/perf.json", "")["rows"]

    # what the interrupted one had sent may still be counted in the first try's window, which is refused then
    codes = (perf_py(chain.grpc, chain, tmp_path, *OPTIONS, "--concurrency", 4).returncode for _ in range(2))
    assert 0 in codes
    record, _ = read_perf(tmp_path)
    rows = {row["concurrency"]: row for row in record["rows"]}
    assert list(rows) == [1, 2, 4] or list(rows) == [1, 2, 3, 4]
    assert rows[1] == first and rows[2] == json.loads(before["perf.json"])["rows"][1]
    assert len(record["earlier_environments"]) == 2 and not (earlier / "perf.partial").exists()
    assert len(list((earlier / "perf").iterdir())) == len(rows)


def test_a_refused_level_leaves_the_earlier_results_whole(chain, tmp_path, earlier):
    before = contents(earlier)
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            server.infer("tokenizer", server.text_tensor(["a text"]), ["INPUT_IDS"], chain.grpc, "grpc")
            time.sleep(0.02)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        done = perf_py(chain.grpc, chain, tmp_path, *OPTIONS, "--concurrency", 1)
    finally:
        stop.set()
        thread.join()
    assert done.returncode == 1 and "refused" in done.stderr and "perf.partial" in done.stderr
    assert contents(earlier) == before


def test_results_of_other_settings_are_replaced_whole(chain, tmp_path, earlier):
    options = ("--models", "tokenizer", "--window-s", 0.2, "--stability-percent", 1000, "--concurrency", 2)
    assert perf_py(chain.grpc, chain, tmp_path, *options).returncode == 0
    record, _ = read_perf(tmp_path)
    assert [row["concurrency"] for row in record["rows"]] == [2] and "earlier_environments" not in record
    assert [path.name for path in (earlier / "perf").iterdir()] == ["tokenizer_concurrency_2.csv"]


def test_a_server_that_dies_leaves_the_finished_rows(chain, tmp_path):
    done, (http, grpc) = start_server(chain.repository)
    assert done.returncode == 0, done.stderr
    process = start_perf(f"127.0.0.1:{grpc}", chain, tmp_path, "--models", "tokenizer", "--window-s", 0.2)
    try:
        process.stdout.readline()  # the first level is done
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    (path,) = tmp_path.glob("all-MiniLM-L6-v2/*/*/perf.json")
    assert "perf.partial" in errors and path.parent.name == "perf.partial"
    rows = files.read_json(path, "")["rows"]
    assert rows and "error" not in rows[0]


def row(model, concurrency, **values):
    return {"model": model, "concurrency": concurrency, **values}


def record(rows, environment):
    planned = [[r["model"], r["concurrency"]] for r in rows]
    return {"rows": rows, "rates": [], "planned": planned, "bare_infer_per_s": {}, "environment": environment}


def test_a_refused_level_never_replaces_a_measured_one():
    old = record([row("ONNX", 1, n=3), row("tokenizer", 1, error="old")], "first")
    new = record([row("tokenizer", 1, n=4), row("ONNX", 1, error="new"), row("ONNX", 2, error="new")], "second")
    merged = levels.merge(old, new)
    assert merged["rows"] == [row("ONNX", 1, n=3), row("ONNX", 2, error="new"), row("tokenizer", 1, n=4)]
    assert merged["earlier_environments"] == ["first"] and merged["environment"] == "second"


def rate(model, share, n):
    return {"model": model, "share": share, "n": n}


def test_the_rates_of_a_model_are_replaced_together_and_stay_where_it_was_not_measured_again():
    old = record([row("ONNX", 1)], "first") | {
        "rates": [rate("ONNX", s, 1) for s in (0.3, 0.7)] + [rate("ensemble", 0.3, 1)]
    }
    new = record([row("ONNX", 2)], "second") | {"rates": [rate("ONNX", 0.5, 2)]}
    merged = levels.merge(old, new)
    assert merged["rates"] == [rate("ONNX", 0.5, 2), rate("ensemble", 0.3, 1)]
    assert levels.merge(old, record([row("ONNX", 2)], "second"))["rates"] == old["rates"]
    del old["rates"]  # of an older version
    assert levels.merge(old, new)["rates"] == new["rates"]


# --- the tool ------------------------------------------------------------------------


def write_program(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n" + lines)
    path.chmod(0o755)
    return path


def test_an_empty_package_named_perf_analyzer_is_not_taken_for_the_tool(tmp_path, monkeypatch):
    fake = write_program(tmp_path / "perf_analyzer", "exit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool = perf_analyzer.find_perf_analyzer(False, tmp_path)
    assert tool.command != [str(fake)] and perf_analyzer.runs(tool.command[0], tool.environment)


def test_a_tool_that_hangs_is_ended_and_tried_again(chain, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    tool = write_program(tmp_path / "perf_analyzer", f"echo x >> {calls}\nexec sleep 61.25\n")
    monkeypatch.setattr(load, "WARMUP_TIMEOUT_S", 0.5)
    args = argparse.Namespace(url=chain.grpc, protocol="grpc", batch_size=1, quick=True)
    level = load.Level("tokenizer", "tokenizer", 1, tmp_path / "in.json")
    load.measure_window(perf_analyzer.Tool([str(tool)], None, None), args, level, 1)
    assert "found it waiting" in level.error and calls.read_text().count("x") == load.TRIES
    assert "sleep 61.25" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_request_without_an_answer_refuses_the_window(tmp_path):
    requests = [{"timestamp": 1, "response_timestamps": times} for times in ([2], [], [3])]
    (tmp_path / "answer").write_text(json.dumps({"experiments": [{"requests": requests}]}))
    tool = write_program(
        tmp_path / "perf_analyzer", f"cp {tmp_path}/answer {tmp_path}/times.json; touch {tmp_path}/window.csv\n"
    )
    with pytest.raises(perf_analyzer.Refused, match="expected 3 requests, found 2"):
        perf_analyzer.run_requests(perf_analyzer.Tool([str(tool)], None, None), [], 3, tmp_path, 60)


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A stand-in named docker on PATH. Its container is a process of a session of its own, that only rm ends."""
    folder = tmp_path / "docker-stand-in"
    write_program(
        folder / "docker",
        f"""case $1 in
run) for option; do case $option in --name=*) name=${{option#--name=}} ;; esac; done
  setsid sleep 300 >/dev/null 2>&1 </dev/null & echo $! >"{folder}/$name"; wait ;;
rm) read -r pid <"{folder}/$3" && kill "$pid" && mv "{folder}/$3" "{folder}/removed" ;;
esac
""",
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_hung_container_is_removed(docker, tmp_path):
    tool = perf_analyzer.find_perf_analyzer(True, tmp_path)
    with pytest.raises(perf_analyzer.Hung):
        perf_analyzer.run_tool(tool, [], 1)
    assert not running(docker)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_container_of_an_interrupted_run_is_removed(chain, docker, tmp_path, end):
    process = start_perf(chain.grpc, chain, tmp_path, *OPTIONS, "--docker", environment=dict(os.environ))
    deadline = time.monotonic() + 60
    while not list(docker.glob("perf_analyzer-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not running(docker)


def running(docker):
    """Whether the stand-in's container goes on."""
    pid = (docker / "removed").read_text().strip()  # rm was called with the name that run was given
    return (
        subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()[:1] not in "Z"
    )


def test_docker_without_docker_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="expected a running Docker"):
        perf_analyzer.find_perf_analyzer(True, tmp_path)
