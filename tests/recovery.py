#!/usr/bin/env python3
"""Kill a service in five ways, overload it and stop it: how soon does it answer again, is any answer wrong or lost?

Reads:  --repository, a service's.
Writes: results/<model>/<machine>/recovery.json
Run:    python tests/recovery.py --repository build/reviews
Prints: for each kill the seconds until the next right answer; for the overload and the stop what became of the requests.

It starts its own server, with --supervise and --guard, on free ports, and stops it at the end. A kill is one signal. The
overload is a closed loop of far more clients than the guard lets in.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import free_ports

from core.files import RESULTS, ROOT, write_json
from core.record import environment_record, results_folder
from core.repository import read_card
from serving.health import read_question

# what is killed: a word of its command line, and the signal
KILLS = {
    "a model's process, SIGKILL": ("stub", signal.SIGKILL),
    "a model's process, SIGSTOP": ("stub", signal.SIGSTOP),
    "the server, SIGKILL": ("bin/tritonserver", signal.SIGKILL),
    "the server, SIGSTOP": ("bin/tritonserver", signal.SIGSTOP),
    "the guard, SIGKILL": ("haproxy", signal.SIGKILL),
}
GIVEN_UP_S = 120
BUSY = 429


def processes(port, word):
    """Process ids of the server of this HTTP port whose program has this word."""
    listing = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    marks = (f"triton-{port}-", f"serve/{port}/haproxy.pid")
    rows = [line.split(None, 2) for line in listing if any(mark in line for mark in marks) and "supervisor" not in line]
    return [int(row[0]) for row in rows if word in row[1]]


def ask(url, model, body, timeout_s):
    """(status or None, answer without its numbers' last digits)."""
    path = "infer" if "inputs" in body else "generate"
    request = urllib.request.Request(f"http://{url}/v2/models/{model}/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, rounded(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        error.read()
        return error.code, None
    except (OSError, ValueError):
        return None, None


def rounded(value):
    """The same with floats of three decimals."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def recover(url, question, right, kill, port):
    """Seconds from a kill to the first right answer; None where there is none in time."""
    word, what = kill
    (pid, *_) = processes(port, word)
    os.kill(pid, what)
    began = time.monotonic()
    time.sleep(0.2)
    while time.monotonic() - began < GIVEN_UP_S:
        if ask(url, *question, 2) == (200, right):
            return time.monotonic() - began
        time.sleep(0.2)
    return None


def load(url, question, right, clients, seconds):
    """(Counter of what became of the requests, seconds of each that was answered) under a closed loop."""
    counts, times, ends, lock = Counter(), [], time.monotonic() + seconds, threading.Lock()

    def client():
        while time.monotonic() < ends:
            began = time.monotonic()
            status, answer = ask(url, *question, 60)
            spent = time.monotonic() - began
            kind = "lost" if status is None else "refused" if status == BUSY else "failed" if status != 200 else None
            with lock:
                counts[kind or ("right" if answer == right else "wrong")] += 1
                times.extend([spent] if kind is None else [])
            if kind:
                time.sleep(0.1)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, sorted(times)


@contextlib.contextmanager
def served(repository, ports):
    """The service behind its guard and supervisor."""
    options = [word for name, port in zip(("http", "grpc", "metrics"), ports, strict=True) for word in (f"--{name}-port", str(port))]  # fmt: skip
    command = [
        ROOT / "serve.sh",
        "start",
        "--device",
        "cpu",
        "--supervise",
        "--guard",
        "--model-repository",
        repository,
    ]
    subprocess.run([*command, *options], check=True)
    try:
        yield
    finally:
        subprocess.run([ROOT / "serve.sh", "stop", *options[:2], "--drain-s", "5"], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30, help="of the overload (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=400, help="of the overload (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    card, ports = read_card(args.repository), free_ports(3)
    question, url = read_question(args.repository / "health.json"), f"127.0.0.1:{ports[0]}"
    record = {"model": card, "environment": environment_record(), "kills": {}}
    for name, kill in KILLS.items():
        with served(args.repository, ports):  # anew, for a supervisor waits longer before each further start
            _, right = ask(url, *question, 30)
            record["kills"][name] = recover(url, question, right, kill, ports[0])
            seconds = record["kills"][name]
            print(f"{name}: no answer" if seconds is None else f"{name}: {seconds:.1f} s", flush=True)
    with served(args.repository, ports):
        counts, times = load(url, question, right, args.clients, args.seconds)
        time.sleep(1)
        after = ask(url, *question, 30) == (200, right)
        record["overload"] = {"clients": args.clients, "seconds": args.seconds, "outcomes": dict(counts)}
        record["overload"] |= {"p99_s_of_answered": times[len(times) * 99 // 100], "right_a_second_later": after}
        print(f"overload: {record['overload']}")
    path = results_folder(args.results, card) / "recovery.json"
    write_json(path, record)
    print(path)
    if None in record["kills"].values() or not after or counts.keys() - {"right", "refused"}:
        raise SystemExit("expected right answers after every kill and under overload, found others above")


if __name__ == "__main__":
    main()
