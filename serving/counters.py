"""The server's own view of a window: what it counted, what it used of the processors and the memory."""

import contextlib
from collections import Counter

import psutil

from core.tables import GRAPH
from serving.perf_analyzer import Refused
from serving.server import connect, read_config


def read_statistics(url, protocol):
    """{model: its statistics} of every model the server has, counters since its start."""
    client, _ = connect(url, protocol)
    answer = client.get_inference_statistics(**({} if protocol == "http" else {"as_json": True}))
    return {stats["name"]: stats for stats in answer["model_stats"]}


def steps_of(model, url, protocol):
    """Names of the models that an ensemble calls, in order; [] for another model."""
    steps = read_config(model, url, protocol).get("ensemble_scheduling", {}).get("step", [])
    return [step["model_name"] for step in steps]


def called_models(model, url, protocol):
    """{model: calls} of one request: the model itself and, of an ensemble, the models of its steps.

    A service that reads windows calls its graph as often as a text needs: None.
    """
    client, _ = connect(url, protocol)
    graph = model + GRAPH
    of_windows = [graph, *steps_of(graph, url, protocol)] if client.is_model_ready(graph) else []
    return dict(Counter([model, *steps_of(model, url, protocol)])) | dict.fromkeys(of_windows)


def counter(stats, *keys):
    """An integer counter of a model's statistics; 0 where the server left it out."""
    for key in keys:
        stats = stats.get(key) or {}
    return int(stats or 0)


def counters(stats):
    """One model's counters: queue and compute, each a count and nanoseconds, and executions by batch size."""
    parts = {"queue": "queue", "compute": "compute_infer"}
    found = {(ours, unit): counter(stats, "inference_stats", part, unit) for ours, part in parts.items() for unit in ("count", "ns")}  # fmt: skip
    sizes = stats.get("batch_stats", [])
    return Counter(found | {int(size.get("batch_size", 0)): counter(size, "compute_infer", "count") for size in sizes})


def compare_statistics(before, after, model, called, inferences):
    """What the server counted for `model` between two readings, as counters gives it.

    Raises Refused unless it executed exactly `inferences` of the model, as many of each model that those
    call ({model: calls} in `called`, None for any number), and none of any other.
    """
    for name, stats in after.items():
        executed = counter(stats, "inference_count") - counter(before.get(name, {}), "inference_count")
        calls = called.get(name, 0)
        if calls is None:
            continue
        expected = calls * inferences
        if executed != expected:
            raise Refused(
                f"expected {expected} inferences of {name} in the window, the server executed {executed}: "
                "something else called it"
            )
    return counters(after[model]) - counters(before[model])


def describe_counters(counted):
    """The row's fields of what compare_statistics gave for one window or, added up, for several."""
    mean_ms = {part: counted[part, "ns"] / max(1, counted[part, "count"]) / 1e6 for part in ("queue", "compute")}
    row = {f"server_{part}_ms": value for part, value in mean_ms.items()}
    made = {size: count for size, count in counted.items() if isinstance(size, int)}
    if made:  # an ensemble has no executions of its own
        row["batch_sizes"] = dict(sorted(made.items()))
        row["mean_batch_size"] = sum(size * count for size, count in made.items()) / sum(made.values())
    return row


# --- processes -----------------------------------------------------------------------


def find_server_processes(url):
    """The tritonserver that listens on a loopback url's port, with its children; else []."""
    host, port = url.rsplit(":", 1)
    if host not in ("127.0.0.1", "localhost"):
        return []
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(port) and connection.pid:
                server = psutil.Process(connection.pid)
                return [server, *server.children(recursive=True)] if server.name() == "tritonserver" else []
    return []


def server_memory_mib(url):
    """Proportional memory of the server with all its models, MiB; None where it cannot be seen."""
    try:
        return sum(p.memory_full_info().pss for p in find_server_processes(url)) / 2**20 or None
    except psutil.Error:
        return None


def cpu_seconds(processes):
    """CPU time of the processes so far; None where one has gone or none is ours to see."""
    try:
        return sum(sum(p.cpu_times()[:2]) for p in processes) if processes else None
    except psutil.Error:
        return None
