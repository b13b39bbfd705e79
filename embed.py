#!/usr/bin/env python3
"""Answer any number of texts with a service of an encoder task: embeddings, labels, entities; Parquet files come out.

Reads:  --input: a folder, or files, of Parquet, CSV (with a header) or JSONL; --repository; with --url a running server.
Writes: --output: part-*.parquet with the columns id, the task's outputs and error; _embed.json, the record.
Run:    ./embed.py --input texts/ --output build/embeddings --repository build/reviews
Prints: "build/embeddings: 1000 rows in 1 files, 2 with an error, 9.1 s, 110 rows/s, padding 0.0 % of the positions"

It runs on Ray Data: on this machine, or on the cluster that RAY_ADDRESS names. Stopped in any way, even by kill -9, the
same command goes on: no row is lost, none is there twice. Without --id-column a row is called after its file and its
number there, the first one film.csv:0. A row that cannot be read has the reason in the column error, and no answer.
"""

import hashlib
import importlib.util
import sys
import time
from pathlib import Path

from core.arguments import make_parser
from core.engines import ENGINES
from core.repository import read_card
from core.tables import CPU_PRECISIONS, REFERENCE
from tasks.table import OWN, TASKS

REQUIREMENTS = "serving/requirements-embed.txt"


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="a folder or files; also URIs: s3://bucket/folder")
    parser.add_argument("--output", required=True, help="a new folder, or that of the same job")
    parser.add_argument("--repository", type=Path, required=True, help="a service of an encoder task")
    parser.add_argument("--url", help="HOST:PORT of a server's gRPC that computes (default: the workers themselves)")
    parser.add_argument("--text-column", help="A:B where the task takes two (default: text, or question:context)")
    parser.add_argument("--id-column", help="a row's own name (default: its file and number)")
    parser.add_argument("--workers", type=int, help="processes, which share the cores (default: one for each core)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the service's")
    parser.add_argument("--precision", choices=(REFERENCE, *CPU_PRECISIONS), help="default: the service's")
    parser.add_argument("--timeout-s", type=float, default=60, help="of each try of a request to --url (default: 60)")
    parser.add_argument(
        "--stall-s", type=float, default=1800, help="give up after so long without a row (default: 1800)"
    )
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers: expected at least 1, found {args.workers}")
    for name in ("timeout_s", "stall_s"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, found {getattr(args, name)}")
    if args.url and (args.engine or args.precision):
        parser.error("--engine, --precision: expected none with --url, where the server has its own")
    return args


# --- the job ------------------------------------------------------------------------------


def check_packages():
    """Exit where Ray is not installed, with the command."""
    if missing := [name for name in ("ray", "pyarrow", "pandas") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"expected the package {missing[0]}, found none; pip install -r {REQUIREMENTS}")


def read_service(repository):
    """The record of a service of an encoder task; exits for another."""
    card = read_card(repository)
    if card["task"] == OWN or card["task"] not in TASKS:
        raise SystemExit(f"{repository}: expected a service of an encoder task, found {card['task']}; name another")
    return card


def choose_columns(args, card):
    """{"id", "texts"}: the columns that are read."""
    takes = [name.lower() for name in TASKS[card["task"]].takes]
    given = args.text_column or ":".join(takes)
    texts = given.split(":") if len(takes) > 1 else [given]
    if len(texts) != len(takes):
        raise SystemExit(f"--text-column: expected {len(takes)} columns, {':'.join(takes)}; found {given}")
    return {"id": args.id_column, "texts": texts}


def choose_compute(args, card):
    """(what opens the graph, or None with --url; in words what computes). Exits where it cannot."""
    if not args.url:
        from serving.one_pass import choose_graph

        return choose_graph(args.repository, card, args.precision, args.engine, pack=False)
    from serving.server import one_pass

    served = one_pass(card["service"]["name"], args.url, "grpc")
    if served.get("reference_sha256", card["reference_sha256"]) != card["reference_sha256"]:
        raise SystemExit(
            f"--url {args.url}: expected the export {card['reference_sha256'][:12]} of {args.repository}, found "
            f"{served['reference_sha256'][:12]}; serve this repository"
        )
    by = served.get("one_pass", "its models, one by one").rsplit(", ", 1)[0]
    return None, f"Triton: {by}"


def describe_job(card, by, columns, files):
    """What must be the same where a job goes on: model, what computes, columns, input."""
    listed = "".join(f"{name}\t{size}\n" for name, (_, size) in files.items())
    return {
        "task": card["task"],
        "model": card["name"],
        "weights_sha256": card.get("weights_sha256"),
        "reference_sha256": card["reference_sha256"],
        "threshold": card["service"].get("threshold"),
        "executed_by": by,
        "text_columns": columns["texts"],
        "id_column": columns["id"],
        "input_files": len(files),
        "input_bytes": sum(size for _, size in files.values()),
        "input_sha256": hashlib.sha256(listed.encode()).hexdigest(),  # of the files' names and sizes
    }


def main():
    args = parse_args()
    check_packages()
    card = read_service(args.repository)
    from serving import bulk_input, bulk_output, bulk_run

    columns, address = choose_columns(args, card), bulk_run.cluster_address()
    graph, by = choose_compute(args, card)
    source, files = bulk_input.list_files(args.input)
    output = bulk_output.open_output(args.output, args.input)
    settings = describe_job(card, by, columns, files)
    before = bulk_output.read_record(output, settings)
    workers = args.workers or bulk_run.count_cores(address)
    print(f"reading {len(files)} files", file=sys.stderr)
    pieces, piece_rows, id_type = bulk_input.plan(source, files, columns, before.get("piece_rows"), workers)
    if columns["id"] and not before:
        bulk_input.check_ids(source, pieces, columns["id"])
    record = before or bulk_output.make_record(card, settings, piece_rows, len(pieces))
    bulk_output.write_record(output, record)
    left = bulk_output.pieces_left(output, pieces)
    job = {"pieces": pieces, "columns": columns, "id_type": id_type, "card": card, "graph": graph, "url": args.url}
    job |= {"input": bulk_input.absolute(args.input[0]), "output": bulk_input.absolute(args.output)}
    job |= {"repository": args.repository.resolve(), "timeout_s": args.timeout_s}
    began = time.monotonic()
    if left:
        bulk_run.run(job, left, workers, address, args.stall_s)
    summary = bulk_output.summarize(output, pieces, left, time.monotonic() - began)
    bulk_output.write_record(output, record | {"summary": summary})
    print(bulk_output.say(args.output, summary, by))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
