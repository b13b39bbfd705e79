#!/usr/bin/env python3
"""Measure throughput and latency of every model alone with NVIDIA's perf_analyzer.

Reads:  a running server (./serve.sh start), assets/texts.txt, and of the repository that is
        served the record, the tokenizer, and the graphs for the bare sessions.
Writes: results/<model>/<machine>/perf.json and, unchanged, perf_analyzer's CSV of each
        level's last round: perf/<model>_concurrency_<n>.csv.
Run:    ./perf.py
Prints: one line per model and concurrency: throughput, p50, p99, served / bare.

At each concurrency the models are measured in turn, three rounds of a window each. A row has
the median throughput of the rounds, and percentiles of all their requests together. Where the
rounds differ by more than the stability limit they are repeated, twice as long, and then
marked unstable. A window counts only if the server executed exactly the requests that
perf_analyzer sent, and no other model was called.

Earlier results of the same model, server and settings keep the levels that are not measured
again; others are replaced when the last level is done. Until then the finished levels lie in
perf.partial/ beside perf.json. They stay there if the run is interrupted, or if a level is
refused and perf.json has earlier results; the next run with the same settings takes them in.

perf_analyzer is taken from PATH; where there is none (or only the empty package of that
name), from the tritonclient wheel that carries it; with --docker from the pinned SDK image.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from core.files import REPOSITORY, RESULTS, TEXTS, read_json, read_texts, replace_folder_when_done, write_json
from core.record import environment_record, results_folder
from core.tables import EMBEDDERS, MAX_BATCH_SIZE, SDK_IMAGE
from serving.perf_analyzer import find_perf_analyzer

KEYS = (*EMBEDDERS, "tokenizer", "ensemble")
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
EXIT_UNSTABLE = 3  # everything was measured; some levels are marked


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
    parser.add_argument("--url", help="HOST:PORT of the server; default: where serve.sh starts it")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="grpc")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--concurrency", type=int, nargs="+", help="default: 1 2 4 8 16 32")
    levels.add_argument("--concurrency-range", type=parse_range, metavar="1:32", help="every level of a range")
    parser.add_argument("--models", nargs="+", choices=KEYS, help="default: all that the repository has")
    parser.add_argument("--batch-size", type=int, default=1, help="texts per request (default: %(default)s)")
    parser.add_argument("--window-s", type=float, help="length of a window, default: 3, quick: 0.8")
    parser.add_argument("--stability-percent", type=float, help="spread of three rounds, default: 10, quick: 25")
    parser.add_argument("--quick", action="store_true", help="concurrency 1 and 8, short windows")
    parser.add_argument("--docker", action="store_true", help=f"perf_analyzer from {SDK_IMAGE}")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    default = (1, 8) if args.quick else CONCURRENCIES
    args.concurrency = tuple(dict.fromkeys(args.concurrency_range or args.concurrency or default))
    args.window_s = args.window_s or (0.8 if args.quick else 3)
    args.stability_percent = args.stability_percent or (25 if args.quick else 10)
    if min(args.concurrency) < 1 or not 1 <= args.batch_size <= MAX_BATCH_SIZE:
        parser.error(f"expected --concurrency of at least 1 and --batch-size from 1 to {MAX_BATCH_SIZE}")
    return args


# --- results on disk -----------------------------------------------------------------


def read_earlier(path, record):
    """A perf.json of the same model, server and settings, whose levels may stand beside the new; else None."""
    if not path.exists():
        return None
    old = read_json(path, "move it away")
    same = all(old.get(key) == record[key] for key in ("settings", "server", "quick"))
    return old if same and old["model"]["reference_sha256"] == record["model"]["reference_sha256"] else None


def merge(old, new):
    """The new record with the levels of the old one that it has not measured. A refused level replaces none."""
    if old is None:
        return new
    rows = {}
    for row in (*old["rows"], *new["rows"]):
        level = row["model"], row["concurrency"]
        if "error" not in row or level not in rows:
            rows[level] = row

    def place(level):
        return KEYS.index(level[0]), level[1]

    planned = sorted({tuple(level) for level in old["planned"] + new["planned"]}, key=place)
    merged = new | {"planned": list(map(list, planned)), "rows": [rows[level] for level in sorted(rows, key=place)]}
    merged["bare_infer_per_s"] = old["bare_infer_per_s"] | new["bare_infer_per_s"]
    if any(row is kept for row in old["rows"] for kept in merged["rows"]):
        merged["earlier_environments"] = [*old.get("earlier_environments", []), old["environment"]]
    add_served_to_bare(merged)
    return merged


def add_served_to_bare(record):
    """Put each throughput beside the best that the same graph gives without a server."""
    for row in record["rows"]:
        bare = record["bare_infer_per_s"].get(row["model"])
        if bare and "error" not in row:
            # one request at a time cannot be batched; more can
            alone = row["concurrency"] == 1 and row["batch_size"] == 1
            row["served_to_bare"] = row["throughput_infer_per_s"] / (bare["1"] if alone else max(bare.values()))


def csv_name(row):
    return f"{row['model']}_concurrency_{row['concurrency']}.csv"


def publish(record, folder, partial):
    """Put perf.json and perf/ in the place of the earlier ones, whole, and delete perf.partial/."""
    with replace_folder_when_done(folder / "perf") as temporary:
        for name in map(csv_name, record["rows"]):
            if source := next((p for p in (partial / name, folder / "perf" / name) if p.is_file()), None):
                shutil.copy(source, temporary / name)
    write_json(folder / "perf.json", record)
    shutil.rmtree(partial)


# --- measuring -----------------------------------------------------------------------


def measure_all(args, record, models, partial):
    """Every planned level into the record; perf.partial/ is written after each concurrency."""
    # here, since numpy, ONNX Runtime and tritonclient are to be imported after the arguments were parsed
    from core.repository import graph_path, tokenizer_path
    from core.tokens import load_tokenizer
    from serving import bare, load

    names, texts = record["model"]["inputs"], read_texts(TEXTS)
    tokenizer = load_tokenizer(tokenizer_path(args.repository))
    taken_in = read_earlier(partial / "perf.json", record)
    engines = record["server"]["engines"]
    with tempfile.TemporaryDirectory() as temporary:
        tool = find_perf_analyzer(args.docker, temporary)
        inputs = load.write_inputs(texts, tokenizer, names, Path(temporary))
        if not any(engine.startswith("TensorRT") for engine in engines.values()):
            graphs = {key: graph_path(args.repository, key) for key in models if key in engines}
            window_s = args.window_s / (2 if args.quick else 1)
            record["bare_infer_per_s"] = bare.measure_bare(graphs, texts, tokenizer, names, window_s)
        windows = len(record["planned"]) * (1 + load.ROUNDS)
        with tqdm(total=windows, desc="perf", unit="window", mininterval=1) as progress:
            for concurrency in args.concurrency:
                levels = [
                    load.Level(key, model, concurrency, inputs["tokens" if key in engines else "texts"])
                    for key, model in models.items()
                ]
                rows = load.measure_levels(tool, args, levels, progress)
                if taken_in is None and not record["rows"]:  # of other settings: not to be mixed with these
                    shutil.rmtree(partial, ignore_errors=True)
                save_rows(record, rows, taken_in, partial)


def save_rows(record, rows, taken_in, partial):
    """Add the rows of one concurrency to the record, print them, and write perf.partial/."""
    partial.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if csv := row.pop("csv", None):
            (partial / csv_name(row)).write_text(csv)
    record["rows"] += rows
    record["rows"].sort(key=lambda row: record["planned"].index([row["model"], row["concurrency"]]))
    add_served_to_bare(record)
    write_json(partial / "perf.json", merge(taken_in, record))
    for row in rows:
        tqdm.write(describe_row(row), file=sys.stdout)
    sys.stdout.flush()


def describe_row(row):
    head = f"{row['model']:9} concurrency {row['concurrency']:2}"
    if "error" in row:
        return f"{head}  {row['error']}"
    ratio = f"  served / bare {row['served_to_bare']:.2f}" if "served_to_bare" in row else ""
    p99 = "n too small" if row["latency_p99_ms"] is None else f"{row['latency_p99_ms']:8.1f} ms"
    latency = f"p50 {row['latency_p50_ms']:8.1f} ms  p99 {p99:>11}"
    mark = "" if row["stable"] else "  UNSTABLE"
    return f"{head}  {row['throughput_infer_per_s']:8.1f} infer/s  {latency}{ratio}{mark}"


def describe_partial(partial):
    """Where an unfinished run left its levels."""
    if not (partial / "perf.json").exists():
        return "no level was finished"
    return f"the finished levels are in {partial}, and the next run with the same settings takes them in"


def report_refused(rows, what):
    """Exit 1 where levels were refused; `what` says where the measured ones are."""
    failed = [f"{row['model']} at concurrency {row['concurrency']}: {row['error']}" for row in rows if "error" in row]
    if failed:
        raise SystemExit(
            f"expected {len(rows)} levels measured, found {len(failed)} refused; first: {failed[0]}; {what}"
        )


def report_unstable(rows, limit):
    """Exit 3 where all levels were measured and some are unstable."""
    unstable = [f"{row['model']} at concurrency {row['concurrency']}" for row in rows if not row["stable"]]
    if unstable:
        print(
            f"expected every level stable within {limit:g} %, found and marked: {', '.join(unstable)}", file=sys.stderr
        )
        sys.exit(EXIT_UNSTABLE)


def make_record(args, card, server, models, memory_mib):
    """perf.json before its first level."""
    return {
        "model": card,
        "environment": environment_record(),
        "server": server,
        "server_memory_mib": memory_mib,
        "quick": args.quick,
        "settings": {
            "protocol": args.protocol,
            "batch_size": args.batch_size,
            "window_s": args.window_s,
            "rounds": 3,
            "stability_percent": args.stability_percent,
            "inputs": f"{TEXTS.name}, {len(read_texts(TEXTS))} texts",
        },
        "planned": [[model, concurrency] for model in models for concurrency in args.concurrency],
        "bare_infer_per_s": {},
        "rows": [],
    }


def main():
    args = parse_args()
    # here, since onnx, ONNX Runtime and tritonclient take longer to import than -h may
    from core.repository import read_card
    from serving.check import check_served
    from serving.counters import server_memory_mib
    from serving.load import served_models
    from serving.server import SERVER_ERRORS, default_url, read_server

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: perf_analyzer is to end with it
    args.url = args.url or default_url(args.protocol)
    card = read_card(args.repository)
    models = served_models(args.repository, card)
    if missing := set(args.models or ()) - models.keys():
        raise SystemExit(f"--models: expected some of {', '.join(models)}, found {', '.join(sorted(missing))}")
    server = read_server(args.url, args.protocol, models)
    check_served(args.repository, card, server, args.url, args.protocol)
    models = {key: model for key, model in models.items() if key in (args.models or models)}
    record = make_record(args, card, server, models, server_memory_mib(args.url))
    folder = results_folder(args.results, card)
    partial = folder / "perf.partial"
    earlier = read_earlier(folder / "perf.json", record)  # now, so that a broken one is found before measuring
    try:
        measure_all(args, record, models, partial)
    except SERVER_ERRORS as error:
        raise SystemExit(
            f"{args.url}: expected the server to go on, found: {error}; ./serve.sh status; {describe_partial(partial)}"
        ) from None
    except KeyboardInterrupt:
        print(f"interrupted; {describe_partial(partial)}", file=sys.stderr)
        sys.exit(130)
    if (folder / "perf.json").exists():
        report_refused(record["rows"], f"{folder / 'perf.json'} stays as it was; {describe_partial(partial)}")
    finished = read_json(partial / "perf.json", "run perf.py again")
    publish(merge(earlier, finished), folder, partial)
    print(folder / "perf.json")
    report_refused(record["rows"], f"the others are in {folder / 'perf.json'}")
    report_unstable(record["rows"], args.stability_percent)


if __name__ == "__main__":
    main()
