#!/usr/bin/env python3
"""Ask each service of a running server a real question: Triton calls a model ready whose process is long dead.

Reads:  the health.json of one or more repositories.
Writes: nothing.
Run:    python -m serving.health model_repository/health.json
Prints: "healthy: reviews answered in 12 ms"; or what was wrong, and exits with 1.

A guard that refuses because of too many requests (429) shows a busy server, not an ill one. Of Python's standard library alone, since an image runs
this file too.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

BUSY = 429  # what the guard of serve.sh answers above its limit
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the user's stands before 127.0.0.1


def read_question(path):
    """{"model", "body"} of a health.json."""
    try:
        question = json.loads(Path(path).read_text(encoding="utf-8"))
        return question["model"], question["body"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"{path}: expected the question of a health check, found {error!r}; run python -m serving.repository"
        ) from None


def is_loaded(url, state="ready"):
    """Whether Triton has loaded every model, by its own word; or, for "live", whether it answers at all."""
    try:
        with OPENER.open(f"http://{url}/v2/health/{state}", timeout=5) as response:
            return response.status == 200
    except (OSError, ValueError):
        return False


def count_answers(url, model, timeout_s):
    """How many requests the model has answered, by Triton's own count, which waits in no queue; None without an answer."""
    try:
        with OPENER.open(f"http://{url}/v2/models/{model}/stats", timeout=timeout_s) as response:
            return sum(m["inference_stats"]["success"]["count"] for m in json.load(response)["model_stats"])
    except (urllib.error.HTTPError, ValueError, KeyError):
        return 0  # it answers, but does not count
    except OSError:
        return None


def find_fault(url, model, body, timeout_s, patient=False):
    """Why a service is not healthy, in words; "" where it answers, or is too busy to: others got answers meanwhile.

    patient: no answer in time is no fault while the server is live, since one request may take longer than that.
    """
    # a decoupled model has no infer over HTTP
    path = "infer" if "inputs" in body else "generate"
    request = urllib.request.Request(f"http://{url}/v2/models/{model}/{path}", json.dumps(body).encode())
    nothing, before = f"{model}: no answer within {timeout_s:g} s", count_answers(url, model, timeout_s)
    if before is None:
        return nothing
    try:
        with OPENER.open(request, timeout=timeout_s) as response:
            response.read()
    except urllib.error.HTTPError as error:
        return "" if error.code == BUSY else f"{model}: {error.code} {error.read(300).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        if patient and is_loaded(url, "live"):
            return ""
        return "" if (count_answers(url, model, timeout_s) or 0) > before else f"{nothing}: {error}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, nargs="+", metavar="health.json")
    parser.add_argument("--url", default="127.0.0.1:8000", help="of the server's HTTP (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=10, help="for an answer (default: %(default)g)")
    parser.add_argument(
        "--patient", action="store_true", help="a live server that does not answer in time is busy, not ill"
    )
    args = parser.parse_args()
    for path in args.questions:
        model, body = read_question(path)
        started = time.perf_counter()
        if fault := find_fault(args.url, model, body, args.timeout_s, args.patient):
            sys.exit(f"not healthy: {fault}")
        print(f"healthy: {model} answered in {1e3 * (time.perf_counter() - started):.0f} ms")


if __name__ == "__main__":
    main()
