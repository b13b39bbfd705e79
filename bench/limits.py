#!/usr/bin/env python3
"""Measure how near a classifier's service is to its limits: the bare engine, the padding, the GEMM roof, overload.

Reads:  the checkpoint's folder, the repository of its export, and the texts.
Writes: results/<model>/<machine>/limits.json
Run:    python -m bench.limits --model build/reviews-checkpoint --repository build/reviews --service openvino,INT8
Prints: for each service and concurrency: served, bare, their ratio, the mean batch; overload ÷ the best level.

Bare is the same engine and precision in this process, without a server: after each window it gets the window's texts,
tokenised, in batches of the size that the service formed. A position is a token that is computed, padding too. Overload
is a closed loop of four times the largest concurrency. Alone, some requests are refused at once, by the model's own code, and
the texts are also answered in this process, from words to labels: together that is what a served text costs at least. The services FP32 and --service take turns, round by round.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from pathlib import Path

from tqdm import tqdm

from bench import client, processes, rounds
from bench.arithmetic import spread
from bench.install import BUILD
from bench.length import count_flops
from bench.peers import read_export, read_input
from bench.roofs import measure_roofs
from bench.systems import NAMED, SERVE, System
from core.arguments import make_parser
from core.engines import ENGINES
from core.files import RESULTS, TEXTS, write_json
from core.record import environment_record, results_folder
from core.repository import tokenizer_path
from core.runner import Runner
from core.tables import CPU_PRECISIONS
from core.tokens import load_tokenizer
from serving.bulk_answers import open_in_process
from serving.one_pass import graph_settings, opener
from tasks.table import TASKS

CONCURRENCY, REQUESTS, OVERLOAD = (1, 8, 32), (60, 160, 320), 512
FP32 = ("onnxruntime", "FP32")


# --- without a server ----------------------------------------------------------------


class Bare:
    """A service's Runner in this process; it counts the positions that it computes."""

    def __init__(self, repository, card, engine, precision, texts):
        task, tokenizer = TASKS[card["task"]], load_tokenizer(tokenizer_path(repository))
        padding, settings = tokenizer.padding, graph_settings(repository, card, precision, engine)
        tokenizer.no_padding()
        self.encodings, self.positions = tokenizer.encode_batch(texts), []
        self.lengths = [len(encoding.ids) for encoding in self.encodings]
        open_graph = functools.partial(self.open, opener(settings, task.output))
        self.run = Runner(settings | {"per_token": task.per_token}, padding, open_graph)
        self.texts, self.answer = texts, open_in_process(repository, card, settings)

    def whole_ms(self, start, count):
        """Mean time of a text alone, from its words to its answer, as embed.py has it: the service's code without a server."""
        began = time.perf_counter()
        for number in range(start, start + count):
            self.answer([(self.texts[number % len(self.texts)],)])
        return 1000 * (time.perf_counter() - began) / count

    def open(self, open_graph, sizes):
        return [functools.partial(self.count, session) for session in open_graph(sizes)]

    def count(self, session, feeds):
        self.positions.append(feeds["INPUT_IDS"].size)
        return session(feeds)

    def window(self, start, count, size):
        """(texts/s, positions, tokens) of the texts from number `start` on, round and round, `size` at a time."""
        numbers = [n % len(self.encodings) for n in range(start, start + count)]
        self.positions.clear()
        began = time.perf_counter()
        for i in range(0, count, size):
            self.run([self.encodings[n] for n in numbers[i : i + size]])
        seconds = time.perf_counter() - began
        return count / seconds, sum(self.positions), sum(self.lengths[n] for n in numbers)


# --- with one ------------------------------------------------------------------------


def measure_service(bench, system, server, bare, number):
    """All windows of one service in a round; round 0 warms up."""
    args = bench.args
    for concurrency, count in zip(
        [*args.concurrency, args.overload], [*args.requests, args.overload_requests], strict=True
    ):
        rounds.measure_window(bench, system, server, number, concurrency, count)
        row = bench.windows[-1] if number else {}
        if concurrency == 1:
            row["refused_ms"], row["in_process_ms"] = (
                refused_ms(bench, system, server, count),
                bare.whole_ms(number * count, count),
            )
        if concurrency != args.overload:
            executions, texts = row.get("batches") or (1, 1)
            speed, positions, tokens = bare.window(number * count, count, max(1, round(texts / executions)))
            row |= {"bare_texts_per_s": speed, "positions": positions, "tokens": tokens}


def refused_ms(bench, system, server, count):
    """Median time of a request that the model's own code refuses at once: what it costs to carry one there and back.

    They take turns with ones that are answered, so that they find the processor as these do.
    """
    asked = dataclasses.replace(system, ask="refused")
    refused = client.make_requests(asked, bench.service, ["a text that nobody reads"])
    requests = [request for good in bench.requests[system.name][:count] for request in (good, *refused)]
    window = client.run_window(system, server.ports, bench.service, requests, 1, 0, len(requests))
    found = [(status, seconds) for number, seconds, status, _ in window.answers if number % 2]
    if any(status != 400 for status, _ in found):
        raise processes.NotMeasured("expected a refusal of each request with an unknown parameter, found an answer")
    return 1000 * statistics.median(seconds for _, seconds in found)


def summarise(bench, system):
    """One service's entry in limits.json."""
    own = [w for w in bench.windows if w["system"] == system.name]
    levels, over = {}, [w for w in own if w["concurrency"] == bench.args.overload]
    for concurrency in bench.args.concurrency:
        rows = [w for w in own if w["concurrency"] == concurrency]
        executions, texts = (sum(w["batches"][i] for w in rows) for i in (0, 1))
        levels[str(concurrency)] = {
            "texts_per_s": spread(w["texts_per_s"] for w in rows),
            "bare_texts_per_s": spread(w["bare_texts_per_s"] for w in rows),
            "served_to_bare": spread(w["texts_per_s"] / w["bare_texts_per_s"] for w in rows),
            "mean_batch_size": texts / executions if executions else None,
            "positions_per_token": sum(w["positions"] for w in rows) / sum(w["tokens"] for w in rows),
        }
        for key in ("refused_ms", "in_process_ms"):
            if found := [w[key] for w in rows if key in w]:
                levels[str(concurrency)][key] = spread(found)
    best = {w["round"]: max(v["texts_per_s"] for v in own if v["round"] == w["round"] and v not in over) for w in over}
    failed = sum(w["answers"]["failed"] for w in over)
    overload = {"texts_per_s": spread(w["texts_per_s"] for w in over), "failed": failed}
    overload["to_best_level"] = spread(w["texts_per_s"] / best[w["round"]] for w in over)
    return {"levels": levels, "overload": overload}


def measure(args, card, facts, texts, expected):
    """Entries of "services" in limits.json."""
    systems = {}
    for engine, precision in args.service:
        command = f"{SERVE}{{repository}} --engine {engine} --precision {precision}"
        systems[engine, precision] = System(f"{engine}, {precision}", NAMED, command, "triton")
    bench = rounds.Bench(args, list(systems.values()), facts, texts, expected)
    with contextlib.ExitStack() as stack:
        servers = {pair: rounds.start(bench, [system], stack, "start_s") for pair, system in systems.items()}
        started = [pair for pair in systems if servers[pair]]
        bares = {pair: Bare(args.repository, card, *pair, texts) for pair in started}
        for number in tqdm(range(args.rounds + 1), desc="limits", unit="round", mininterval=1):
            for pair in rounds.rotate(started, number):
                measure_service(bench, systems[pair], servers[pair], bares[pair], number)
    return [
        {"engine": pair[0], "precision": pair[1]} | bench.found[system.name] | (summarise(bench, system) if pair in started else {})
        for pair, system in systems.items()
    ]  # fmt: skip


def describe(record):
    """The lines that are printed at the end."""
    for service in record["services"]:
        name = f"{service['engine']}, {service['precision']}"
        if "error" in service:
            yield f"{name}: not measured: {service['error']}"
            continue
        for concurrency, row in service["levels"].items():
            yield (
                f"{name:18} concurrency {concurrency:>2} {row['texts_per_s']['median']:8.1f} served {row['bare_texts_per_s']['median']:8.1f} bare  "
                f"ratio {row['served_to_bare']['median']:.2f}  mean batch {row['mean_batch_size'] or 0:.2f}  "
                f"positions ÷ tokens {row['positions_per_token']:.2f}"
                + "".join(f"  {key} {row[key]['median']:.2f}" for key in ("in_process_ms", "refused_ms") if key in row)
            )
        yield f"{name:18} overload ÷ best level {service['overload']['to_best_level']['median']:.2f}"


def pair(text):
    engine, _, precision = text.partition(",")
    if engine not in ENGINES or precision not in CPU_PRECISIONS:
        raise ValueError(text)
    return engine, precision


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a classifier's checkpoint")
    parser.add_argument("--repository", type=Path, required=True, help="its export, by torch2onnx.py")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="one a line, or a column of a .tsv or .csv file")
    parser.add_argument("--text-column", default="text", help="name in the first line, or a number from 1")
    parser.add_argument(
        "--service",
        type=pair,
        action="append",
        default=[],
        metavar="ENGINE,PRECISION",
        help="beside FP32; again for more",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCY), help="default: 1 8 32")
    parser.add_argument("--requests", type=int, nargs="+", default=list(REQUESTS), help="of a window, of each of them")
    parser.add_argument("--overload-requests", type=int, default=OVERLOAD, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--timeout-s", type=float, default=300, help="for a first right answer (default: %(default)g)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    numbers = (*args.concurrency, *args.requests, args.overload_requests, args.rounds)
    if len(args.requests) != len(args.concurrency) or min(numbers) < 1:
        parser.error("expected as many --requests as --concurrency, and all numbers of at least 1")
    args.service = list(dict.fromkeys([FP32, *args.service]))
    args.overload = 4 * max(args.concurrency)
    return args


def main():
    args = parse_args()
    texts = read_input(args.texts, args.text_column)
    from bench.expected import expected_answers

    card, facts = read_export(args.repository, args.model)
    args.work = BUILD / "work" / card["weights_sha256"][:12]
    expected = expected_answers(args.model, texts, card["max_length"])
    services = measure(args, card, facts, texts, expected)
    tokenizer = load_tokenizer(tokenizer_path(args.repository))
    tokenizer.no_padding()
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    flops = count_flops(args.model, sorted(set(lengths)))
    settings = {
        key: getattr(args, key) for key in ("concurrency", "requests", "rounds", "overload", "overload_requests")
    }
    record = {"model": card, "environment": environment_record(), "settings": settings}
    record |= {"texts": {"file": args.texts.name, "count": len(texts)}, "roofs_flops_per_s": measure_roofs()}
    record |= {"flops_per_text": statistics.fmean(flops[n] for n in lengths), "services": services}
    path = results_folder(args.results, card) / "limits.json"
    write_json(path, record)
    print(*describe(record), path, sep="\n")


if __name__ == "__main__":
    main()
