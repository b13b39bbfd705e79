"""From windows to a table's numbers: ratios inside a round, medians with their range, percentiles of all requests."""

import statistics
from collections import Counter

from bench.client import read_answer
from bench.expected import judge

P99_FROM = 200  # requests: below, the 99th percentile is one of the two slowest
JUDGEMENTS = ("right", "failed", "wrong_label", "wrong_score")


def percentile(values, share):
    """The value that a share of the values does not exceed: the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def describe_window(system, window, expected):
    """A window's row: answered texts a second, latencies in ms, and how many answers were right.

    Only right answers and those of another verdict or score count as answered: a refusal is no work.
    """
    found = [read_answer(system, status, answer) for _, _, status, answer in window.answers]
    judged = Counter(judge(f, expected[number]) for f, (number, *_) in zip(found, window.answers, strict=True))
    errors = [abs(f[1] - expected[n][1]) for f, (n, *_) in zip(found, window.answers, strict=True) if f and f[0] == expected[n][0]]  # fmt: skip
    latencies = [1000 * seconds for f, (_, seconds, *_) in zip(found, window.answers, strict=True) if f]
    count = len(window.answers)
    return {
        "texts_per_s": len(latencies) / window.seconds,
        "latencies_ms": latencies,
        "answers": {name: judged[name] for name in JUDGEMENTS},
        "max_score_error": max(errors, default=None),
        "client_cpu_ms_per_text": 1000 * window.client_cpu_s / count,
    }


def add_ratios(windows, base):
    """Put into each window the ratio of its throughput to that of `base` in the same round, at the same concurrency.

    windows: rows with system, round, concurrency and texts_per_s; None where the base has no such window.
    """
    speeds = {(w["round"], w["concurrency"]): w["texts_per_s"] for w in windows if w["system"] == base}
    for window in windows:
        speed = speeds.get((window["round"], window["concurrency"]))
        window["ratio"] = window["texts_per_s"] / speed if speed else None


def spread(values):
    """{"median", "min", "max"} of the values that are there; None without any."""
    values = [value for value in values if value is not None]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def summarise(windows):
    """The row of one system at one concurrency, of its windows over the rounds."""
    latencies = [value for window in windows for value in window["latencies_ms"]]
    batches = [w["batches"] for w in windows if w.get("batches")]
    executions, texts = map(sum, zip(*batches, strict=True)) if batches else (0, 0)
    answers = {name: sum(w["answers"][name] for w in windows) for name in JUDGEMENTS}
    return {
        "rounds": len(windows),
        "n": len(latencies),
        "texts_per_s": spread(w["texts_per_s"] for w in windows),
        "ratio": spread(w["ratio"] for w in windows),
        "latency_p50_ms": percentile(latencies, 0.5) if latencies else None,
        "latency_p99_ms": percentile(latencies, 0.99) if len(latencies) >= P99_FROM else None,
        "cpu_ms_per_text": (spread(w["cpu_ms_per_text"] for w in windows) or {}).get("median"),
        "mean_batch_size": texts / executions if executions else None,
        "answers": answers,
        "max_score_error": max((w["max_score_error"] for w in windows if w["max_score_error"] is not None), default=None),
    }  # fmt: skip
