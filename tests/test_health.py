"""serve.sh over a server's whole life: one start at a time, the truth of its state, kills, and requests in flight."""

import http.server
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from any_models import WORDS, WORDS_CONFIG
from conftest import ROOT, free_ports, link_copy, run, succeed

from serving.health import find_fault, read_question

BACK_WITHIN_S = 40  # on a busy machine; alone it takes half of that


def serve(command, place, *options, **more):
    ports = ("--http-port", place.http, "--grpc-port", place.grpc, "--metrics-port", place.metrics)
    return run("serve.sh", command, "--device", "cpu", "--model-repository", place.repository, *ports, *options, **more)


@pytest.fixture
def place(tiny):
    """A repository and ports; whatever runs there is stopped at the end."""
    http, grpc, metrics = free_ports(3)
    found = SimpleNamespace(repository=tiny.repository, http=http, grpc=grpc, metrics=metrics)
    yield found
    run("serve.sh", "stop", "--http-port", http, "--drain-s", 1)


def ask(place, model="tiny", timeout_s=30, **body):
    """Status of a request; None where nobody answers."""
    asked = body or {"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a text"]}]}
    url = f"http://127.0.0.1:{place.http}/v2/models/{model}/{'generate' if body else 'infer'}"
    try:
        request = urllib.request.Request(url, json.dumps(asked).encode())
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def ask_health(port, question, *options):
    return run("serving.health", "--url", f"127.0.0.1:{port}", *options, question)


class Slow(http.server.BaseHTTPRequestHandler):
    """A live server whose model answers too late."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        time.sleep(3)

    def log_message(self, *_):
        pass


def test_a_busy_server_is_well_for_a_patient_question_alone_and_a_dead_one_for_none(tmp_path):
    question = tmp_path / "health.json"
    question.write_text(json.dumps({"model": "m", "body": {"inputs": []}}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert ask_health(server.server_port, question, "--timeout-s", 1, "--patient").returncode == 0
    usual = ask_health(server.server_port, question, "--timeout-s", 1)
    assert usual.returncode == 1 and "no answer within 1 s" in usual.stderr
    server.shutdown()
    server.server_close()
    assert ask_health(server.server_port, question, "--patient").returncode == 1


def pids(place, words):
    """Processes of the server of this port whose command line has these words."""
    listing = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    own = (f"triton-{place.http}-", f"--http-port={place.http}")
    return [int(line.split()[0]) for line in listing if words in line and any(mark in line for mark in own)]


def regions(place):
    return list(Path("/dev/shm").glob(f"triton-{place.http}-*"))


def test_of_two_starts_at_once_one_wins_and_the_other_says_so(place):
    done = []
    threads = [threading.Thread(target=lambda: done.append(serve("start", place))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(d.returncode for d in done) == [0, 1]
    loser = next(d for d in done if d.returncode)
    assert "one start or stop at a time" in loser.stderr or "found ours running" in loser.stderr
    assert ask(place) == 200 and len(pids(place, "bin/tritonserver")) == 1


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_in_the_environment_does_not_stand_between(place, name):
    environment = os.environ | {name: "http://127.0.0.1:9", "PYTHONPATH": "/nowhere"}
    done = serve("start", place, env=environment)
    assert done.returncode == 0, done.stderr
    assert run("serve.sh", "status", "--http-port", place.http, env=environment).returncode == 0


@pytest.mark.parametrize("port", ["0", "65536", "70000", "-1"])
def test_a_port_that_there_is_not_is_bad_usage(port):
    done = run("serve.sh", "start", "--http-port", port)
    assert done.returncode == 2 and port in done.stderr


@pytest.mark.parametrize("name", ["a folder", "Käse", "it's", "a;b", "$(touch pwned)"])
def test_a_path_that_a_shell_would_read_otherwise_is_refused(place, tmp_path, name):
    place.repository = link_copy(place.repository, tmp_path / name / "tiny")
    done = serve("start", place, cwd=tmp_path)
    assert done.returncode == 1 and "expected a path of letters" in done.stderr, done.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_status_tells_that_a_models_process_is_dead_and_nothing_stays_of_it(place):
    assert serve("start", place, "--path", "ensemble").returncode == 0
    (stub,) = pids(place, "tokenizer/1/model.py")
    os.kill(stub, signal.SIGKILL)
    done = run("serve.sh", "status", "--http-port", place.http)
    assert done.returncode == 1 and "not healthy" in done.stderr and "does not answer" in done.stderr
    patient = ask_health(place.http, place.repository / "health.json", "--patient")
    assert patient.returncode == 1 and "Stub process" in patient.stderr  # an error is none that passes
    (server,) = pids(place, "bin/tritonserver")
    os.kill(server, signal.SIGKILL)
    succeed("serve.sh", "stop", "--http-port", place.http)
    assert not pids(place, "stub") and not regions(place)


KILLS = {
    "a model's process": lambda place: os.kill(pids(place, "stub")[0], signal.SIGKILL),
    "a model's process stalls": lambda place: os.kill(pids(place, "stub")[0], signal.SIGSTOP),
    "the server": lambda place: os.kill(pids(place, "bin/tritonserver")[-1], signal.SIGKILL),
    "the server, gently": lambda place: os.kill(pids(place, "bin/tritonserver")[-1], signal.SIGTERM),
    "all of them": lambda place: [os.kill(p, signal.SIGKILL) for p in (*pids(place, "stub"), pids(place, "bin/tritonserver")[-1])],
}  # fmt: skip


def test_a_supervised_server_is_back_after_any_kill(place):
    done = serve("start", place, "--supervise")
    assert done.returncode == 0, done.stderr
    log = ROOT / "build/serve" / str(place.http) / "supervisor.log"
    for number, kill in enumerate(KILLS.values(), 1):
        kill(place)
        deadline = time.monotonic() + BACK_WITHIN_S
        lines = lambda: log.read_text().splitlines() if log.is_file() else []  # noqa: E731
        while time.monotonic() < deadline and not (len(lines()) == number and ask(place, timeout_s=2) == 200):
            time.sleep(0.3)
        assert len(lines()) == number and ask(place) == 200, lines()
        if number == 2:  # enough to see; each further start waits longer
            break
    assert "faults in a row, tiny" in log.read_text() and "start 2 in 0 s" in log.read_text()
    assert log.with_suffix(".prom").read_text() == "supervisor_restarts_total 2\n"
    stopped = succeed("serve.sh", "stop", "--http-port", place.http)
    assert "stopped" in stopped.stdout and not pids(place, "") and not regions(place)


def test_stop_waits_for_the_requests_in_flight_and_loses_none(place, tmp_path):
    place.repository = link_copy(place.repository, tmp_path / "tiny")
    slow = place.repository / "words"
    (slow / "1").mkdir(parents=True)
    (slow / "1/model.py").write_text(WORDS)
    (slow / "config.pbtxt").write_text(WORDS_CONFIG)
    start = 'source "$1"; check() { questions=(); clean_up; }; shift; main "$@"'  # its check knows no such models
    ports = ("--http-port", place.http, "--grpc-port", place.grpc, "--metrics-port", place.metrics)
    command = ["bash", "-c", start, "_", ROOT / "serve.sh", "start", "--device", "cpu", "--path", "ensemble", *ports]
    done = subprocess.run([*map(str, command), "--model-repository", place.repository], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(place, "words", 60, TEXT="wait"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert "stopped" in succeed("serve.sh", "stop", "--http-port", place.http).stdout
    for thread in threads:
        thread.join()
    assert answers == [200] * 8


def test_a_service_that_is_late_but_answers_others_is_busy_and_not_ill(place):
    assert serve("start", place).returncode == 0
    url, question = f"127.0.0.1:{place.http}", read_question(place.repository / "health.json")
    enough = threading.Event()

    def ask_on():
        while not enough.is_set():
            ask(place)

    threads = [threading.Thread(target=ask_on) for _ in range(256)]
    for thread in threads:
        thread.start()
    found = [find_fault(url, *question, 0.2) for _ in range(10)]
    enough.set()
    for thread in threads:
        thread.join()
    assert "" in found
    (stub,) = pids(place, "triton_python_backend_stub")
    os.kill(stub, signal.SIGSTOP)
    # Triton notices a stopped stub by itself, sooner or later than the question's second is over
    fault = find_fault(url, *question, 1)
    assert "no answer within 1 s" in fault or "is not healthy" in fault
    os.kill(stub, signal.SIGKILL)
