"""Levels of load: the models in turn, round by round, and the row of numbers that their windows make.

A level is one model at one concurrency, or at one rate of requests that come at random moments whether or not
those before are answered; a window is a given number of requests to it.
"""

import json
import statistics
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from core.repository import present
from core.tables import MODELS
from core.tokens import encode
from serving.counters import (
    called_models,
    compare_statistics,
    cpu_seconds,
    describe_counters,
    find_server_processes,
    read_statistics,
)
from serving.perf_analyzer import Hung, Refused, run_requests
from serving.server import one_pass
from tasks.table import TASKS

ROUNDS = 3
TRIES = 3  # of a window in which perf_analyzer hangs
WARMUP_TIMEOUT_S = 90
P99_FROM = 200  # requests: below, the 99th percentile is one of the two slowest


@dataclass
class Level:
    """What is known of a level while it is measured."""

    key: str
    model: str  # its name in the repository
    concurrency: int | None
    inputs: Path  # perf_analyzer's JSON
    share: float | None = None  # of the best throughput, where requests come at a rate
    rate: float | None = None  # requests per second
    speed: float = 0  # requests per second of the warm-up
    windows: list = field(default_factory=list)
    set_aside: list = field(default_factory=list)  # windows that were repeated, twice as long
    error: str | None = None

    def place(self):
        """The fields of its row that tell it from the model's other levels."""
        if self.rate is None:
            return {"concurrency": self.concurrency}
        return {"share": self.share, "asked_requests_per_s": self.rate}

    def speeds(self):
        return [window["throughput_infer_per_s"] for window in self.windows]

    def spread_percent(self):
        """Of the rounds' throughputs; 0 where the level was refused."""
        if self.error:
            return 0
        return (max(self.speeds()) - min(self.speeds())) / statistics.median(self.speeds()) * 100


def served_models(repository, card, url, protocol):
    """{key: name in the repository} of all that can be measured alone; a service in one pass has no parts."""
    whole = {"ensemble": card["service"]["name"]}
    if one_pass(whole["ensemble"], url, protocol):
        return whole
    return {key: MODELS[key].name for key in present(repository)} | {"tokenizer": "tokenizer"} | whole


def write_inputs(card, requests, tokenizer, folder):
    """{what a model takes: perf_analyzer's JSON}; its own random ids would be out of vocabulary.

    requests: what tasks.examples makes of texts.
    """
    takes = TASKS[card["task"]].takes
    rows = [request if len(takes) > 1 else (request,) for request in requests]
    of_texts = [
        {name: {"content": [text], "shape": [1]} for name, text in zip(takes, row, strict=True)} for row in rows
    ]
    of_tokens = [
        {name: {"content": ids[0].tolist(), "shape": [ids.shape[1]]} for name, ids in encode(tokenizer, [r], card["inputs"]).items()}
        for r in requests
    ]  # fmt: skip
    paths = {"texts": folder / "texts.json", "tokens": folder / "tokens.json"}
    for path, data in zip(paths.values(), (of_texts, of_tokens), strict=True):
        path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return paths


# --- windows -------------------------------------------------------------------------


def load_options(level, requests):
    """perf_analyzer's options for the load of a window.

    Requests at a rate come at random, as a Poisson process brings so many. perf_analyzer's own draws the same moments
    for every window, and the first few hundred of them come too slowly, so it is given others in each round.
    """
    if level.rate is None:
        return ["--concurrency-range", str(level.concurrency)]
    gaps = np.random.default_rng(len(level.windows)).exponential(size=requests)
    gaps_us = np.maximum(1, gaps / gaps.mean() / level.rate * 1e6).round().astype(int)
    path = level.inputs.with_name("gaps.txt")
    path.write_text("\n".join(map(str, gaps_us)) + "\n", encoding="utf-8")
    return ["--async", "--request-intervals", str(path)]


def window_requests(args, level, longer):
    """So many that a window lasts as long as it should; at a rate at least so many that three windows have a p99."""
    if level.rate and not args.quick:
        fewest = P99_FROM // ROUNDS + 1
    else:
        fewest = (2 if args.quick else 4) * (level.concurrency or 1)
    return longer * max(16, fewest, round(args.window_s * level.speed))


def run_window(tool, args, level, requests, timeout_s):
    """One window of exactly `requests` requests: its round, and what is pooled. Raises Refused, Hung."""
    options = ["-m", level.model, "-i", args.protocol, "-u", args.url, "--input-data", str(level.inputs)]
    options += [*load_options(level, requests), "-b", str(args.batch_size)]
    called = called_models(level.model, args.url, args.protocol)
    processes = find_server_processes(args.url)
    utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before, cpu_before = read_statistics(args.url, args.protocol), cpu_seconds(processes)
    times, csv = run_requests(tool, options, requests, level.inputs.parent, timeout_s)
    cpu_after, after = cpu_seconds(processes), read_statistics(args.url, args.protocol)
    inferences = requests * args.batch_size
    # perf_analyzer's own "Inferences/Second" divides by whole seconds when the number of requests is given
    seconds = (max(answered for _, answered in times) - min(sent for sent, _ in times)) / 1e9
    latencies = [(answered - sent) / 1e6 for sent, answered in times]
    return {
        "utc": utc,
        "requests": requests,
        "seconds": seconds,
        "throughput_infer_per_s": inferences / seconds,
        "latencies_ms": latencies,
        "counted": compare_statistics(before, after, level.model, called, inferences),
        "cpu_s": None if None in (cpu_before, cpu_after) else cpu_after - cpu_before,
        "csv": csv,
    }


def try_window(tool, args, level, requests, timeout_s):
    """run_window, tried again where the tool hangs; a refused one becomes the level's error and gives None."""
    for attempt in range(1, TRIES + 1):
        try:
            return run_window(tool, args, level, requests, timeout_s)
        except Refused as error:
            if not isinstance(error, Hung) or attempt == TRIES:
                level.error = str(error)
                break
    return None


def measure_window(tool, args, level, longer):
    """A window that counts, or the level's first one, the warm-up: it tells how many requests fill the others."""
    if not level.speed:
        if window := try_window(tool, args, level, max(8, 2 * (level.concurrency or 1)), WARMUP_TIMEOUT_S):
            level.speed = level.rate or window["throughput_infer_per_s"] / args.batch_size
        return
    requests = window_requests(args, level, longer)
    if window := try_window(tool, args, level, requests, 30 + 5 * requests / level.speed):
        level.windows.append(window)


def measure_levels(tool, args, levels, progress):
    """Rows of levels measured in turn, round by round: what drifts meets them all alike.

    Levels whose rounds spread beyond the limit are measured again, twice as long. progress is a tqdm bar.
    """
    for longer in (1,) if args.quick else (1, 2):
        going = [level for level in levels if longer == 1 or level.spread_percent() > args.stability_percent]
        progress.total += ROUNDS * len(going) if longer > 1 else 0
        for level in going:
            level.set_aside, level.windows = level.windows, []
        for number in range(longer - 1, ROUNDS + 1):  # round 0 warms up
            for level in going:
                load = f"{level.rate:.1f} requests/s" if level.rate else f"concurrency {level.concurrency}"
                progress.set_postfix_str(f"{load}, round {number}, {level.key}", refresh=False)
                if not level.error:
                    measure_window(tool, args, level, longer)
                progress.update()
    return [make_row(level, args) for level in levels]


# --- rows ----------------------------------------------------------------------------


def percentile(latencies_ms, percent):
    """A percentile of latencies, or None: the 99th of few requests is no number."""
    return None if percent == 99 and len(latencies_ms) < P99_FROM else float(np.percentile(latencies_ms, percent))


def make_row(level, args):
    """A level's row, with its latencies of all rounds pooled; or its error. "csv" is the tool's, of the last round."""
    row = {"model": level.key} | level.place()
    if level.error:
        return row | {"error": level.error}
    windows, speeds = level.windows, level.speeds()
    pooled = [latency for window in windows for latency in window["latencies_ms"]]
    row |= {"batch_size": args.batch_size, "n": len(pooled), "throughput_infer_per_s": statistics.median(speeds)}
    row |= {"throughput_min_infer_per_s": min(speeds), "throughput_max_infer_per_s": max(speeds)}
    row |= {"latency_mean_ms": statistics.fmean(pooled)}
    row |= {f"latency_p{percent}_ms": percentile(pooled, percent) for percent in (50, 90, 95, 99)}
    row |= describe_counters(sum((window["counted"] for window in windows), Counter()))
    cpu_s = [window["cpu_s"] for window in windows]
    if None not in cpu_s:
        row["server_cpu_cores"] = sum(cpu_s) / sum(window["seconds"] for window in windows)
    if level.rate:  # a request that fails ends the window, which is refused; this one counts what has no answer
        row["lost"] = sum(window["requests"] for window in windows) - len(pooled)
    spread = level.spread_percent()
    row |= {"spread_percent": spread, "stable": spread <= args.stability_percent}
    row |= {"rounds": [make_round(window) for window in windows], "csv": windows[-1]["csv"]}
    if level.set_aside:  # they do not count, and are kept to be seen
        row["rounds_set_aside"] = [make_round(window) for window in level.set_aside]
    return row


def make_round(window):
    """A window as perf.json keeps it."""
    kept = {key: window[key] for key in ("utc", "requests", "seconds", "throughput_infer_per_s")}
    return kept | {f"latency_p{percent}_ms": percentile(window["latencies_ms"], percent) for percent in (50, 99)}
