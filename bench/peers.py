#!/usr/bin/env python3
"""Measure the project's service of a classifier against published servers of the same checkpoint.

Reads:  the checkpoint's folder, the repository of its export, and the texts.
Writes: results/<model>/<machine>/peers.json; environments, logs and copies in build/bench/.
Run:    ./bench/peers.py --model build/reviews-checkpoint --repository build/reviews --install
Prints: a line for each system and concurrency: texts a second, ratio to the project, p50, wrong answers.

One client asks all: one text a request, keep-alive, a closed loop. Every answer is compared with
transformers': label equal, score within a thousandth. Every server runs, one is asked at a time, in turn,
round by round; a ratio is to the project's window of the same round. --apart starts and ends the servers in
every round instead, where the memory is short. A peer that cannot be installed, does not start or gives no
answer is "not measured" with the reason. Whatever was started is ended, also on Ctrl-C.

--system adds a service: NAME=REPOSITORY serves another export with serve.sh (its options may follow),
NAME=COMMAND is any Triton server in the foreground, with {http}, {grpc} and {metrics} for its ports.
With --sentence-model and --sentence-repository sentence embeddings are measured too, beside
sentence-transformers in torch, ONNX Runtime and OpenVINO.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.install import BUILD, install, is_installed, versions
from bench.systems import SYSTEMS, hide_paths, named_system
from core.arguments import make_parser
from core.files import RESULTS, ROOT, TEXTS, read_texts, write_json
from core.record import environment_record, results_folder

CONCURRENCY, REQUESTS = (1, 8, 32), (60, 160, 320)
QUICK = (12, 24, 48)
BASE = SYSTEMS[0].name


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a classifier's checkpoint")
    parser.add_argument("--repository", type=Path, required=True, help="its export, by torch2onnx.py")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="one a line, or a column of a .tsv or .csv file")
    parser.add_argument(
        "--text-column", default="text", help="name in the first line, or a number from 1 (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {'; '.join(s.name for s in SYSTEMS)}")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=REPOSITORY or NAME=COMMAND",
        help="a further service; again for several",
    )
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCY), help="default: 1 8 32")
    parser.add_argument(
        "--requests",
        type=int,
        nargs="+",
        help=f"of a window, for each concurrency, default: {' '.join(map(str, REQUESTS))}",
    )
    parser.add_argument("--rounds", type=int, help="default: 5, quick: 2")
    parser.add_argument("--quick", action="store_true", help="two rounds of short windows: to try, not to report")
    parser.add_argument("--apart", action="store_true", help="one server at a time, started and ended in every round")
    parser.add_argument("--timeout-s", type=float, default=300, help="for a first right answer (default: %(default)g)")
    parser.add_argument(
        "--sentence-model", type=Path, help="folder of a sentence encoder, as sentence-transformers loads it"
    )
    parser.add_argument(
        "--sentence-repository",
        type=Path,
        nargs="+",
        help="its exports, --task sentence-embedding; ratios are to the first",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.quick else 5)
    default = dict(zip(CONCURRENCY, QUICK if args.quick else REQUESTS, strict=True))
    args.requests = args.requests or [default.get(c, 10 * c) for c in args.concurrency]
    if len(args.requests) != len(args.concurrency) or min(*args.requests, *args.concurrency, args.rounds) < 1:
        parser.error("expected as many --requests as --concurrency, and --rounds, all of at least 1")
    if unknown := set(args.only or ()) - {s.name for s in SYSTEMS}:
        parser.error(f"--only: expected some of {'; '.join(s.name for s in SYSTEMS)}, found {'; '.join(unknown)}")
    if bool(args.sentence_model) != bool(args.sentence_repository):
        parser.error("expected --sentence-model and --sentence-repository together")
    try:
        args.system = [named_system(text) for text in args.system]
    except ValueError as error:
        parser.error(f"--system: expected NAME=REPOSITORY or NAME=COMMAND with {{http}}, found {error}")
    return args


def read_input(path, column):
    """Texts of a file: a column of a .tsv or .csv, else one a line."""
    if path.suffix not in (".tsv", ".csv"):
        return read_texts(path)
    from core.labelled import find_columns, read_rows

    rows = read_rows(path, "a file of texts")
    (index,), named = find_columns(path, rows[0][1], (column,))
    texts = [cells[index].strip() for _, cells in rows[named:] if index < len(cells) and cells[index].strip()]
    if not texts:
        raise SystemExit(f"{path}: expected at least one text in column {column}, found none; check --text-column")
    return texts


def read_export(repository, model):
    """(card, {name: fact} of an export that commands ask for); exits where it is not that of the checkpoint."""
    from core.checkpoint import weights_sha256  # it imports transformers, which takes seconds
    from core.repository import graph_path, read_card, tokenizer_path
    from core.tables import REFERENCE

    card = read_card(repository)
    if card["task"] != "classification":
        raise SystemExit(f"{repository}: expected a classifier's export, found {card['task']}; name another")
    if card.get("weights_sha256") != weights_sha256(model):
        raise SystemExit(
            f"{repository}: expected the export of {model}, found that of other weights; run torch2onnx.py --task classification"
        )
    facts = {
        "model": model.resolve(), "repository": repository.resolve(), "service": card["service"]["name"],
        "graph": graph_path(repository, REFERENCE).resolve(), "tokenizer": tokenizer_path(repository).resolve(),
    }  # fmt: skip
    return card, facts


def choose_systems(args):
    """The rows to measure: the project's own always, since ratios are to it."""
    chosen = [s for s in SYSTEMS if not args.only or s.name in args.only or s.name == BASE]
    return chosen + args.system


def prepare(bench, args):
    """Make missing environments, or note why a system is not measured."""
    reasons = {}
    for name in dict.fromkeys(s.requirements for s in bench.alive()):
        if not is_installed(name):
            print(
                f"{'installing' if args.install else 'not installed:'} bench/requirements/{name}.txt", file=sys.stderr
            )
            reasons[name] = install(name) if args.install else "not installed; --install makes its environment"
    for system in bench.alive():
        if reason := reasons.get(system.requirements):
            bench.found[system.name]["error"] = hide_paths(reason)


def system_record(bench, system):
    """One system's entry in peers.json."""
    from bench.arithmetic import summarise

    own = [w for w in bench.windows if w["system"] == system.name]
    levels = {c: [w for w in own if w["concurrency"] == c] for c in bench.args.concurrency}
    facts = {
        "name": system.name,
        "kind": system.kind,
        "settings": system.settings,
        "versions": versions(system.requirements),
    }
    return facts | bench.found[system.name] | {"levels": {str(c): summarise(w) for c, w in levels.items() if w}}


def make_record(bench, card, texts):
    """peers.json: a summary of every system, and every window without its single latencies."""
    from bench.arithmetic import add_ratios
    from bench.expected import SCORE_TOLERANCE

    args = bench.args
    add_ratios(bench.windows, BASE)
    settings = {
        "texts": {"file": args.texts.name, "count": len(texts)}, "concurrency": args.concurrency, "requests": args.requests,
        "rounds": args.rounds, "apart": args.apart, "quick": args.quick, "score_tolerance": SCORE_TOLERANCE, "base": BASE,
    }  # fmt: skip
    systems = [system_record(bench, system) for system in bench.systems.values()]
    windows = [{key: value for key, value in w.items() if key != "latencies_ms"} for w in bench.windows]
    environment = environment_record()
    environment["argv"] = list(map(hide_paths, environment["argv"]))
    facts = {"model": card, "environment": environment, "settings": settings}
    return facts | {"systems": systems, "windows": windows, "embeddings": []}


def describe(record):
    """The lines that are printed at the end."""
    for system in record["systems"]:
        if "error" in system:
            yield f"{system['name']:24} not measured: {system['error']}"
        for concurrency, row in system["levels"].items():
            wrong = {name: count for name, count in row["answers"].items() if count and name != "right"}
            ratio = f"{row['ratio']['median']:5.2f} × project" if row["ratio"] else "no ratio"
            yield (
                f"{system['name']:24} concurrency {concurrency:>2} {row['texts_per_s']['median']:8.1f} texts/s  {ratio}  "
                f"p50 {row['latency_p50_ms']:7.1f} ms  {wrong or 'all right'}"
            )
    for row in record["embeddings"]:
        speed = (
            f"{row['texts_per_s']['median']:.1f} texts/s" if "texts_per_s" in row else f"not measured: {row['error']}"
        )
        yield f"{row['name']:38} {speed}"


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended, as by Ctrl-C
    texts = read_input(args.texts, args.text_column)
    # here, since transformers and tritonclient take longer to import than -h may
    from bench import offline, rounds
    from bench.expected import expected_answers

    card, facts = read_export(args.repository, args.model)
    # infinity's graph stays there, which is of these weights alone
    args.work = BUILD / "work" / card["weights_sha256"][:12]
    if args.sentence_model:
        offline.check_repositories(args.sentence_repository)
    expected = expected_answers(args.model, texts, card["max_length"])
    bench = rounds.Bench(args, choose_systems(args), facts, texts, expected)
    prepare(bench, args)
    path = results_folder(args.results, card) / "peers.json"
    try:
        rounds.measure(bench)
        record = make_record(bench, card, texts)
        write_json(path, record)
        if args.sentence_model:
            record["embeddings"] = offline.measure(args, texts)
            write_json(path, record)
    except KeyboardInterrupt:
        raise SystemExit(
            "expected to measure every round, found an interruption; what was not ended is not written"
        ) from None
    print(*describe(record), path.relative_to(ROOT) if path.is_relative_to(ROOT) else path, sep="\n")


if __name__ == "__main__":
    main()
