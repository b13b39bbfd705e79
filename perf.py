#!/usr/bin/env python3
"""Measure throughput and latency of every model alone with NVIDIA's perf_analyzer.

Reads:  a running server (./serve.sh start), assets/texts.txt, and of the repository that is
        served the record, the tokenizer, and the graphs for the bare sessions.
Writes: results/<model>/<machine>/perf.json and, unchanged, perf_analyzer's CSV of each
        level's last round: perf/<model>_concurrency_<n>.csv, perf/<model>_rate_<share>.csv.
Run:    ./perf.py
Prints: one line per model and concurrency: throughput, p50, p99, served / bare.

At each concurrency the models are measured in turn, three rounds of a window each. A row has
the median throughput of the rounds, and percentiles of all their requests together. Where the
rounds differ by more than the stability limit they are repeated, twice as long, and then
marked unstable. A window counts only if the server executed exactly the requests that
perf_analyzer sent, and no other model was called.

--rates adds levels at which requests come at random moments (a Poisson process), whether or not
those before are answered, at shares of the best throughput that this run measured of a model;
capacity.py needs them. Latency counts from the moment of sending. A level in which a request
fails is refused, with the server's words.

perf.json is replaced when the last level is done; earlier levels of the same model, server
and settings that were not measured again stay in it. Until then the finished levels lie in
perf.partial/. Where the run is interrupted, or a level is refused and there are earlier
results, they stay there, and the next run with the same settings takes them in.

perf_analyzer is taken from PATH; where there is none (or only the empty package of that
name), from the tritonclient wheel that carries it; with --docker from the pinned SDK image.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from core.files import REPOSITORY, RESULTS, TEXTS, read_texts
from core.record import environment_record, results_folder
from core.tables import MAX_BATCH_SIZE, SDK_IMAGE
from serving.levels import KEYS, merge, publish, read_earlier, save_rows
from serving.perf_analyzer import find_perf_analyzer

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
SHARES = (0.3, 0.5, 0.7, 0.85)
EXIT_UNSTABLE = 3  # everything was measured; some levels are marked


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="HOST:PORT of the server; default: where serve.sh starts it")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="grpc")
    parser.add_argument("--concurrency", type=int, nargs="+", help="default: 1 2 4 8 16 32")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        metavar="SHARE",
        help="Poisson rates too; default: 0.3 0.5 0.7 0.85 of the best",
    )
    parser.add_argument("--models", nargs="+", choices=KEYS, help="default: all that the repository has")
    parser.add_argument("--batch-size", type=int, default=1, help="texts per request (default: %(default)s)")
    parser.add_argument("--window-s", type=float, help="length of a window, default: 3, quick: 0.8")
    parser.add_argument("--stability-percent", type=float, help="spread of three rounds, default: 10, quick: 25")
    parser.add_argument("--quick", action="store_true", help="concurrency 1 and 8, short windows")
    parser.add_argument("--docker", action="store_true", help=f"perf_analyzer from {SDK_IMAGE}")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.concurrency = tuple(dict.fromkeys(args.concurrency or ((1, 8) if args.quick else CONCURRENCIES)))
    args.shares = () if args.rates is None else sorted(set(args.rates or SHARES))
    args.window_s = args.window_s or (0.8 if args.quick else 3)
    args.stability_percent = args.stability_percent or (25 if args.quick else 10)
    if min(args.concurrency) < 1 or not 1 <= args.batch_size <= MAX_BATCH_SIZE:
        parser.error(f"expected --concurrency of at least 1 and --batch-size from 1 to {MAX_BATCH_SIZE}")
    if not all(0 < share <= 1 for share in args.shares):
        parser.error("--rates: expected shares of the best throughput, above 0 and at most 1")
    return args


def measure_all(args, record, models, unfinished, partial):
    """Every planned level into the record; perf.partial/ is written and rows are printed after each concurrency."""
    # here, since ONNX Runtime and tritonclient take longer to import than -h may
    from core.repository import graph_path, tokenizer_path
    from core.tokens import load_tokenizer
    from serving import bare, load
    from tasks.examples import examples

    card, engines = record["model"], record["server"]["engines"]
    requests = examples(card, read_texts(TEXTS))
    tokenizer = load_tokenizer(tokenizer_path(args.repository))
    with tempfile.TemporaryDirectory() as temporary:
        tool = find_perf_analyzer(args.docker, temporary)
        inputs = load.write_inputs(card, requests, tokenizer, Path(temporary))
        if not any(engine.startswith("TensorRT") for engine in engines.values()):
            graphs = {key: graph_path(args.repository, key) for key in models if key in engines}
            window_s = args.window_s / (2 if args.quick else 1)
            record["bare_infer_per_s"] = bare.measure_bare(graphs, requests, tokenizer, card["inputs"], window_s)
        windows = len(models) * (len(args.concurrency) + len(args.shares)) * (1 + args.rounds)
        with tqdm(total=windows, desc="perf", unit="window", mininterval=1) as progress:

            def measure(levels):
                rows = load.measure_levels(tool, args, levels, progress)
                save_rows(rows, record, unfinished, partial)
                tqdm.write("\n".join(map(describe_row, rows)), file=sys.stdout)
                sys.stdout.flush()

            takes = {key: inputs["tokens" if key in engines else "texts"] for key in models}
            for concurrency in args.concurrency:
                measure([load.Level(key, model, concurrency, takes[key]) for key, model in models.items()])
            best = best_requests_per_s(record["rows"])
            for share in args.shares if best else ():
                measure([load.Level(k, models[k], None, takes[k], share, share * speed) for k, speed in best.items()])


def best_requests_per_s(rows):
    """{model: its highest throughput in requests}, without those that no level measured."""
    found = {}
    for row in (row for row in rows if "error" not in row):
        speed = row["throughput_infer_per_s"] / row["batch_size"]
        found[row["model"]] = max(speed, found.get(row["model"], 0))
    return found


def name_of(row):
    """A level in words."""
    if "share" in row:
        return f"{row['model']} at {row['asked_requests_per_s']:.1f} requests/s"
    return f"{row['model']} at concurrency {row['concurrency']}"


def describe_row(row):
    at = f"{row['asked_requests_per_s']:6.1f} requests/s" if "share" in row else f"concurrency {row['concurrency']:2}"
    head = f"{row['model']:9} {at}"
    if "error" in row:
        return f"{head}  {row['error']}"
    ratio = f"  served / bare {row['served_to_bare']:.2f}" if "served_to_bare" in row else ""
    p99 = "n too small" if row["latency_p99_ms"] is None else f"{row['latency_p99_ms']:8.1f} ms"
    latency = f"p50 {row['latency_p50_ms']:8.1f} ms  p99 {p99:>11}"
    mark = "" if row["stable"] else "  UNSTABLE"
    return f"{head}  {row['throughput_infer_per_s']:8.1f} infer/s  {latency}{ratio}{mark}"


def report_levels(rows, limit, path):
    """Exit 1 where levels were refused, 3 where all were measured and some are unstable."""
    names = {name_of(row): row for row in rows}
    refused = [f"{name}: {row['error']}" for name, row in names.items() if "error" in row]
    if refused:
        raise SystemExit(
            f"expected {len(rows)} levels measured, found {len(refused)} refused; {refused[0]}; see {path}"
        )
    if unstable := ", ".join(name for name, row in names.items() if not row["stable"]):
        print(f"expected every level stable within {limit:g} %, found and marked: {unstable}", file=sys.stderr)
        sys.exit(EXIT_UNSTABLE)


def make_record(args, card, server, models, memory_mib):
    """perf.json before its first level."""
    settings = {
        key: getattr(args, key) for key in ("protocol", "batch_size", "window_s", "rounds", "stability_percent")
    }
    return {
        "model": card,
        "environment": environment_record(),
        "server": server,
        "server_memory_mib": memory_mib,
        "quick": args.quick,
        "settings": settings | {"inputs": f"{TEXTS.name}, {len(read_texts(TEXTS))} texts"},
        "planned": [[model, concurrency] for model in models for concurrency in args.concurrency],
        "bare_infer_per_s": {},
        "rows": [],
        "rates": [],
    }


def main():
    args = parse_args()
    # here, since onnx and tritonclient take longer to import than -h may
    from core.repository import read_card
    from serving.check import check_served
    from serving.counters import server_memory_mib
    from serving.load import ROUNDS, served_models
    from serving.server import SERVER_ERRORS, default_url, read_server

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that perf_analyzer is ended, as by Ctrl-C
    args.url, args.rounds = args.url or default_url(args.protocol), ROUNDS
    card = read_card(args.repository)
    models = served_models(args.repository, card, args.url, args.protocol)
    if missing := set(args.models or ()) - models.keys():
        raise SystemExit(f"--models: expected some of {', '.join(models)}, found {', '.join(sorted(missing))}")
    server = read_server(args.url, args.protocol, models)
    check_served(args.repository, card, server, args.url, args.protocol)
    models = {key: model for key, model in models.items() if key in (args.models or models)}
    record = make_record(args, card, server, models, server_memory_mib(args.url))
    folder = results_folder(args.results, card)
    path, partial = folder / "perf.json", folder / "perf.partial"
    earlier, unfinished = (read_earlier(place, record) for place in (path, partial / path.name))
    try:
        measure_all(args, record, models, unfinished, partial)
    except (KeyboardInterrupt, *SERVER_ERRORS) as error:
        found = (
            f"found: {str(error) or 'an interruption'}; levels that were finished are in {partial}; the next run with"
        )
        end = f"{args.url}: expected to measure every level, {found} the same settings takes them in; ./serve.sh status"
        raise SystemExit(end) from None
    rows = record["rows"] + record["rates"]
    if not path.exists() or not any("error" in row for row in rows):
        publish(merge(earlier, merge(unfinished, record)), folder, partial)
        print(path)
    report_levels(rows, args.stability_percent, partial if partial.exists() else path)


if __name__ == "__main__":
    main()
