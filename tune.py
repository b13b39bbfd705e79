#!/usr/bin/env python3
"""Choose threads, spinning, instances and batching delay of the CPU server by measuring.

Reads:  model_repository/, assets/ (export and quantize first).
Writes: results/<model>/tune.json.
Run:    ./tune.py
Prints: one line per setting: throughput at each concurrency, p99 over p50, ensemble latency.

Each setting is served by a server of its own from a temporary copy of the repository. The
setting in use is the first; common.open_session and repository.py hold it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import text_format
from tqdm import tqdm

from common import ASSETS, EMBEDDERS, REPOSITORY, RESULTS, ROOT, environment_record, read_json, write_json
from repository import read_config

CONCURRENCIES = (1, 4, 8)
SETTINGS = {
    "in use": {},
    "spinning on": {"spinning": "on"},
    "spinning off": {"spinning": "off"},  # in use too: the difference of the two is the noise
    "spinning stops after a run": {"spinning": "stop"},
    "one thread, two instances": {"threads": 1, "instances": 2},
    "delay 2 ms": {"delay_us": 2000},
    "delay 10 ms": {"delay_us": 10000},
}


def write_setting(source, target, setting):
    """A repository with links to the graphs and embedder configs changed by the setting."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif path.name != "config.pbtxt":
            copy.symlink_to(path)
    for path in source.glob("*/config.pbtxt"):
        config = read_config(path)
        if config.name in EMBEDDERS.values():
            if "spinning" in setting:
                config.parameters["spinning"].string_value = setting["spinning"]
            if "threads" in setting:
                config.parameters["intra_op_thread_count"].string_value = str(setting["threads"])
            if "delay_us" in setting:
                config.dynamic_batching.max_queue_delay_microseconds = setting["delay_us"]
            config.instance_group[0].count = setting.get("instances", config.instance_group[0].count)
        (target / path.relative_to(source)).write_text(text_format.MessageToString(config))


def free_ports(count):
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    # 3: measured, with unstable levels marked
    if done.returncode not in (0, 3):
        raise SystemExit(
            f"{command[0]}: expected it to succeed, found: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        )


def measure_setting(args, setting, folder):
    """perf.json rows of one setting, from a server of its own."""
    write_setting(args.repository, folder / "model_repository", setting)
    (folder / "assets").symlink_to(args.assets)
    http, grpc, metrics = free_ports(3)
    ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    run(ROOT / "serve.sh", "start", "--device", "cpu", "--model-repository", folder / "model_repository", *ports)
    try:
        options = ("--url", f"127.0.0.1:{grpc}", "--results", folder, "--window-s", args.window_s)
        options += ("--repository", args.repository, "--assets", args.assets)
        run(sys.executable, ROOT / "perf.py", *options, "--models", "ONNX", "ensemble", "--concurrency", *CONCURRENCIES)
    finally:
        run(ROOT / "serve.sh", "stop", "--http-port", http)
    (path,) = folder.glob("*/perf.json")
    return json.loads(path.read_text())


def describe(name, record):
    """One line: the reference's throughput per concurrency and tail, the ensemble's latency."""
    rows = {(r["model"], r["concurrency"]): r for r in record["rows"]}
    speeds = ", ".join(f"{rows['ONNX', c].get('throughput_infer_per_s', float('nan')):.1f}" for c in CONCURRENCIES)
    eight, ensemble = rows["ONNX", 8], rows["ensemble", 1]
    tail = eight["latency_p99_ms"] / eight["latency_p50_ms"] if "latency_p50_ms" in eight else float("nan")
    bare = max(record["bare_infer_per_s"]["ONNX"].values())
    return f"{name:28} ONNX {speeds} infer/s (bare {bare:.1f}), p99/p50 {tail:.2f}, ensemble p50 {ensemble.get('latency_p50_ms', float('nan')):.1f} ms"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--window-s", type=float, default=2)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.repository, args.assets = args.repository.resolve(), args.assets.resolve()
    return args


def main():
    args = parse_args()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    path = args.results / card["slug"] / "tune.json"
    record = {"model": card, "environment": environment_record(), "window_s": args.window_s, "settings": {}}
    for name in tqdm(args.settings, desc="tune", unit="setting", mininterval=1):
        with tempfile.TemporaryDirectory() as folder:
            found = measure_setting(args, SETTINGS[name], Path(folder))
        found = {"setting": SETTINGS[name], "rows": found["rows"], "bare_infer_per_s": found["bare_infer_per_s"]}
        record["settings"][name] = found
        write_json(path, record)
        tqdm.write(describe(name, found), file=sys.stdout)
    print(os.path.relpath(path))


if __name__ == "__main__":
    main()
