#!/usr/bin/env python3
"""Measure embed.py beside bare sessions of the same graph, over the same sentences sorted by length, in the same batches.

Reads:  --repository, a service of one text a row; --texts, one a line, repeated with their words turned round.
Writes: results/<model>/<machine>/embed.json; the rows and their answers in build/embed-speed/.
Run:    python -m bench.embed_speed --repository build/sentences
Prints: a line for each bare session, and embed.py's share of it: without the start of Ray, with it, and in processor time

The rounds alternate. A bare session gets tokens that are ready: tokenising, reading and writing are embed.py's alone.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.arithmetic import spread
from core import runner
from core.arguments import make_parser
from core.files import RESULTS, ROOT, TEXTS, read_json, read_texts, write_json
from core.onnx_runtime import open_session
from core.record import environment_record, results_folder
from core.repository import graph_path, read_card, tokenizer_path
from core.tables import PACKED_FILE, REFERENCE
from core.tokens import load_tokenizer

WORK = ROOT / "build" / "embed-speed"


def vary(texts, count):
    """So many texts: all of them, then all again with the first word behind the last one, and so on."""
    for number in range(count):
        words = texts[number % len(texts)].split()
        turn = number // len(texts) % len(words)
        yield " ".join(words[turn:] + words[:turn])


def make_feeds(repository, card, texts):
    """{form: tensors of each batch}: texts sorted by length, in batches of embed.py's own budget, padded and packed."""
    tokenizer = load_tokenizer(tokenizer_path(repository))
    padding = tokenizer.padding
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(texts)
    batches = [[encodings[i] for i in batch] for batch in runner.padded_batches([len(e.ids) for e in encodings], 1)]
    feeds = {"padded": [runner.pad(batch, card["inputs"], padding) for batch in batches]}
    if card.get("packed"):
        names, offset = runner.packed_inputs(card["inputs"]), card["packed"]["position_offset"]
        feeds["packed"] = [runner.pack(batch, names, offset) for batch in batches]
    return feeds


def open_bare(repository, feeds, cores):
    """{name: function that computes all batches}: a session with all cores, and one for each core."""
    reference = graph_path(repository, REFERENCE)
    found = {}
    for form, batches in feeds.items():
        path = reference.with_name(PACKED_FILE) if form == "packed" else reference
        for streams in dict.fromkeys((1, cores)):
            sessions = [open_session(path, cores // streams) for _ in range(streams)]
            name = f"{form}, {streams} of {cores // streams} threads"
            found[name] = lambda sessions=sessions, batches=batches: run_all(sessions, batches)
    return found


def run_all(sessions, batches):
    """Each session takes the next batch when it is done with one."""
    left = iter(batches)

    def work(session):
        for feeds in left:
            session.run(None, feeds)

    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(work, sessions))


def run_embed(args, source):
    """embed.py's own counts of a run."""
    output = WORK / "answers"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        ROOT / "embed.py",
        "--input",
        source,
        "--output",
        output,
        "--repository",
        args.repository,
    ]
    command += ["--engine", "onnxruntime", "--precision", "FP32"] if not args.url else ["--url", args.url]
    subprocess.run(list(map(str, command)), check=True)
    return read_json(output / "_embed.json", "run it again")["summary"]


def measure(bare, args, source, rows):
    """[{"embed": its counts, "bare": {name: {"seconds", "cpu_s"}}}] of the rounds; the bare sessions run once before."""
    for compute in bare.values():
        compute()
    rounds = []
    for _ in range(args.rounds):
        found = {"embed": run_embed(args, source), "bare": {}}
        for name, compute in bare.items():
            began, cpu_s = time.perf_counter(), time.process_time()
            compute()
            found["bare"][name] = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_s}
        rounds.append(found)
    return rounds


def compare(rounds, name, rows):
    """A bare session's texts a second, and embed.py's share of it in each way."""
    pairs = [(each["embed"]["run"], each["bare"][name]) for each in rounds]
    found = {
        "texts_per_s": spread([rows / bare["seconds"] for _, bare in pairs]),
        "ratio": spread([bare["seconds"] / own["compute_s"] for own, bare in pairs]),
        "ratio_with_start": spread([bare["seconds"] / own["wall_s"] for own, bare in pairs]),
    }
    # a worker that asks a server computes nothing itself
    served = not rounds[0]["embed"]["tokens"]
    return found | ({} if served else {"ratio_of_cpu": spread([bare["cpu_s"] / own["cpu_s"] for own, bare in pairs])})


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="one a line (default: assets/texts.txt)")
    parser.add_argument("--rows", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--url", help="HOST:PORT of a server's gRPC, for embed.py to ask")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.rows < 1 or args.rounds < 1:
        parser.error("--rows, --rounds: expected at least 1")
    return args


def main():
    args = parse_args()
    card, cores = read_card(args.repository), len(os.sched_getaffinity(0))
    texts = list(vary(read_texts(args.texts), args.rows))
    WORK.mkdir(parents=True, exist_ok=True)
    source = WORK / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    bare = open_bare(args.repository, make_feeds(args.repository, card, texts), cores)
    rounds = measure(bare, args, source, args.rows)
    rows = {name: compare(rounds, name, args.rows) for name in bare}
    path = results_folder(args.results, card) / ("embed_server.json" if args.url else "embed.json")
    record = {"model": card, "environment": environment_record(), "texts": args.texts.name, "rows": args.rows}
    write_json(path, record | {"bare": rows, "rounds": rounds})
    for name, row in rows.items():
        shares = ", ".join(f"{row[key]['median']:.2f} {title}" for key, title in TITLES.items() if key in row)
        print(f"{name:24}{row['texts_per_s']['median']:8.1f} texts/s; embed.py ÷ it: {shares}")
    print(path)


TITLES = {"ratio": "computing", "ratio_with_start": "with Ray's start", "ratio_of_cpu": "in processor time"}


if __name__ == "__main__":
    main()
