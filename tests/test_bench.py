"""bench/peers.py: its client and its arithmetic on made-up servers, and the real service of a tiny classifier."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
import report_data
from conftest import ROOT, run, run_here, save_classifier, tiny_config

from bench import arithmetic, client, install, peers, rounds
from bench.systems import PUBLISHED, System, named_system
from reporting.peers import best, versus

SYSTEM = System("made up", PUBLISHED, "")


# --- the client ----------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Answers by the text: what a server may do."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        if text == "slow":
            time.sleep(1)
        answer = {"label": "bad" if text == "other label" else "good", "score": 0.7 if text == "other score" else 0.9}
        body = b"<html>" if text == "no JSON" else json.dumps(answer).encode()
        self.send_response(500 if text == "refused" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.texts.append(text)

    def log_message(self, *_):
        pass


@contextmanager
def made_up_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.texts = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server, texts, concurrency, count, start=0):
    requests = client.make_requests(SYSTEM, "", texts)
    window = client.run_window(SYSTEM, {"http": server.server_port}, "", requests, concurrency, start, count)
    return window, arithmetic.describe_window(SYSTEM, window, [("good", 0.9)] * len(texts))


def test_every_kind_of_answer_is_counted_as_what_it_is(monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT_S", 0.3)
    texts = ["fine", "other label", "other score", "refused", "no JSON", "slow", "naïve 🙂"]
    with made_up_server() as server:
        window, row = ask(server, texts, 2, len(texts))
    assert row["answers"] == {"right": 2, "failed": 3, "wrong_label": 1, "wrong_score": 1}
    assert row["max_score_error"] == pytest.approx(0.2)
    assert len(row["latencies_ms"]) == 4  # a refusal is no work, nor is an answer that came too late
    assert row["texts_per_s"] == pytest.approx(4 / window.seconds)


def test_a_window_asks_for_its_texts_in_turn_and_sends_as_many_as_it_should():
    with made_up_server() as server:
        _, row = ask(server, ["a", "b", "c"], 1, 5, start=2)
    assert server.texts == ["c", "a", "b", "c", "a"] and row["answers"]["right"] == 5


def test_requests_are_under_way_together():
    with made_up_server() as server:
        window, row = ask(server, ["slow"], 4, 4)
    assert row["answers"]["right"] == 4 and window.seconds < 3


def test_a_server_that_is_gone_fails_every_request():
    with made_up_server() as server:
        pass
    _, row = ask(server, ["fine"], 2, 6)
    assert row["answers"]["failed"] == 6 and row["texts_per_s"] == 0


# --- arithmetic ----------------------------------------------------------------------


def window_row(system, number, speed, concurrency=8, **facts):
    right = {"right": 2, "failed": 0, "wrong_label": 0, "wrong_score": 0}
    row = {"system": system, "round": number, "concurrency": concurrency, "texts_per_s": speed, "answers": right}
    return (
        row | {"latencies_ms": [10.0, 30.0], "cpu_ms_per_text": 1.0, "max_score_error": 1e-6, "batches": None} | facts
    )


def test_a_ratio_is_to_the_same_round_and_its_median_is_of_the_rounds():
    speeds = {"project": (100, 50, 200), "peer": (50, 50, 50), "late": (None, 100, 100)}
    windows = [window_row(n, r, v) for n, values in speeds.items() for r, v in enumerate(values, 1) if v]
    windows.append(window_row("peer", 1, 7, concurrency=1))
    arithmetic.add_ratios(windows, "project")
    rows = {n: arithmetic.summarise([w for w in windows if w["system"] == n and w["concurrency"] == 8]) for n in speeds}
    assert rows["peer"]["ratio"] == {"median": 0.5, "min": 0.25, "max": 1}
    assert rows["late"]["ratio"] == {"median": 1.25, "min": 0.5, "max": 2} and rows["late"]["rounds"] == 2
    assert rows["peer"]["texts_per_s"]["median"] == 50 and rows["peer"]["answers"]["right"] == 6
    assert windows[-1]["ratio"] is None  # the project was not measured there
    record = {"windows": windows}
    assert versus(record, "project", "late", 8) == {"median": 1.25, "min": 0.5, "max": 2}
    assert versus(record, "project", "nobody", 8) is None


def test_latencies_and_batches_are_those_of_all_rounds_together():
    windows = [
        window_row("peer", 1, 1.0, latencies_ms=[1.0] * 100, batches=[10, 100], ratio=None),
        window_row("peer", 2, 1.0, latencies_ms=[2.0] * 99 + [9.0], batches=[50, 100], ratio=None),
    ]
    row = arithmetic.summarise(windows)
    assert (row["latency_p50_ms"], row["latency_p99_ms"], row["n"]) == (1.0, 2.0, 200)
    assert row["mean_batch_size"] == pytest.approx(200 / 60)
    assert arithmetic.summarise(windows[:1])["latency_p99_ms"] is None  # of too few requests


def test_the_best_peer_answers_all_rightly():
    def system(name, speed, kind=PUBLISHED, failed=0):
        answers = {"right": 9, "failed": failed, "wrong_label": 0, "wrong_score": 0}
        return {"name": name, "kind": kind, "levels": {"8": {"texts_per_s": {"median": speed}, "answers": answers}}}

    record = {"systems": [system("a", 5), system("b", 7), system("c", 9, failed=1), system("d", 9, "by hand")]}
    assert (
        best(record, PUBLISHED, 8) == "b" and best(record, "by hand", 8) == "d" and best(record, PUBLISHED, 1) is None
    )


# --- servers -------------------------------------------------------------------------


def start(tmp_path, code, timeout_s=30):
    """What becomes of a system that is a program of one line."""
    system = System("made up", PUBLISHED, f"{{python}} -c '{code}' {{http}}")
    args = SimpleNamespace(work=tmp_path, timeout_s=timeout_s)
    facts = {"service": "", "pid": tmp_path / "pid"}
    bench = rounds.Bench(args, [system], facts, ["fine"], [("good", 0.9)])
    with ExitStack() as stack:
        server = rounds.start(bench, [system], stack, "start_s")
    return server, bench.found["made up"].get("error")


def test_a_system_that_ends_at_once_is_not_measured_and_says_why(tmp_path):
    server, reason = start(tmp_path, 'print("loading"); raise OSError("no such checkpoint")')
    assert server is None and reason == "it ended by itself: OSError: no such checkpoint"


def test_a_command_that_is_not_there_is_not_measured(tmp_path):
    args = SimpleNamespace(work=tmp_path, timeout_s=5)
    system = System("absent", PUBLISHED, f"{tmp_path}/nowhere {{http}}")
    bench = rounds.Bench(args, [system], {"service": ""}, ["fine"], [("good", 0.9)])
    with ExitStack() as stack:
        assert rounds.start(bench, [system], stack, "start_s") is None
    assert "nowhere: No such file" in bench.found["absent"]["error"]


def test_a_system_that_never_answers_is_ended_with_its_children(tmp_path):
    child = 'subprocess.Popen(["sleep", "300"]).pid'
    code = f'import subprocess, time; open("{tmp_path}/pid", "w").write(str({child})); print("still loading", flush=True); time.sleep(300)'
    server, reason = start(tmp_path, code, timeout_s=3)
    assert server is None and reason == "no right answer within 3 s: still loading"
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_service_is_named_by_its_repository_or_its_command(tmp_path):
    row = named_system(f"INT8={tmp_path} --timeout-s 9")
    assert row.name == "INT8" and row.command.endswith(f"--model-repository {tmp_path} --timeout-s 9")
    assert named_system("old=other/serve.sh run --http-port {http}").command == "other/serve.sh run --http-port {http}"
    for text in ("INT8", "=x", "INT8=", f"INT8={tmp_path}/absent"):
        with pytest.raises(ValueError):
            named_system(text)


# --- the command ---------------------------------------------------------------------


def options(tiny, results, *others):
    given = ("--model", tiny.checkpoint, "--repository", tiny.repository, "--results", results)
    return (*given, "--concurrency", 1, 4, "--requests", 60, 120, "--rounds", 2, *others)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """peers.json of the project's own service and of a peer that is not installed."""
    folder = tmp_path_factory.mktemp("bench")
    patch = pytest.MonkeyPatch()
    patch.setattr(install, "BUILD", folder)
    patch.setattr(peers, "BUILD", folder)
    done = run_here(peers, *options(tiny, folder / "results", "--only", "project", "project, gRPC", "LitServe"))
    patch.undo()
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("results/*/*/peers.json")
    return SimpleNamespace(record=json.loads(path.read_text()), results=folder / "results", stdout=done.stdout)


def test_the_own_service_is_measured_over_both_protocols(measured):
    systems = {system["name"]: system for system in measured.record["systems"]}
    for name in ("project", "project, gRPC"):
        for concurrency, count in (("1", 120), ("4", 240)):
            level = systems[name]["levels"][concurrency]
            assert level["rounds"] == 2 and level["answers"] == {
                "right": count, "failed": 0, "wrong_label": 0, "wrong_score": 0,
            }  # fmt: skip
            assert level["texts_per_s"]["min"] > 0 and level["cpu_ms_per_text"] > 0
            assert 1 <= level["mean_batch_size"] <= int(concurrency)
        assert systems[name]["start_s"][0] > 0
        assert systems[name]["memory_idle_mib"] > 20 and systems[name]["memory_loaded_mib"] > 20
    assert systems["project"]["levels"]["4"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert len(measured.record["windows"]) == 8


def test_a_peer_that_is_not_installed_is_not_measured(measured):
    (peer,) = (s for s in measured.record["systems"] if s["name"] == "LitServe")
    assert peer["error"].startswith("not installed; --install") and not peer["levels"]
    assert "LitServe                 not measured: not installed" in measured.stdout


def test_the_report_shows_them(measured, tmp_path):
    report = tmp_path / "report.md"
    report.write_text("<!-- begin peers -->\n<!-- end peers -->\n")
    place = SimpleNamespace(results=measured.results, text=report)
    text = report_data.written(place)
    assert "÷ the best published peer" not in text  # none was measured
    (path,) = measured.results.glob("*/*/peers.json")
    assert "1.00 (1.00 to 1.00)" in path.with_name("tables.md").read_text()
    assert "LitServe (not installed" in text and "peers.png" in text
    assert path.with_name("peers.png").is_file() and report_data.report(place, "--check").returncode == 0
    record = json.loads(path.read_text())
    record["systems"][1]["kind"] = PUBLISHED
    path.write_text(json.dumps(record))
    text = report_data.written(place)
    assert "| project ÷ the best published peer (project, gRPC) |" in text


def test_an_export_of_other_weights_is_refused(tiny, tmp_path):
    config = tiny_config()
    config.initializer_range = 0.5
    other = save_classifier(tmp_path / "other", config)
    done = run("bench/peers.py", *options(SimpleNamespace(checkpoint=other, repository=tiny.repository), tmp_path))
    assert done.returncode == 1 and "found that of other weights" in done.stderr


@pytest.mark.parametrize("wrong", [("--only", "nobody"), ("--requests", 1), ("--system", "INT8"), ("--rounds", -1)])
def test_bad_usage(tiny, tmp_path, wrong):
    done = run("bench/peers.py", *options(tiny, tmp_path)[:-4], *wrong)
    assert done.returncode == 2, done.stderr


def test_ctrl_c_leaves_no_server(tiny, tmp_path):
    argv = [
        sys.executable,
        "-m",
        "bench.peers",
        *map(str, options(tiny, tmp_path, "--only", "project", "--rounds", 99)),
    ]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, servers = time.monotonic() + 60, []
    while not servers and process.poll() is None and time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):  # serve.sh's short commands come and go
            children = psutil.Process(process.pid).children(recursive=True)
            servers = [child for child in children if child.name() == "tritonserver"]
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert servers and process.returncode == 1 and "found an interruption" in stderr
    assert not any(alive(server.pid) for server in servers) and not list(tmp_path.glob("*/*"))
    running = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if any(str(tiny.repository) in word for word in words)]
