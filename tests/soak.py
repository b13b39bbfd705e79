#!/usr/bin/env python3
"""Ask a running service good and bad requests for a long time: is every answer right, is none lost, does memory stay flat?

Reads:  --repository, what the server serves; --texts, one a line.
Writes: results/<model>/<machine>/soak.json
Run:    ./serve.sh start --model-repository build/reviews --device cpu
        python tests/soak.py --repository build/reviews --seconds 1800
Prints: requests by outcome, and memory as a line fitted over the second half: MiB for each 100,000 requests.

Good answers are held against the same graphs in this process, without a server. A bad request is right if it is refused. The clients draw from a seed; the run is bounded in seconds and in requests.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.files import RESULTS, TEXTS, read_json, read_texts, write_json
from core.onnx_runtime import open_session
from core.record import environment_record, results_folder
from core.repository import graph_path, present, read_card, tokenizer_path
from core.tables import LOGITS, REFERENCE, model_key
from core.tokens import encode, load_tokenizer
from tasks.table import OWN, TASKS

TOLERANCE = {"FP32": 1e-4, "TRT_FP32": 1e-4, "ONNX": 1e-4}  # other arithmetic rounds otherwise in a batch than alone
LOOSE = 0.1
UNKNOWN_PARAMETER = "an unknown parameter"  # which Triton keeps from the task's own models, since they take none
BAD = {
    "too large a text": {"TEXT": "x" * 600_000},
    "too many texts": {"TEXT": ["a"] * 99},
    "no text": {},
    "another name": {"TXT": "a"},
    UNKNOWN_PARAMETER: {"TEXT": "a", "nonsense": 1},
    "a number": {"TEXT": 7},
    "an object": {"TEXT": {"a": 1}},
    "no JSON": b"{",
    "not UTF-8": b'{"TEXT": "\xff\xfe"}',
    "ten thousand brackets": b"[" * 10_000,
}


def expected_answers(repository, card, texts, precision):
    """[{output: (array, tolerance)}] of each text alone, by the graphs in this process."""
    tokenizer, task = load_tokenizer(tokenizer_path(repository)), TASKS[card["task"]]
    there = present(repository)
    keys = there if card["task"] == OWN else [model_key(precision) if model_key(precision) in there else REFERENCE]
    sessions = {key: open_session(graph_path(repository, key)) for key in keys}
    name = (lambda key: f"{task.output}_{key}") if card["task"] == OWN else lambda _: task.output
    answers = []
    for text in texts:
        feeds = encode(tokenizer, [text], card["inputs"])
        found = {key: session.run([task.output], feeds)[0][0] for key, session in sessions.items()}
        answers.append({name(k): (v.ravel(), TOLERANCE.get(k, LOOSE)) for k, v in found.items()})
    return answers


def outcome(url, model, body, expected):
    """(what became of a request: right, wrong, refused, failed, busy or lost; largest deviation of an answer)."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{url}/v2/models/{model}/generate", body)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as error:
        error.read()
        return ("busy" if error.code == 429 else "refused" if error.code < 500 or not expected else "failed"), 0
    except (OSError, ValueError):
        return "lost", 0
    if expected is None:
        return "wrong", 0  # it should have been refused
    apart = {name: np.abs(np.ravel(answer[name]) - value).max() for name, (value, _) in expected.items()}
    right = all(apart[name] <= tolerance for name, (_, tolerance) in expected.items())
    return "right" if right else "wrong", max(apart.values())


def memory_mib(port):
    """Resident memory of the server of this HTTP port and all its processes."""
    listing = subprocess.run(["ps", "-wweo", "rss,args"], capture_output=True, text=True).stdout.splitlines()
    marks = (f"triton-{port}-", f"--http-port={port}")
    return sum(int(line.split()[0]) for line in listing if any(mark in line for mark in marks)) / 1024


def slope(samples):
    """(MiB for each 100,000 requests, its standard error) of a line through the second half of (requests, MiB)."""
    x, y = np.array(samples[len(samples) // 2 :], dtype=float).T
    (rate, _), covariance = np.polyfit(x / 1e5, y, 1, cov=True)
    return float(rate), float(covariance[0, 0] ** 0.5)


def soak(args, model, texts, expected):
    """Counts of the outcomes by kind of request, [(requests, MiB)] of every second, and the largest deviation."""
    counts, samples, lock, apart = Counter(), [], threading.Lock(), [0]
    bad_bodies = [body for kind, body in BAD.items() if not (args.own and kind == UNKNOWN_PARAMETER)]
    deadline = time.monotonic() + args.seconds

    def client(number):
        dice = random.Random(args.seed * 1000 + number)
        while time.monotonic() < deadline and sum(counts.values()) < args.requests:
            bad = dice.random() < args.bad_share
            place = dice.randrange(len(texts))
            body, right = (dice.choice(bad_bodies), None) if bad else ({"TEXT": texts[place]}, expected[place])
            found, distance = outcome(args.url, model, body, right)
            with lock:
                counts["bad" if bad else "good", found] += 1
                apart[0] = max(apart[0], float(distance))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        samples.append((sum(counts.values()), memory_mib(args.url.split(":")[1])))
        print(f"\r{max(0, deadline - time.monotonic()):5.0f} s left, {samples[-1][0]} requests, {samples[-1][1]:.0f} MiB", end="", file=sys.stderr)  # fmt: skip
        time.sleep(1)
    print(file=sys.stderr)
    return counts, samples, apart[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--url", default="127.0.0.1:8000", help="of the server's HTTP (default: %(default)s)")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=10**7, help="at most")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--bad-share", type=float, default=0.2)
    parser.add_argument("--precision", default="FP32", help="that the service computes in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    card = read_card(args.repository)
    args.own = card["task"] == OWN
    if not args.own and LOGITS not in card["outputs"]:
        raise SystemExit(f"{args.repository}: expected the task's own models or a classifier, found {card['task']}")
    texts = [text for text in read_texts(args.texts) if text.strip()][:200]
    expected = expected_answers(args.repository, card, texts, args.precision)
    counts, samples, apart = soak(args, card["service"]["name"], texts, expected)
    rate, error = slope(samples)
    path, step = results_folder(args.results, card) / "soak.json", max(1, len(samples) // 60)
    runs = read_json(path, "remove it")["runs"] if path.exists() else {}
    runs["of all five" if card["task"] == OWN else args.precision] = {
        "environment": environment_record(),
        "seconds": args.seconds,
        "clients": args.clients,
        "kinds_of_bad_requests": len(BAD) - args.own,
        "outcomes": {f"{kind}, {found}": n for (kind, found), n in sorted(counts.items())},
        "largest_deviation": apart,
        "memory_mib": samples[::step],
        "mib_per_100000_requests": rate,
        "standard_error": error,
    }
    write_json(path, {"model": card, "environment": environment_record(), "runs": runs})
    for (kind, found), number in sorted(counts.items()):
        print(f"{kind} requests {found}: {number}")
    print(f"largest deviation from the graphs without a server: {apart:.2g}")
    print(f"memory: {samples[0][1]:.0f} MiB at first, {samples[-1][1]:.0f} at last; {rate:+.1f} ± {error:.1f} MiB for each 100,000 requests; {path}")  # fmt: skip
    right = counts["good", "right"] and not counts.keys() - {("good", "right"), ("bad", "refused"), ("good", "busy")}
    if not right:
        raise SystemExit("expected every good request answered right and every bad one refused, found others above")


if __name__ == "__main__":
    main()
