"""The same graphs without a server: what serving costs is held against them."""

import statistics
import time

from core.onnx_runtime import open_session
from core.tokens import encode

BATCHES = (1, 8)
ROUNDS = 3


def measure_bare(graphs, texts, tokenizer, names, window_s):
    """Texts/s of graphs {key: path} on this CPU: {key: {"1": median of three windows, "8": …}}.

    The graphs are measured in turn, round by round. The better of ONNX Runtime's default, whose
    threads spin, and the server's setting.
    """
    feeds = {
        size: [encode(tokenizer, texts[i : i + size], names) for i in range(0, len(texts) - size + 1, size)]
        for size in BATCHES
    }
    best = {key: {str(size): 0.0 for size in BATCHES} for key in graphs}
    for spinning in ("on", "off"):
        sessions = {key: open_session(path, spinning=spinning) for key, path in graphs.items()}
        speeds = {(key, size): [] for key in graphs for size in BATCHES}
        for number in range(ROUNDS + 1):  # the first warms up
            for key, size in speeds:
                speed = size * batches_per_s(sessions[key], feeds[size], window_s if number else window_s / 4)
                speeds[key, size] += [speed] if number else []
        for (key, size), values in speeds.items():
            best[key][str(size)] = max(best[key][str(size)], statistics.median(values))
    return best


def batches_per_s(session, feeds, window_s):
    """Runs per second of a session over the batches in turn."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < window_s:
        session.run(None, feeds[count % len(feeds)])
        count += 1
    return count / (time.perf_counter() - started)
