#!/usr/bin/env python3
"""Measure throughput and latency of every model alone with NVIDIA's perf_analyzer.

Reads:  a running server (./serve.sh start), assets/texts.txt, assets/tokenizer/, and the
        graphs in model_repository/ for the bare sessions.
Writes: results/<model>/perf.json, and perf_analyzer's CSV unchanged in results/<model>/perf/.
Run:    ./perf.py
Prints: one line per model and concurrency: throughput, p50, p99, served / bare.

A level is three windows with the same number of requests. Its row is the window with the
median throughput; where the three differ by more than the stability limit they are
repeated, twice as long, and then marked unstable. A window counts only if the server
executed exactly the requests that perf_analyzer sent, and no other model was called.

perf_analyzer is taken from PATH; where there is none (or only the empty package of that
name), from the tritonclient wheel that carries it; with --docker from the pinned SDK image.
"""

import argparse
import contextlib
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import tokenizers
from tqdm import tqdm

from client import GRPC_URL, HTTP_URL, SERVER_ERRORS, check_served_model, connect, read_server
from core.files import ASSETS, REPOSITORY, RESULTS, TEXTS, read_json, read_texts, write_json
from core.onnx_runtime import open_session
from core.record import environment_record
from core.tables import ATTENTION_MASK, EMBEDDERS, INPUT_IDS, TEXT
from serving.perf_analyzer import SDK_IMAGE, find_perf_analyzer
from serving.repository import check_served_plans

MODELS = EMBEDDERS | {"tokenizer": "tokenizer", "ensemble": "ensemble"}
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
BARE_BATCHES = (1, 8)
WINDOWS = 3
WINDOW_TRIES = 3  # of a window in which perf_analyzer hangs
WARMUP_TIMEOUT_S = 90
EXIT_UNSTABLE = 3  # everything was measured; some levels are marked
LATENCIES = {  # perf_analyzer's CSV, in microseconds -> ours
    "p50 latency": "latency_p50_ms",
    "p90 latency": "latency_p90_ms",
    "p95 latency": "latency_p95_ms",
    "p99 latency": "latency_p99_ms",
    "Avg latency": "latency_mean_ms",
}


# --- inputs --------------------------------------------------------------------------


def tokenize(assets, texts):
    """(ids, mask), int64 [texts, length], with the exported tokenizer, as the server does."""
    path = assets / "tokenizer" / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise SystemExit(f"{path}: expected a tokenizer, found: {error}; run torch2onnx.py") from None
    encodings = tokenizer.encode_batch(texts)
    return np.array([e.ids for e in encodings]), np.array([e.attention_mask for e in encodings])


def write_inputs(texts, ids, mask, folder):
    """perf_analyzer's JSON for texts and for tokens; its own random ids are out of vocabulary."""
    of_texts = [{TEXT: {"content": [text], "shape": [1]}} for text in texts]
    of_tokens = [
        {name: {"content": row.tolist(), "shape": [len(row)]} for name, row in ((INPUT_IDS, i), (ATTENTION_MASK, m))}
        for i, m in zip(ids, mask, strict=True)
    ]
    paths = {}
    for name, data in (("texts", of_texts), ("tokens", of_tokens)):
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps({"data": data}))
    return {model: paths["texts" if model in ("tokenizer", "ensemble") else "tokens"] for model in MODELS.values()}


# --- the server's own view -----------------------------------------------------------


class Refused(Exception):
    """A window that must not become a number."""


class Hung(Refused):
    """perf_analyzer did not end. With a given number of requests it sometimes waits for ever."""


def read_statistics(args):
    """{model: its statistics} of every model the server has, counters since its start."""
    client, _ = connect(args.url, args.protocol)
    answer = (
        client.get_inference_statistics() if args.protocol == "http" else client.get_inference_statistics(as_json=True)
    )
    return {stats["name"]: stats for stats in answer["model_stats"]}


def counter(stats, *keys):
    """An integer counter of a model's statistics; 0 where the server left it out."""
    value = stats
    for key in keys:
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return int(value or 0)


def batches(stats):
    """{batch size: executions}."""
    return {int(b.get("batch_size", 0)): counter(b, "compute_infer", "count") for b in stats.get("batch_stats", [])}


def compare_statistics(before, after, model, inferences):
    """Server's side of a window of `model`: queue and compute per request, batch sizes made.

    Raises Refused if the server did not execute exactly `inferences`, or any other model
    was called (but those of an ensemble, as often as it).
    """
    executed = {
        name: counter(stats, "inference_count") - counter(before.get(name, {}), "inference_count")
        for name, stats in after.items()
    }
    # an ensemble calls every model of its own once
    expected = dict.fromkeys(MODELS.values() if model == "ensemble" else [model], inferences)
    for name, count in executed.items():
        if count != expected.get(name, 0):
            raise Refused(
                f"expected {expected.get(name, 0)} inferences of {name} in the window, the server executed {count}: "
                "something else called it"
            )
    old, new = before[model], after[model]

    def mean_ms(part):
        delta = [counter(s, "inference_stats", part, "ns") for s in (old, new)]
        count = [counter(s, "inference_stats", part, "count") for s in (old, new)]
        return (delta[1] - delta[0]) / max(1, count[1] - count[0]) / 1e6

    made = {size: n - batches(old).get(size, 0) for size, n in batches(new).items()}
    made = {size: n for size, n in sorted(made.items()) if n}
    row = {f"server_{ours}_ms": mean_ms(part) for part, ours in (("queue", "queue"), ("compute_infer", "compute"))}
    if made:  # an ensemble has no executions of its own
        row["batch_sizes"] = made
        row["mean_batch_size"] = sum(size * n for size, n in made.items()) / sum(made.values())
    return row


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


# --- measuring -----------------------------------------------------------------------


def run_window(tool, args, model, concurrency, inputs, requests, csv_path, timeout_s):
    """One window of exactly `requests` requests -> its row. Raises Refused, Hung after timeout_s."""
    command, environment = tool
    command = [*command, "-m", model, "-i", args.protocol, "-u", args.url, "--input-data", str(inputs)]
    command += ["--concurrency-range", str(concurrency), "-b", str(args.batch_size)]
    command += ["--request-count", str(requests), "--verbose-csv", "-f", str(csv_path)]
    times_path = csv_path.with_name("times.json")
    command += ["--profile-export-file", str(times_path)]
    csv_path.unlink(missing_ok=True)
    times_path.unlink(missing_ok=True)
    processes = find_server_processes(args.url)
    before, cpu = read_statistics(args), cpu_seconds(processes)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Hung(f"perf_analyzer: expected it to end within {timeout_s:.0f} s, found it waiting") from None
    if done.returncode or not csv_path.exists() or not times_path.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise Refused(f"perf_analyzer: {lines[-1]}")
    after_cpu, after = cpu_seconds(processes), read_statistics(args)
    (line,) = csv.DictReader(csv_path.read_text().splitlines())
    seconds = read_seconds(times_path, requests)
    row = {"throughput_infer_per_s": requests * args.batch_size / seconds, "csv": csv_path.read_text()}
    row |= {ours: int(line[theirs]) / 1e3 for theirs, ours in LATENCIES.items()}
    row |= compare_statistics(before, after, model, requests * args.batch_size)
    if cpu is not None and after_cpu is not None:
        row["server_cpu_cores"] = (after_cpu - cpu) / seconds
    return row


def read_seconds(path, requests):
    """Seconds between the first request sent and the last answer, from perf_analyzer's own times.

    Its "Inferences/Second" divides by whole seconds when the number of requests is given.
    """
    (experiment,) = json.loads(path.read_text())["experiments"]
    if len(experiment["requests"]) != requests:
        raise Refused(f"perf_analyzer: expected {requests} requests, found {len(experiment['requests'])}")
    first = min(request["timestamp"] for request in experiment["requests"])
    last = max(request["response_timestamps"][-1] for request in experiment["requests"])
    return (last - first) / 1e9


def measure(tool, args, model, concurrency, inputs, csv_path):
    """Windows of one level -> its row; {"error": …} in it where no window may count."""
    row = {"concurrency": concurrency, "batch_size": args.batch_size}

    def window(requests, timeout_s):
        for attempt in range(WINDOW_TRIES):
            try:
                return run_window(tool, args, model, concurrency, inputs, requests, csv_path, timeout_s)
            except Hung:
                if attempt == WINDOW_TRIES - 1:
                    raise

    try:
        # the first window warms up and tells how many requests fill the others
        speed = window(max(8, 2 * concurrency), WARMUP_TIMEOUT_S)["throughput_infer_per_s"] / args.batch_size
        requests = max(16, (2 if args.quick else 4) * concurrency, round(args.window_s * speed))
        for longer in (1,) if args.quick else (1, 2):
            timeout_s = 30 + 5 * requests * longer / speed
            windows = [window(requests * longer, timeout_s) for _ in range(WINDOWS)]
            windows.sort(key=lambda window: window["throughput_infer_per_s"])
            speeds = [window["throughput_infer_per_s"] for window in windows]
            spread = (speeds[-1] - speeds[0]) / statistics.median(speeds) * 100
            if spread <= args.stability_percent:
                break
    except Refused as error:
        return row | {"error": str(error)}
    row |= windows[WINDOWS // 2]
    row |= {"window_requests": requests * longer, "window_throughputs": speeds, "spread_percent": spread}
    return row | {"stable": spread <= args.stability_percent}


def measure_bare(path, ids, mask, window_s):
    """Sequences/s of the graph without a server: {batch: median of three windows}.

    The better of ONNX Runtime's default, whose threads spin, and the server's setting.
    """
    result = dict.fromkeys(BARE_BATCHES, 0.0)
    for spinning in ("on", "off"):
        session = open_session(path, spinning=spinning)
        for batch in BARE_BATCHES:
            starts = range(0, len(ids) - batch + 1, batch)
            speeds = []
            for window in range(WINDOWS + 1):  # the first warms up
                count, started = 0, time.perf_counter()
                while time.perf_counter() - started < (window_s if window else window_s / 4):
                    start = starts[count % len(starts)]
                    rows = slice(start, start + batch)
                    session.run(None, {INPUT_IDS: ids[rows], ATTENTION_MASK: mask[rows]})
                    count += 1
                speeds.append(count * batch / (time.perf_counter() - started))
            result[batch] = max(result[batch], statistics.median(speeds[1:]))
    return result


def parse_range(text):
    """1:32 -> every level from 1 to 32; 1:32:4 steps by 4."""
    try:
        start, end, step = (list(map(int, text.split(":"))) + [1])[:3]
        levels = tuple(range(start, end + 1, step))
    except (ValueError, TypeError):
        levels = ()
    if not levels or levels[0] < 1:
        raise argparse.ArgumentTypeError(f"expected START:END or START:END:STEP, found {text}")
    return levels


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help=f"default: {GRPC_URL} (grpc), {HTTP_URL} (http)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="grpc")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--concurrency", type=int, nargs="+", help="default: 1 2 4 8 16 32")
    levels.add_argument("--concurrency-range", type=parse_range, metavar="1:32", help="every level of a range")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all seven")
    parser.add_argument("--batch-size", type=int, default=1, help="texts per request (default: %(default)s)")
    parser.add_argument("--window-s", type=float, help="length of a window, default: 3, quick: 0.8")
    parser.add_argument("--stability-percent", type=float, help="spread of three windows, default: 10, quick: 25")
    parser.add_argument("--quick", action="store_true", help="concurrency 1 and 8, short windows")
    parser.add_argument("--resume", action="store_true", help="measure what perf.json of the same settings lacks")
    parser.add_argument("--docker", action="store_true", help=f"perf_analyzer from {SDK_IMAGE}")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.url = args.url or (HTTP_URL if args.protocol == "http" else GRPC_URL)
    default = (1, 8) if args.quick else CONCURRENCIES
    args.concurrency = args.concurrency_range or args.concurrency or default
    args.window_s = args.window_s or (0.8 if args.quick else 3)
    args.stability_percent = args.stability_percent or (25 if args.quick else 10)
    if min(args.concurrency) < 1 or not 1 <= args.batch_size <= 8:
        parser.error("expected --concurrency of at least 1 and --batch-size from 1 to 8")
    return args


def describe_row(row):
    head = f"{row['model']:9} concurrency {row['concurrency']:2}"
    if "error" in row:
        return f"{head}  {row['error']}"
    ratio = f"  served / bare {row['served_to_bare']:.2f}" if "served_to_bare" in row else ""
    latency = f"p50 {row['latency_p50_ms']:8.1f} ms  p99 {row['latency_p99_ms']:8.1f} ms"
    return (
        f"{head}  {row['throughput_infer_per_s']:8.1f} infer/s  {latency}{ratio}{'' if row['stable'] else '  UNSTABLE'}"
    )


def add_served_to_bare(row, bare, args):
    """Put the throughput beside the best that the same graph gives without a server."""
    if bare and "error" not in row:
        # one request at a time cannot be batched; more can
        alone = row["concurrency"] == 1 and args.batch_size == 1
        row["served_to_bare"] = row["throughput_infer_per_s"] / (bare[1] if alone else max(bare.values()))


def measure_all(args, record, folder, temporary):
    """Every model at every level, one after the other; perf.json is written after each. Returns the rows."""
    tool = find_perf_analyzer(args.docker, temporary)
    texts = read_texts(TEXTS)
    ids, mask = tokenize(args.assets, texts)
    inputs = write_inputs(texts, ids, mask, temporary)
    raw = folder / "perf"
    if not args.resume:
        shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True, exist_ok=True)
    on_cpu = not any(engine.startswith("TensorRT") for engine in record["server"]["engines"].values())
    bare, rows = record["bare_infer_per_s"], record["rows"]
    write_json(folder / "perf.json", record)
    progress = tqdm(total=len(args.models) * len(args.concurrency), desc="perf", unit="level", mininterval=1)
    done = {(row["model"], row["concurrency"]) for row in rows}
    for name in args.models:
        model = MODELS[name]
        missing = [concurrency for concurrency in args.concurrency if (name, concurrency) not in done]
        progress.update(len(args.concurrency) - len(missing))
        if name in EMBEDDERS and on_cpu and missing:
            window_s = args.window_s / (2 if args.quick else 1)
            bare[name] = measure_bare(args.repository / model / "1" / "model.onnx", ids, mask, window_s)
        for concurrency in missing:
            row = {"model": name}
            row |= measure(tool, args, model, concurrency, inputs[model], temporary / "window.csv")
            add_served_to_bare(row, bare.get(name), args)
            if "csv" in row:
                (raw / f"{name}_concurrency_{concurrency}.csv").write_text(row.pop("csv"))
            rows.append(row)
            rows.sort(key=lambda row: record["planned"].index([row["model"], row["concurrency"]]))
            write_json(folder / "perf.json", record)
            tqdm.write(describe_row(row), file=sys.stdout)
            progress.update()
    progress.close()
    return rows


def take_up(old, new):
    """The old record without its refused rows, if it was made of the same model with the same settings."""
    for key in ("settings", "planned", "server", "model"):
        found, expected = old.get(key), new[key]
        if key == "model":  # two exports of one model differ in their dates
            found, expected = found["reference_sha256"], expected["reference_sha256"]
        if found != expected:
            raise SystemExit(f"--resume: expected a perf.json with {key} {expected}, found {found}; leave --resume out")
    rows = [row for row in old["rows"] if "error" not in row]
    return old | {"rows": rows, "resumed": [*old.get("resumed", []), new["environment"]]}


def report_failures(args, rows):
    """Exit 1 where levels were refused, 3 where all were measured and some are unstable."""
    failed = [f"{row['model']} at concurrency {row['concurrency']}: {row['error']}" for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"expected {len(rows)} levels measured, found {len(failed)} refused; first: {failed[0]}")
    unstable = ", ".join(f"{row['model']} at concurrency {row['concurrency']}" for row in rows if not row["stable"])
    if unstable:
        limit = f"{args.stability_percent:g} %"
        print(f"expected every level stable within {limit}, found and marked: {unstable}", file=sys.stderr)
        sys.exit(EXIT_UNSTABLE)


def main():
    args = parse_args()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    server = read_server(args.url, args.protocol)
    check_served_plans(args.repository, card["reference_sha256"], server)
    check_served_model(args.repository, args.url, args.protocol)
    folder = args.results / card["slug"]
    record = {
        "model": card,
        "environment": environment_record(),
        "server": server,
        "server_memory_mib": server_memory_mib(args.url),
        "quick": args.quick,
        "settings": {
            "protocol": args.protocol,
            "batch_size": args.batch_size,
            "window_s": args.window_s,
            "windows": WINDOWS,
            "stability_percent": args.stability_percent,
            "inputs": f"{TEXTS.name}, {len(read_texts(TEXTS))} texts",
        },
        "planned": [[model, concurrency] for model in args.models for concurrency in args.concurrency],
        "bare_infer_per_s": {},
        "rows": [],
    }
    if args.resume:
        record = take_up(read_json(folder / "perf.json", "leave --resume out"), record)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            rows = measure_all(args, record, folder, Path(temporary))
    except SERVER_ERRORS as error:
        raise SystemExit(
            f"{args.url}: expected the server to go on, found: {error}; {len(record['rows'])} finished levels are in "
            f"{folder / 'perf.json'}; ./serve.sh status"
        ) from None
    print(folder / "perf.json")
    report_failures(args, rows)


if __name__ == "__main__":
    main()
