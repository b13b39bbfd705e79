#!/usr/bin/env python3
"""Tokens per second of a generating service: served, in process without a server, and by transformers' generate().

Reads:  --repository, which is served at --url, and the --model that it was exported from.
Writes: nothing.
Run:    python -m serving.generation_speed --repository build/chat --model build/chat-checkpoint
Prints: one line for each batch: "batch 1: served … tokens/s, in process …, generate() …", and their ratios

The three are measured in turn, round by round, with the same prompts and as many tokens each.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import tritonclient.grpc

from core.arguments import make_parser
from core.files import TEXTS, read_texts
from core.generation import Wish, generate
from core.onnx_runtime import open_session
from core.repository import read_card
from core.tokens import load_tokenizer
from serving.generation import graph_paths

BATCHES = (1, 8)


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


def served_tokens(client, model, texts, count):
    """Tokens that the server generated."""
    return int(sum(answer["TOKENS"].sum() for answer in ask_stream(client, model, texts, {"max_new_tokens": count})))


def own_tokens(run, settings, tokenizer, texts, count):
    """Tokens that the same loop generated in this process."""
    prompts = [tokenizer.encode(text).ids for text in texts]
    return sum(1 for _ in generate(run, settings, prompts, [Wish(count)] * len(prompts)))


def torch_tokens(model, tokenizer, card, texts, count):
    """Tokens that transformers' generate() made in torch."""
    from tasks.generation_check import greedy_tokens  # torch: -h answers first

    prompts = [tokenizer.encode(text).ids for text in texts]
    return sum(map(len, greedy_tokens(model, card, prompts, count)))


def load_torch(folder, card):
    """The checkpoint in torch with the attention that transformers chooses."""
    import transformers  # takes seconds: -h answers first

    from tasks.table import GENERATION

    return getattr(transformers, GENERATION[card["task"]].auto_model).from_pretrained(folder).eval()


def make_ways(args, card, texts):
    """{name: function that generates once and returns how many tokens}."""
    precision = card["service"]["precision"]
    paths = graph_paths(args.repository, card, precision)
    sessions = {graph: open_session(path) for graph, path in paths.items()}
    names = {graph: [output.name for output in session.get_outputs()] for graph, session in sessions.items()}
    run = lambda graph, feeds: dict(zip(names[graph], sessions[graph].run(None, feeds), strict=True))  # noqa: E731
    service = card["service"]["name"]
    tokenizer = load_tokenizer(args.repository / service / "tokenizer.json")
    client = tritonclient.grpc.InferenceServerClient(args.url)
    ways = {
        "served": partial(served_tokens, client, service, texts, args.tokens),
        "in process": partial(own_tokens, run, card["generation"], tokenizer, texts, args.tokens),
    }
    if args.model:
        model = load_torch(args.model, card)
        ways["generate()"] = partial(torch_tokens, model, tokenizer, card, texts, args.tokens)
    return ways


def measure(ways, rounds):
    """{name: tokens/s, the median over rounds}; the first round warms up."""
    speeds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            speeds[name].append(way() / (time.perf_counter() - started))
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the checkpoint's folder (default: no generate())")
    parser.add_argument("--url", default="127.0.0.1:8001", help="HOST:PORT of gRPC (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    return parser.parse_args()


def main():
    args = parse_args()
    card = read_card(args.repository)
    for batch in BATCHES:
        found = measure(make_ways(args, card, read_texts(args.texts)[:batch]), args.rounds)
        said = ", ".join(f"{name} {speed:.1f}" for name, speed in found.items())
        ratios = ", ".join(
            f"{found['served'] / speed:.2f} of {name}" for name, speed in found.items() if name != "served"
        )
        print(f"batch {batch}: {said} tokens/s; served is {ratios}", flush=True)


if __name__ == "__main__":
    main()
