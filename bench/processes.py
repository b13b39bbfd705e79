"""A system's server: started on free ports, waited for, looked at from outside, and ended by its pid."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench import client, install
from bench.systems import SERVERS
from core.files import ROOT
from core.tables import EMBEDDERS

PORTS = ("http", "grpc", "metrics")
LINE = 300  # characters of a reason
MODEL_BY_MODEL = "model by model"
END_S = 45  # Triton waits for idle connections, and serve.sh for Triton


class NotMeasured(Exception):
    """A system that did not start, or does not answer any more; the text is the reason."""


@dataclass
class Server:
    """What runs of a system."""

    process: subprocess.Popen
    ports: dict
    log: Path
    started: float  # time.perf_counter() before it was


def free_ports():
    """{name: port that nothing listens on now}."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return dict(zip(PORTS, (each.getsockname()[1] for each in sockets), strict=True))


def fill(text, values):
    """A command's word or a variable's value with its {…} filled in; other braces stay."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def start(system, facts, folder):
    """Start a system's server; facts: {name: value} of what its command asks for. Raises NotMeasured."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports()
    python = install.python_of(system.requirements)
    own = {"root": ROOT, "servers": SERVERS, "work": folder, "python": python, "bin": python.parent}
    values = own | {"threads": len(os.sched_getaffinity(0))} | facts | ports
    argv = [fill(word, values) for word in shlex.split(system.command)]
    environment = os.environ | {name: fill(value, values) for name, value in system.environment.items()}
    log = folder / "server.log"
    began = time.perf_counter()
    try:
        with open(log, "wb") as output:
            # a session of its own: Ctrl-C reaches the measurement alone, which then ends all in order
            process = subprocess.Popen(
                argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )  # fmt: skip
    except OSError as error:
        raise NotMeasured(f"{argv[0]}: {error.strerror}") from None
    return Server(process, ports, log, began)


def last_line(path):
    """What a log says of an end: the last line that names an exception, else the last that is not empty."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if "NVML" not in line]  # Triton says so wherever there is no GPU
    named = [
        m[0] for m in (re.search(r"(?<![\w.])[\w.]*(Error|Exception|Fail)\b[^\\]*:[^\\]*", line) for line in lines) if m
    ]
    return (named or lines or ["nothing was said"])[-1][:LINE]


def wait_answer(system, server, service, request, expected, timeout_s):
    """Seconds from the start to the first right answer to a request. Raises NotMeasured."""
    found = None
    while time.perf_counter() - server.started < timeout_s:
        window = client.run_window(system, server.ports, service, [request], 1, 0, 1)
        found = client.read_answer(system, *window.answers[0][2:])
        if found and found[0] == expected[0]:
            return time.perf_counter() - server.started
        if server.process.poll() is not None:
            raise NotMeasured(f"it ended by itself: {last_line(server.log)}")
        time.sleep(0.02)
    wrong = f"answered {found}, expected {expected}" if found else last_line(server.log)
    raise NotMeasured(f"no right answer within {timeout_s:g} s: {wrong}")


def processes_of(server):
    """A server's process and all that it started."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(server.process.pid)
        return [process, *process.children(recursive=True)]
    return []


def memory_mib(server):
    """Proportional memory of a server with all its processes, MiB."""
    total = 0
    for process in processes_of(server):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            total += process.memory_full_info().pss
    return total / 2**20


def cpu_s(server):
    """CPU time of a server's processes so far, s."""
    total = 0
    for process in processes_of(server):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def triton_batches(system, server, service):
    """(executions, texts) that Triton has counted of the graph, or of the service where it has no graph of its own;
    None for another server."""
    if system.ask != "triton":
        return None
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['http']}/v2/models/stats", timeout=10) as answer:
        counted = {m["name"]: (m["execution_count"], m["inference_count"]) for m in json.load(answer)["model_stats"]}
    graphs = [counted[name] for name in EMBEDDERS.values() if counted.get(name, (0, 0))[0]]
    return tuple(map(sum, zip(*graphs, strict=True))) if graphs else counted.get(service)


def executed_by(system, server, service):
    """What answers on a Triton server: "OpenVINO, BF16, packed, 2 cores" in one pass; {} on another server."""
    if system.ask != "triton":
        return {}
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.ports['http']}/v2/models/{service}/config", timeout=10
    ) as answer:
        parameters = json.load(answer).get("parameters", {})
    return {"executed_by": parameters["one_pass"]["string_value"] if "one_pass" in parameters else MODEL_BY_MODEL}


def session_of(pid):
    """Number of a process's session; None where it is gone."""
    with contextlib.suppress(OSError):
        return os.getsid(pid)


def end(server):
    """End a server and all that it started, by their pids.

    A session outlives the process that made it: what was orphaned while its server ended is found by it.
    """
    sessions, deadline = {server.process.pid}, time.monotonic() + END_S
    try:
        # before it ends: afterwards nobody tells whose the children were
        sessions |= {session_of(process.pid) for process in processes_of(server)}
        server.process.terminate()
        while server.process.poll() is None and time.monotonic() < deadline:
            sessions |= {session_of(process.pid) for process in processes_of(server)}
            time.sleep(0.05)
    finally:  # also where a second Ctrl-C comes
        sessions -= {None, os.getsid(0)}
        left = []
        for pid in psutil.pids():
            if session_of(pid) in sessions:
                with contextlib.suppress(psutil.Error):
                    left.append(psutil.Process(pid))
                    left[-1].kill()
        psutil.wait_procs(left, timeout=5)
        server.process.poll()
