#!/usr/bin/env python3
"""Tokens per second of a generating service: served, in process without a server, and by transformers' generate().

Reads:  --repository, which is served at --url, and the --model that it was exported from.
Writes: results/<model>/<machine>/generation.json
Run:    python -m serving.generation_speed --repository build/chat --model build/chat-checkpoint
Prints: one line for each batch: "batch 1: served … tokens/s, in process …, generate() …", and their ratios

The three are measured in turn, round by round, with the same prompts and as many tokens each. What they answer is
compared too. Ratios are those of one round, of which the median counts, as of the speeds.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import tritonclient.grpc

from core.arguments import make_parser
from core.files import RESULTS, TEXTS, read_texts, write_json
from core.generation import Wish, generate, in_process
from core.onnx_runtime import open_session
from core.record import environment_record, results_folder
from core.repository import read_card
from core.tokens import load_tokenizer
from serving.generation import graph_folder, graph_paths
from serving.server import GRPC_URL, connect, one_pass, read_server
from tasks.table import GENERATION

BATCHES = (1, 8)
SERVED, OWN, TORCH = "served", "in process", "generate()"


def ask_stream(client, model, texts, parameters):
    """Send the texts as one request over gRPC, as a decoupled model takes it; returns the responses, each a dict."""
    found = []
    tensor = tritonclient.grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=object))
    client.start_stream(lambda result, error: found.append(error or result))
    client.async_stream_infer(model, [tensor], parameters=parameters)
    client.stop_stream()  # waits for all that was asked
    failed = next((answer for answer in found if isinstance(answer, Exception)), None)
    if failed:
        raise failed
    return [{name: answer.as_numpy(name) for name in ("GENERATED", "TOKENS", "FINISH_REASON")} for answer in found]


# --- three ways to the same answers: [(text, number of tokens)] ------------------------


def served_answers(client, model, count, texts):
    """Answers of the server."""
    (answer,) = ask_stream(client, model, texts, {"max_new_tokens": count})
    return [
        (text.decode(), int(tokens))
        for text, tokens in zip(answer["GENERATED"][:, 0], answer["TOKENS"][:, 0], strict=True)
    ]


def own_answers(run, settings, tokenizer, count, texts):
    """Answers of the same loop in this process."""
    prompts = [tokenizer.encode(text).ids for text in texts]
    rows = [[] for _ in prompts]
    for row, token, _ in generate(run, settings, prompts, [Wish(count)] * len(prompts)):
        rows[row].append(token)
    return [(tokenizer.decode(row), len(row)) for row in rows]


def torch_answers(model, card, tokenizer, count, texts):
    """Answers of transformers' generate() in torch."""
    from tasks.generation_check import greedy_tokens  # torch: -h answers first

    rows = greedy_tokens(model, card, [tokenizer.encode(text).ids for text in texts], count)
    return [(tokenizer.decode(row), len(row)) for row in rows]


def load_torch(reference, card):
    """The checkpoint in torch with the attention that transformers chooses; exits unless it was the one exported."""
    import torch  # takes seconds: -h answers first
    import transformers

    from core.sources import find_folders

    options = {"revision": None, "tokenizer": None, "random_weights": False, "packaged_if_offline": False}
    folder, _, found = find_folders(argparse.Namespace(model=reference, **options))
    if found["weights_sha256"] != card["weights_sha256"]:
        raise SystemExit(f"--model: expected the checkpoint that was exported, {card['name']}, found other weights")
    auto_model = getattr(transformers, GENERATION[card["task"]].auto_model)
    return auto_model.from_pretrained(folder, dtype=torch.float32).eval()


def make_ways(args, card, tokenizer):
    """{name: function from texts to answers}."""
    service = card["service"]
    sessions = {
        graph: open_session(path) for graph, path in graph_paths(args.repository, card, service["precision"]).items()
    }
    client = connect(args.url, "grpc")[0]
    ways = {
        SERVED: partial(served_answers, client, service["name"], args.tokens),
        OWN: partial(own_answers, in_process(sessions), card["generation"], tokenizer, args.tokens),
    }
    if args.model:
        ways[TORCH] = partial(torch_answers, load_torch(args.model, card), card, tokenizer, args.tokens)
    return ways


# --- the measurement -------------------------------------------------------------------


def measure(ways, texts, rounds):
    """What one batch shows, a row of the record; a first round warms up, and its answers are compared."""
    answers = {name: way(texts) for name, way in ways.items()}
    speeds = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:  # so that none is always the first
            started = time.perf_counter()
            tokens = sum(count for _, count in ways[name](texts))
            speeds[name].append(tokens / (time.perf_counter() - started))
    others = [name for name in ways if name != SERVED]
    ratios = {name: [a / b for a, b in zip(speeds[SERVED], speeds[name], strict=True)] for name in others}
    return {
        "batch": len(texts),
        "tokens": sum(count for _, count in answers[SERVED]),
        "tokens_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "served_to": {name: statistics.median(values) for name, values in ratios.items()},
        "equal_answers": {n: sum(map(tuple.__eq__, answers[SERVED], answers[n])) for n in others},
        "rounds_tokens_per_s": speeds,
    }


def describe(row):
    """A row in a line."""
    speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in row["tokens_per_s"].items())
    ratios = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in row["served_to"].items())
    equal = ", ".join(f"{count} of {row['batch']} as {name}" for name, count in row["equal_answers"].items())
    return f"batch {row['batch']}: {speeds} tokens/s; served is {ratios}; answers equal: {equal}"


def find_server(args, card):
    """What serves, and what executes the graphs."""
    service = card["service"]
    found = one_pass(service["name"], args.url, "grpc")
    graphs = () if found else GENERATION[card["task"]].graphs
    server = read_server(args.url, "grpc", {graph: graph_folder(graph, service["precision"]) for graph in graphs})
    if found and found["reference_sha256"] != card["reference_sha256"]:
        raise SystemExit(f"{args.url}: expected the graphs of {args.repository}, found others; serve that repository")
    return server | ({"path": "one pass", "executed_by": found["one_pass"]} if found else {})


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument(
        "--model", help="what was exported: a folder, or as torch2onnx.py takes it (default: no generate())"
    )
    parser.add_argument("--url", default=GRPC_URL, help="HOST:PORT of gRPC (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main():
    args = parse_args()
    card = read_card(args.repository)
    if card["task"] not in GENERATION:
        raise SystemExit(f"{args.repository}: expected a service that generates, found --task {card['task']}")
    tokenizer = load_tokenizer(args.repository / card["service"]["name"] / "tokenizer.json")
    texts = [text for text in read_texts(args.texts) if len(tokenizer.encode(text).ids) <= card["max_length"]]
    if len(texts) < max(BATCHES):
        raise SystemExit(
            f"{args.texts}: expected {max(BATCHES)} texts of at most {card['max_length']} tokens, found {len(texts)}"
        )
    record = {"model": card, "environment": environment_record(), "server": find_server(args, card)}
    record |= {"texts": args.texts.name, "max_new_tokens": args.tokens, "rows": []}
    ways = make_ways(args, card, tokenizer)
    for batch in BATCHES:
        record["rows"].append(measure(ways, texts[:batch], args.rounds))
        print(describe(record["rows"][-1]), flush=True)
    path = results_folder(args.results, card) / "generation.json"
    write_json(path, record)
    print(path)


if __name__ == "__main__":
    main()
