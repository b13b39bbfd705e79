#!/usr/bin/env python3
"""Ask several servers behind HAProxy while one is killed, one hangs, and all are restarted: is any answer lost or wrong?

Reads:  --repository, a classifier's service.
Writes: results/<model>/<machine>/failover.json
Run:    python tests/failover.py --repository build/reviews
Prints: for each fault, protocol and client: requests, lost, wrong, p99 and the slowest answer in s.

Requests come at random times (Poisson), a third as many as the servers can answer, whether earlier ones are answered or
not. Half of them go over HTTP, half over gRPC; half are asked once, half again by serving/retry.py. Lost is what has no
answer within its deadline. The truth is the graph without a server. It starts and stops its own servers.
"""

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from soak import expected_answers

from core.files import RESULTS, ROOT, TEXTS, read_texts, write_json
from core.record import environment_record, results_folder
from core.repository import read_card
from core.tables import LOGITS, TEXT
from serving.retry import retry
from serving.server import make_inputs, text_tensor

DEADLINE_S, TRY_S, TRIES = 10, 1.5, 6  # of a request that is asked once; of one try, and how many
QUICK = "one server killed", "all restarted, each drained first"
CLIENTS = [(protocol, policy) for protocol in ("HTTP", "gRPC") for policy in ("asked once", "asked again")]


class Load:
    """Requests at random times, until it is stopped; what became of each is in `found`."""

    def __init__(self, port, service, texts, expected, per_s, seed=0):
        self.port, self.service, self.expected, self.per_s = port, service, expected, per_s
        self.dice, self.found, self.stopped = random.Random(seed), [], threading.Event()
        self.bodies = [json.dumps({TEXT: text}).encode() for text in texts]
        self.inputs = [make_inputs(tritonclient.grpc, text_tensor([text], (TEXT,))) for text in texts]
        self.channels = {p: tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port + 1}") for _, p in CLIENTS}

    def ask(self, protocol, policy, number, timeout_s):
        """The logits of a text, by one try."""
        if protocol == "gRPC":
            answer = self.channels[policy].infer(self.service, self.inputs[number], client_timeout=timeout_s)
            return answer.as_numpy(LOGITS)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("POST", f"/v2/models/{self.service}/generate", self.bodies[number])
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise InferenceServerException(body.decode(errors="replace"), status=str(response.status))
        return json.loads(body)[LOGITS]

    def follow(self, protocol, policy, number):
        """Note what became of one request."""
        began, error = time.monotonic(), ""
        try:
            if policy == "asked once":
                answer = self.ask(protocol, policy, number, DEADLINE_S)
            else:
                answer = retry(lambda: self.ask(protocol, policy, number, TRY_S), tries=TRIES, late=True)
            value, tolerance = self.expected[number][LOGITS]
            outcome = "right" if np.abs(np.ravel(answer) - value).max() <= tolerance else "wrong"
        except (InferenceServerException, OSError, http.client.HTTPException) as failure:
            outcome, error = "lost", f"{type(failure).__name__}: {failure}"[:200]
        self.found.append(((protocol, policy), outcome, time.monotonic() - began, error))

    def run(self):
        with ThreadPoolExecutor(256) as pool:
            moment = time.monotonic()
            while not self.stopped.is_set():
                moment += self.dice.expovariate(self.per_s)
                self.stopped.wait(max(0, moment - time.monotonic()))
                pool.submit(self.follow, *self.dice.choice(CLIENTS), self.dice.randrange(len(self.bodies)))

    def during(self, act):
        """What became of the requests while act() ran, and two seconds around it."""
        self.found, self.stopped = [], threading.Event()
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            time.sleep(2)
            act()
            time.sleep(2)
        finally:
            self.stopped.set()
            thread.join()
        return self.found


def replicas(command, port, *options):
    """deploy/replicas.sh."""
    subprocess.run([ROOT / "deploy/replicas.sh", command, "--http-port", str(port), *map(str, options)], check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def serve(command, port, *options):
    """serve.sh for one of the servers."""
    subprocess.run([ROOT / "serve.sh", command, "--http-port", str(port), *map(str, options)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def pid_of(port):
    return int((ROOT / f"build/serve/{port}/server.pid").read_text().split()[0])


def faults(port, repository, path, hang_s):
    """{name: what is done to the servers}."""
    ports = [port + 10, port + 20, port + 30]
    start = lambda p: serve("start", p, "--device", "cpu", "--model-repository", repository, "--path", path, "--grpc-port", p + 1, "--metrics-port", p + 2)  # noqa: E731  # fmt: skip

    def kill():
        os.kill(pid_of(ports[1]), signal.SIGKILL)
        time.sleep(3)
        start(ports[1])

    def hang():
        os.kill(pid_of(ports[2]), signal.SIGSTOP)
        time.sleep(hang_s)
        os.kill(pid_of(ports[2]), signal.SIGCONT)

    def restart():
        for p in ports:
            serve("stop", p, "--drain-s", 5)
            start(p)
            time.sleep(2)

    if path == "ensemble":
        return {"all restarted, none drained; served model by model": restart}
    return {
        QUICK[0]: kill,
        f"one server stopped for {hang_s:g} s": hang,
        QUICK[1]: lambda: replicas("roll", port),
        "all restarted, none drained": restart,
    }


def summarise(found):
    """Per protocol and client: requests, lost, wrong, and seconds of the answers."""
    rows = []
    for client in CLIENTS:
        own = [entry for entry in found if entry[0] == client]
        times = sorted(seconds for _, outcome, seconds, _ in own if outcome != "lost") or [None]
        outcomes = [outcome for _, outcome, _, _ in own]
        row = {"protocol": client[0], "client": client[1], "requests": len(own)}
        row |= {word: outcomes.count(word) for word in ("lost", "wrong")}
        row |= {"p99_s": times[len(times) * 99 // 100], "slowest_s": times[-1]}
        rows.append(row | {"errors": sorted({error for *_, error in own if error})[:3]})
    return rows


def capacity(load, seconds=4, clients=8):
    """Requests per s in a closed loop over HTTP."""
    ends, done = time.monotonic() + seconds, []

    def client(number):
        while time.monotonic() < ends:
            load.ask("HTTP", "asked once", (number + len(done)) % len(load.bodies), DEADLINE_S)
            done.append(1)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done) / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--http-port", type=int, default=8000, help="and the 32 above it (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only a kill, and a restart of all that drains them")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--hang-s", type=float, default=8, help="how long one hangs (default: %(default)g)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    card, texts = read_card(args.repository), [text for text in read_texts(args.texts) if text.strip()][:100]
    expected = expected_answers(args.repository, card, texts, "FP32")
    record = {"model": card, "environment": environment_record(), "servers": 3, "requests_per_s": [], "faults": {}}
    for path in ("auto",) if args.quick else ("auto", "ensemble"):
        replicas("start", args.http_port, "--replicas", 3, "--model-repository", args.repository, "--path", path)
        try:
            load = Load(args.http_port, card["service"]["name"], texts, expected, 1)
            load.per_s = capacity(load) / 3
            record["requests_per_s"].append(load.per_s)
            acts = faults(args.http_port, args.repository, path, args.hang_s)
            for name, act in [(n, a) for n, a in acts.items() if n in QUICK or not args.quick]:
                record["faults"][name] = rows = summarise(load.during(act))
                for row in rows:
                    print(f"{name}: {row}", flush=True)
        finally:
            replicas("stop", args.http_port)
    path = results_folder(args.results, card) / "failover.json"
    write_json(path, record)
    print(path)
    held = [row for name, rows in record["faults"].items() if "none drained" not in name for row in rows]
    if any(row["wrong"] or (row["lost"] and row["client"] == "asked again") for row in held):
        raise SystemExit("expected no answer wrong and none lost that was asked for again, found some above")


if __name__ == "__main__":
    main()
