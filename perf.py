#!/usr/bin/env python3
"""Measure throughput and latency of every embedder alone with NVIDIA's perf_analyzer.

Reads:  a running server (./serve.sh start), assets/texts.txt, assets/tokenizer/.
Writes: results/<model>/perf.json, and perf_analyzer's CSV unchanged in results/<model>/perf/.
Run:    ./perf.py
Prints: one line per embedder and concurrency: throughput, p50, p99.

perf_analyzer is taken from PATH; where there is none (or only the empty package of that
name), from the tritonclient wheel that carries it.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import tokenizers
from tqdm import tqdm

from client import GRPC_URL, HTTP_URL, read_server
from common import (
    ASSETS,
    ATTENTION_MASK,
    EMBEDDERS,
    INPUT_IDS,
    RESULTS,
    ROOT,
    TEXTS,
    environment_record,
    read_json,
    read_texts,
    replace_when_done,
    write_json,
)

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
STABILITY_PERCENT = 15
WHEEL = "tritonclient==2.51.0"  # later wheels no longer carry the binary
COLUMNS = {  # perf_analyzer's CSV, in microseconds -> ours
    "p50 latency": "latency_p50_ms",
    "p90 latency": "latency_p90_ms",
    "p95 latency": "latency_p95_ms",
    "p99 latency": "latency_p99_ms",
    "Avg latency": "latency_mean_ms",
    "Server Queue": "server_queue_ms",
    "Server Compute Infer": "server_compute_ms",
}


# --- perf_analyzer -------------------------------------------------------------------


def find_perf_analyzer():
    """(path, environment) of a working perf_analyzer; fetches it once where there is none."""
    found = shutil.which("perf_analyzer")
    if found and runs(found, os.environ):
        return found, dict(os.environ)
    folder = ROOT / "build" / "perf_analyzer"
    environment = dict(
        os.environ, LD_LIBRARY_PATH=os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    )
    binary = folder / "perf_analyzer"
    if not binary.exists():
        fetch_perf_analyzer(binary)
    link_libraries(folder)
    if not runs(binary, environment):
        raise SystemExit(
            f"{binary}: expected a program that runs, found one that does not; install perf_analyzer and put it on PATH"
        )
    return str(binary), environment


def runs(binary, environment):
    """Whether it answers --version."""
    with contextlib.suppress(OSError):
        return subprocess.run([binary, "--version"], env=environment, capture_output=True).returncode == 0
    return False


def fetch_perf_analyzer(binary):
    """Take the program out of the tritonclient wheel."""
    print(f"fetching perf_analyzer from {WHEEL}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(command).returncode:
            raise SystemExit(f"perf_analyzer: expected {WHEEL} from pip, found it failing; put perf_analyzer on PATH")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/bin/perf_analyzer"))
            with replace_when_done(binary) as temporary:
                temporary.write_bytes(archive.read(name))
                temporary.chmod(0o755)


def link_libraries(folder):
    """Two libraries that the binary needs lie in nvidia-pytriton under hashed names."""
    spec = importlib.util.find_spec("pytriton")
    libraries = Path(spec.submodule_search_locations[0]).parent / "nvidia_pytriton.libs" if spec else Path()
    for name, pattern in {"libcudart.so.12": "libcudart-*.so.12*", "libb64.so.0d": "libb64-*.so.0d"}.items():
        for library in libraries.glob(pattern):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(library)


# --- measuring -----------------------------------------------------------------------


def write_inputs(assets, texts, path):
    """Tokenised texts in perf_analyzer's JSON; its own random ids are out of vocabulary."""
    tokenizer = tokenizers.Tokenizer.from_file(str(assets / "tokenizer" / "tokenizer.json"))
    data = [
        {
            INPUT_IDS: {"content": encoding.ids, "shape": [len(encoding.ids)]},
            ATTENTION_MASK: {"content": encoding.attention_mask, "shape": [len(encoding.ids)]},
        }
        for encoding in tokenizer.encode_batch(texts)
    ]
    path.write_text(json.dumps({"data": data}))


def measure(program, environment, args, model, concurrency, inputs, csv_path):
    """One run of perf_analyzer -> a row; {"error": …} in it where the run did not count."""
    row = {"model": model, "concurrency": concurrency}
    requests = args.window_requests
    for _ in range(2):  # an unstable level gets one more try with a longer window
        command = [program, "-m", model, "-i", args.protocol, "-u", args.url, "--input-data", str(inputs)]
        command += ["--concurrency-range", str(concurrency), "-s", str(STABILITY_PERCENT), "--verbose-csv"]
        command += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
        command += ["-f", str(csv_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 0 and csv_path.exists():
            return row | read_row(csv_path, done.stdout, requests)
        requests *= 2
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return row | {"error": lines[-1]}


def read_row(csv_path, output, requests):
    """Figures of one run; refused where server and client counted different numbers."""
    (line,) = csv.DictReader(csv_path.read_text().splitlines())
    row = {"throughput_infer_per_s": float(line["Inferences/Second"])}
    row |= {ours: int(line[theirs]) / 1e3 for theirs, ours in COLUMNS.items()}
    row["window_requests"] = requests
    counts = {
        name: re.search(rf"{name}: (\d+)", output) for name in ("Request count", "Inference count", "Execution count")
    }
    client, server, executions = (int(match[1]) if match else None for match in counts.values())
    row |= {"client_requests": client, "server_inferences": server}
    # a request under way at a window's edge is counted on one side only; there are three windows
    if client is None or server is None or abs(client - server) > 3 * int(line["Concurrency"]):
        return row | {"error": f"client counted {client} requests, server {server}: something else called it"}
    return row | {"mean_batch_size": server / executions}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help=f"default: {GRPC_URL} (grpc), {HTTP_URL} (http)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="grpc")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES, help="default: 1 2 4 8 16 32")
    parser.add_argument(
        "--window-requests", type=int, default=50, help="requests per window; three agreeing windows make a level"
    )
    parser.add_argument("--quick", action="store_true", help="concurrency 1 and 8, windows of 20 requests")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.url = args.url or (HTTP_URL if args.protocol == "http" else GRPC_URL)
    if args.quick:
        args.concurrency, args.window_requests = (1, 8), 20
    return args


def main():
    args = parse_args()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    server = read_server(args.url, args.protocol)
    program, environment = find_perf_analyzer()
    folder = args.results / card["slug"]
    raw = folder / "perf"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    levels = [(suffix, model, c) for suffix, model in EMBEDDERS.items() for c in args.concurrency]
    rows = []
    record = {"model": card, "environment": environment_record(), "server": server, "quick": args.quick}
    record["settings"] = {"tool": Path(program).name, "protocol": args.protocol, "stability_percent": STABILITY_PERCENT}
    record["settings"] |= {"window_requests": args.window_requests, "batch_size": 1, "inputs": "texts.txt, tokenised"}
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs.json"
        write_inputs(args.assets, read_texts(TEXTS), inputs)
        for suffix, model, concurrency in tqdm(levels, desc="perf", unit="level", mininterval=1):
            csv_path = raw / f"{suffix}_concurrency_{concurrency}.csv"
            row = {"embedder": suffix} | measure(program, environment, args, model, concurrency, inputs, csv_path)
            rows.append(row)
            write_json(folder / "perf.json", record | {"rows": rows})  # finished rows are kept
            tqdm.write(describe_row(row), file=sys.stdout)
    print(folder / "perf.json")
    failed = [
        f"{row['embedder']} at concurrency {row['concurrency']}: {row['error']}" for row in rows if "error" in row
    ]
    if failed:
        raise SystemExit(
            f"expected {len(rows)} levels measured, found {len(failed)} without a result; first: {failed[0]}"
        )


def describe_row(row):
    head = f"{row['embedder']:9} concurrency {row['concurrency']:2}"
    if "error" in row:
        return f"{head}  {row['error']}"
    return f"{head}  {row['throughput_infer_per_s']:8.1f} infer/s  p50 {row['latency_p50_ms']:8.1f} ms  p99 {row['latency_p99_ms']:8.1f} ms"


if __name__ == "__main__":
    main()
