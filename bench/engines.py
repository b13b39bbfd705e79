#!/usr/bin/env python3
"""Measure each engine and precision that a service can have, through its server, against ONNX Runtime in FP32.

Reads:  --repository: a service of an encoder task, with the graphs of quantize.py and the TorchScript of
        torch2onnx.py --torchscript where they are there; --texts, one a line.
Writes: results/<model>/<machine>/engines.json; a repository of each candidate, and logs, in build/engines/.
Run:    python -m bench.engines --repository build/reviews
Prints: a line for each candidate: texts/s alone and eight together, memory, start, deviation, whether it holds.

One server at a time, model by model (--path ensemble); every candidate once in each round. A deviation is that of the
graph's own output, on the tokens that the server made.
"""

import statistics
from pathlib import Path

from tqdm import tqdm

from bench import client, processes
from bench.arithmetic import percentile, spread
from bench.rounds import rotate
from bench.systems import ANSWERED, PROJECT, SERVE, System
from core.arguments import make_parser
from core.engines import has_bf16, why_missing
from core.files import RESULTS, ROOT, TEXTS, evaluation_texts, write_json
from core.files import spread as evenly
from core.onnx_runtime import open_session
from core.record import environment_record, gpu_record, results_folder
from core.repository import answering_key, graph_path, present, read_card, script_path
from core.tables import ATTENTION_MASK, EMBEDDERS, MODELS, NAMES, PRECISIONS, REFERENCE
from serving.plans import plan_path
from serving.repository import extract
from serving.server import SERVER_ERRORS, executed_by, infer, infer_graph, read_config, text_tensor
from tasks.examples import examples
from tasks.table import OWN, TASKS
from verdict.choose import holds, quality, share

REQUESTS = {1: 60, 8: 160}  # of a window, for each concurrency
QUICK = {1: 12, 8: 24}
DEVIATION_TEXTS = 64
BUILD = ROOT / "build" / "engines"


def candidates(repository):
    """[(engine, precision)] that the repository has files of and this machine executes; the reference first."""
    precisions = {MODELS[key].precision: key for key in present(repository) if key in EMBEDDERS and key != REFERENCE}
    others = [p for p in precisions if p != "FP32"]  # whose graph is the reference by another name
    found = [("onnxruntime", REFERENCE), *(("onnxruntime", p) for p in others if PRECISIONS[p].on_cpu)]
    if reason := why_missing("openvino"):
        print(f"openvino: not measured: {reason}")
    else:
        found += [("openvino", p) for p in (REFERENCE, *(["BF16"] if has_bf16() else []), *others)]
    if script_path(repository).is_file():
        found.append(("pytorch", REFERENCE))
    else:
        print("pytorch: not measured: no TorchScript; run torch2onnx.py --torchscript")
    plans = [p for p, key in precisions.items() if plan_path(repository, key).is_file()] if gpu_record() else []
    return found + [("tensorrt", p) for p in plans]


class Candidate:
    """One engine and precision: its repository, and what was found."""

    def __init__(self, repository, card, engine, precision):
        self.engine, self.precision, self.service = engine, precision, card["service"]["name"]
        self.folder = BUILD / f"{engine}-{precision}"
        extract(repository, self.folder / self.service, precision, engine)
        own = read_card(self.folder / self.service)["service"]
        self.key = answering_key(own)
        command = SERVE + "{repository} --path ensemble"
        self.system = System(f"{engine}, {precision}", PROJECT, command, "any")
        self.row = {"engine": engine, "precision": "FP32" if precision == REFERENCE else precision}
        self.starts, self.memory, self.windows = [], [], {}


def measure_round(one, requests, counts, args, number):
    """Start a candidate's server, ask it, end it; the first round also reads what executes it. Raises NotMeasured."""
    facts = {"repository": one.folder / one.service, "service": one.service}
    server = processes.start(one.system, facts, one.folder / "work")
    try:
        request = requests[0]
        one.starts.append(processes.wait_answer(one.system, server, one.service, request, ANSWERED, args.timeout_s))
        for concurrency, count in counts.items():
            for kept in (False, True):  # the first warms up
                window = client.run_window(
                    one.system, server.ports, one.service, requests, concurrency, number * count, count
                )
                if failed := sum(status != 200 for _, _, status, _ in window.answers):
                    raise processes.NotMeasured(
                        f"{failed} of {count} requests failed: {processes.last_line(server.log)}"
                    )
                if kept:
                    one.windows.setdefault(concurrency, []).append(window)
        one.memory.append(processes.memory_mib(server))
        if "executed_by" not in one.row:
            url = f"127.0.0.1:{server.ports['http']}"
            one.row["executed_by"] = executed_by(read_config(NAMES[one.key], url, "http"))
            one.feeds, one.found = rows_of(one.key, args, url)
    finally:
        processes.end(server)


def rows_of(key, args, url):
    """([tokens], [output]) of each text, asked of a server's tokenizer and graph."""
    card = read_card(args.repository)
    task = TASKS[card["task"]]
    asked = examples(card, evenly(evaluation_texts(args.texts), DEVIATION_TEXTS))
    feeds = [infer("tokenizer", text_tensor([each], task.takes), card["inputs"], url) for each in asked]
    return feeds, [real(task, infer_graph(key, card, tokens, task.output, url), tokens) for tokens in feeds]


def real(task, output, feeds):
    """The rows of real tokens of one text's output, or the output."""
    return output[0][feeds[ATTENTION_MASK][0] > 0] if task.per_token else output[0]


def summarise(one, args, task, session):
    """The row of a candidate."""
    reference = [real(task, session.run([task.output], tokens)[0], tokens) for tokens in one.feeds]
    row = one.row | quality(task, reference, one.found)
    row["holds"] = bool(holds(task, row["precision"], row, args.agreement))
    row |= {"start_s": one.starts, "memory_mib": statistics.median(one.memory), "levels": {}}
    for concurrency, windows in one.windows.items():
        latencies = [1000 * seconds for window in windows for _, seconds, *_ in window.answers]
        row["levels"][str(concurrency)] = {
            "texts_per_s": spread(len(window.answers) / window.seconds for window in windows),
            "latency_p50_ms": percentile(latencies, 0.5),
            "n": len(latencies),
        }
    return row


def describe(row):
    """One line for people."""
    if "error" in row:
        return f"{row['engine']:12}{row['precision']:6} not measured: {row['error']}"
    speeds = "".join(f"{level['texts_per_s']['median']:8.1f} at {c}" for c, level in row["levels"].items())
    return (
        f"{row['engine']:12}{row['precision']:6}{speeds} texts/s  {row['memory_mib']:6.0f} MiB  start "
        f"{statistics.median(row['start_s']):.1f} s  relative L2 error {row['relative_l2_error']:.2g}  "
        f"{'holds' if row['holds'] else 'does not hold'}  {row['executed_by']}"
    )


def measure(args, card):
    """A row for each candidate; one that cannot be measured has the reason."""
    task = TASKS[card["task"]]
    texts = [
        dict(zip(task.takes, e if isinstance(e, tuple) else (e,), strict=True))
        for e in examples(card, evaluation_texts(args.texts))
    ]
    every = [Candidate(args.repository, card, *pair) for pair in candidates(args.repository)]
    rounds = range(1, args.rounds + 1)
    with tqdm(total=len(every) * args.rounds, desc="engines", unit="server", mininterval=1) as progress:
        for number in rounds:
            for one in rotate(every, number - 1):
                progress.update()
                if "error" in one.row:
                    continue
                requests = client.make_requests(one.system, one.service, texts)
                try:
                    measure_round(one, requests, args.requests, args, number)
                except (processes.NotMeasured, *SERVER_ERRORS) as error:
                    one.row["error"] = str(error)
    session = open_session(graph_path(args.repository, REFERENCE))  # ONNX Runtime in FP32, in this process
    return [one.row if "error" in one.row else summarise(one, args, task, session) for one in every]


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="one a line (default: the half of assets/texts.txt that measures)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    parser.add_argument("--agreement", type=share, default=0.99, help="of a classifier (default: %(default)s)")
    parser.add_argument("--timeout-s", type=int, default=300, help="of a start (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: expected at least 1")
    args.requests = QUICK if args.quick else REQUESTS
    args.rounds = 1 if args.quick else args.rounds
    return args


def main():
    args = parse_args()
    card = read_card(args.repository)
    if card["task"] == OWN or card["task"] not in TASKS:
        raise SystemExit(f"{args.repository}: expected a service of an encoder task, found {card['task']}")
    rows = measure(args, card)
    settings = {"rounds": args.rounds, "requests": {str(c): n for c, n in args.requests.items()}}
    compared = len(evenly(evaluation_texts(args.texts), DEVIATION_TEXTS))
    texts = {"file": (args.texts or TEXTS).name, "compared": compared}
    path = results_folder(args.results, card) / "engines.json"
    record = {"model": card, "environment": environment_record(), "texts": texts, "settings": settings, "rows": rows}
    write_json(path, record)
    print(*map(describe, rows), path, sep="\n")


if __name__ == "__main__":
    main()
