#!/usr/bin/env python3
"""Measure how a text's cost in a service grows with its length, beside the growth of its FLOPs.

Reads:  the checkpoint's folder and the repository of its export; a running server with --url, else the graph in
        this process, as a service executes it; assets/texts.txt for the words.
Writes: results/<model>/<machine>/length.json
Run:    python -m bench.length --model build/reviews-checkpoint --repository build/reviews --url 127.0.0.1:8000
Prints: a line for each length: median time, and how many times that of the shortest text; the same of the FLOPs.

One text at a time; the lengths take turns, round by round, and a time is the median of all texts of its length.
"""

import itertools
import statistics
import time
from pathlib import Path

from tqdm import tqdm

from bench.arithmetic import spread
from core.arguments import make_parser
from core.engines import ENGINES
from core.files import RESULTS, TEXTS, read_texts, write_json
from core.record import environment_record, results_folder
from core.repository import read_card, tokenizer_path
from core.tables import CPU_PRECISIONS, REFERENCE, TEXT
from core.tokens import load_tokenizer
from serving.server import SERVER_ERRORS, infer, one_pass, text_tensor
from tasks.table import OWN, TASKS

LENGTHS, TEXTS_EACH = (64, 128, 256, 384, 512), 4


def text_of(tokenizer, words, tokens):
    """A text of that many tokens, special ones too: words in turn, without those that would make it longer."""
    chosen, count = [], len(tokenizer.encode("").ids)
    for word in itertools.islice(itertools.cycle(words), 4 * tokens + len(words)):
        longer = len(tokenizer.encode(" ".join([*chosen, word])).ids)
        if count < longer <= tokens:
            chosen, count = [*chosen, word], longer
        if count == tokens:
            return " ".join(chosen)
    raise SystemExit(f"{TEXTS}: expected words that make a text of {tokens} tokens, found {count} at most")


def make_texts(tokenizer, lengths):
    """{length: texts}."""
    words = " ".join(read_texts(TEXTS)).split()
    step = len(words) // TEXTS_EACH
    return {
        n: [text_of(tokenizer, words[i * step :] + words[: i * step], n) for i in range(TEXTS_EACH)] for n in lengths
    }


def count_flops(model, lengths):
    """{length: FLOPs of a text} of a checkpoint's encoder, in closed form; the head of its task counts as one Linear."""
    import transformers  # it and torch take seconds

    from roofline.layers import UnknownLayer, list_layers
    from roofline.model import cost
    from tasks.embedding import Embedder, load_encoder

    transformers.logging.set_verbosity_error()  # that the head is left out is no news
    embedder = Embedder(load_encoder(model, False, 0), 2, 0).eval()
    try:
        layers = list_layers(embedder, max(lengths))
    except UnknownLayer as error:
        raise SystemExit(f"{model}: expected layers that the closed form knows, found {error}") from None
    return {n: sum(layer["calls"] * cost(layer, 1, n).flops for layer in layers) for n in lengths}


def ask_server(args, card):
    """(a function that asks the service for a text, what executes it)."""
    name = card["service"]["name"]
    outputs = [*TASKS[card["task"]].results] or [TASKS[card["task"]].output]
    by = one_pass(name, args.url, "grpc").get("one_pass", "its models, one by one")
    return lambda text: infer(name, text_tensor([text]), outputs, args.url, "grpc"), f"{by}, over gRPC"


def ask_runner(args, card):
    """The same without a server: tokenizer and graph in this process."""
    from verdict.choose import open_runner

    service, tokenizer = card["service"], load_tokenizer(tokenizer_path(args.repository))
    padding = tokenizer.padding
    tokenizer.no_padding()
    engine = args.engine or service.get("cpu_engine") or "onnxruntime"
    precision = args.precision or service.get("cpu_precision") or "FP32"
    run = open_runner(args.repository, card, engine, precision, padding)
    return lambda text: run([tokenizer.encode(text)]), f"{engine}, {precision}, without a server"


def measure(ask, texts, rounds):
    """{length: {"median", "min", "max"} of the rounds' medians, s}; every text is asked once a round."""
    seconds = {n: [] for n in texts}
    for number in tqdm(range(rounds + 1), desc="length", unit="round", mininterval=1):  # the first warms up
        for n, rows in texts.items():
            found = []
            for text in rows:
                started = time.perf_counter()
                ask(text)
                found.append(time.perf_counter() - started)
            seconds[n] += [statistics.median(found)] if number else []
    return {n: spread(values) for n, values in seconds.items()}


def check(args, card):
    """Exit unless the repository is a service of one text a row, of dynamic length, made of the checkpoint."""
    from core.checkpoint import weights_sha256  # it imports transformers

    task = TASKS.get(card["task"])
    if task is None or card["task"] == OWN or task.takes != (TEXT,) or card["fixed_length"]:
        raise SystemExit(f"{args.repository}: expected a service of one text, of any length, found {card['task']}")
    if card.get("weights_sha256") != weights_sha256(args.model):
        raise SystemExit(f"{args.repository}: expected the export of {args.model}, found that of other weights")


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint: its FLOPs are counted")
    parser.add_argument("--repository", type=Path, required=True, help="its export")
    parser.add_argument("--url", help="HOST:PORT of the running service's gRPC (default: no server)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="without --url (default: the service's)")
    parser.add_argument("--precision", choices=(REFERENCE, *CPU_PRECISIONS), help="without --url")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="default: 64 128 256 384 512")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.lengths = sorted(set(args.lengths))
    if len(args.lengths) < 2 or min(args.lengths) < 4 or args.rounds < 1:
        parser.error("--lengths: expected two of at least 4 tokens; --rounds: at least 1")
    return args


def main():
    args = parse_args()
    card = read_card(args.repository)
    check(args, card)
    if args.lengths[-1] > card["max_length"]:
        raise SystemExit(
            f"--lengths: expected at most {card['max_length']}, what the service reads; leave longer ones out"
        )
    tokenizer = load_tokenizer(tokenizer_path(args.repository))
    tokenizer.no_padding()
    texts = make_texts(tokenizer, args.lengths)
    flops = count_flops(args.model, args.lengths)
    ask, by = (ask_server if args.url else ask_runner)(args, card)
    try:
        seconds = measure(ask, texts, args.rounds)
    except SERVER_ERRORS as error:
        raise SystemExit(f"{args.url}: expected an answer to every text, found: {error}") from None
    rows = [{"tokens": n, "flops": flops[n], "seconds": seconds[n]} for n in args.lengths]
    path = results_folder(args.results, card) / "length.json"
    record = {"model": card, "environment": environment_record(), "executed_by": by, "rounds": args.rounds}
    write_json(path, record | {"texts_each": TEXTS_EACH, "rows": rows})
    first = rows[0]
    for row in rows:
        median = row["seconds"]["median"]
        print(
            f"{row['tokens']:4} tokens {1000 * median:8.2f} ms  × {median / first['seconds']['median']:.2f}  "
            f"FLOPs × {row['flops'] / first['flops']:.2f}"
        )
    print(path)


if __name__ == "__main__":
    main()
