#!/usr/bin/env python3
"""Run a server, and start it anew when it dies or no longer answers a real question.

Reads:  the health.json of its repositories.
Writes: --state: supervisor.log, a line for each start and its reason; supervisor.prom, the count for Prometheus' textfile collector.
Run:    ./serve.sh start --supervise
Prints: what it writes to supervisor.log.

It waits longer before each further start, and gives up after so many starts within ten minutes. SIGTERM ends both.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from serving.health import find_fault, is_loaded, read_question

INTERVAL_S, TIMEOUT_S, FAULTS = 2, 5, 2  # between questions; for an answer; without one in a row
STARTING_S = 0.1  # between looks at a server that loads its models
LONGEST_WAIT_S, MOST_STARTS, WINDOW_S = 30, 10, 600
SET_DEATH_SIGNAL = 1  # of prctl(2)


def tell(state, words):
    """One line in the log."""
    line = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {words}"
    print(line, flush=True)
    with open(state / "supervisor.log", "a", encoding="utf-8") as log:
        log.write(line + "\n")


def start(command, folder):
    """The server in a group of its own, with what it starts, and in that folder; it ends when this process does."""
    die_with_us = lambda: ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)  # noqa: E731
    return subprocess.Popen(command, cwd=folder, start_new_session=True, preexec_fn=die_with_us)


def end(server, drain_s):
    """SIGTERM, and after the drain SIGKILL to all that the server started."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(drain_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def watch(server, url, questions, state):
    """Wait until the server is dead or no longer healthy; returns why. Notes in state/loaded that it has been healthy."""
    loaded, faults = False, 0
    while server.poll() is None:
        time.sleep(INTERVAL_S if loaded else STARTING_S)
        if not loaded:
            loaded = is_loaded(url)
            if loaded:
                (state / "loaded").touch()
            continue
        fault = next(filter(None, (find_fault(url, *question, TIMEOUT_S) for question in questions)), "")
        faults = faults + 1 if fault else 0
        if faults == FAULTS and server.poll() is None:
            return f"{FAULTS} faults in a row, {fault}"
    return f"it ended, exit {server.returncode}"


def supervise(args):
    """Start the server again and again; returns the exit status."""
    questions, starts = [read_question(path) for path in args.health], []
    server = None

    def stop(*_):
        if server:
            end(server, args.drain_s)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for number in range(sys.maxsize):
        (args.state / "supervisor.prom").write_text(f"supervisor_restarts_total {number}\n", encoding="utf-8")
        server = start(args.command, args.state)
        starts.append(time.monotonic())
        reason = watch(server, args.url, questions, args.state)
        end(server, 0)  # what is ill or dead has nothing to finish
        recent = [moment for moment in starts if moment > time.monotonic() - WINDOW_S]
        if len(recent) >= MOST_STARTS:
            tell(args.state, f"given up after {len(recent)} starts within {WINDOW_S} s: {reason}")
            return 1
        wait_s = min(2 ** (len(recent) - 1) - 1, LONGEST_WAIT_S)
        tell(args.state, f"start {number + 2} in {wait_s} s: {reason}")
        time.sleep(wait_s)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--url", required=True, help="HOST:PORT of the server's HTTP")
    parser.add_argument("--health", type=Path, action="append", default=[], help="a repository's health.json")
    parser.add_argument("--drain-s", type=float, default=30, help="for requests in flight (default: %(default)g)")
    parser.add_argument("command", nargs="+", help="of the server, behind --")
    sys.exit(supervise(parser.parse_args()))


if __name__ == "__main__":
    main()
