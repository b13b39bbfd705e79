#!/usr/bin/env python3
"""Measure what each precision does to the last hidden state, and to the similarity of sentences.

Reads:  model_repository/model_ONNX and model_TRT_*/1/model.onnx, record and tokenizer of the export, with --sts a CSV
        of two sentences and a score a line, as the STS benchmark has.
Writes: results/<model>/<machine>/sts.json.
Run:    ./sts.py --sts stsb_dev.csv
Prints: one line per graph: cosine of the last hidden state, Spearman correlation.

The graphs are executed here, without a server: served ones return EMBEDDING alone, whose
few outputs a token say less than the encoder's hidden state. A sentence's vector is the
mean of its real tokens' hidden states, as Sentence-BERT does (Reimers and Gurevych 2019).
"""

import math
from pathlib import Path

import numpy as np
import onnx
from tqdm import tqdm

from core.arguments import make_parser
from core.files import REPOSITORY, RESULTS, TEXTS, read_texts, sha256, split_texts, spread, write_json
from core.labelled import read_rows
from core.metrics import deviations
from core.onnx_runtime import open_session
from core.record import environment_record, results_folder
from core.repository import check_made_from, graph_path, present, read_card, read_graph, tokenizer_path
from core.tables import ATTENTION_MASK, MAX_BATCH_SIZE, REFERENCE
from core.tokens import encode, load_tokenizer
from precision.int8_graph import last_hidden_state
from tasks.table import TASKS

MIN_PAIRS = 3  # fewer have no rank correlation


def read_pairs(path):
    """[(sentence, sentence, score)] of a CSV; exits on a line that has another form."""
    pairs = []
    for number, (_, row) in enumerate(read_rows(path, "a CSV file of sentence pairs"), 1):
        try:
            first, second, score = row
            pairs.append((first, second, float(score)))
        except ValueError:
            if number == 1:  # a header
                continue
            raise SystemExit(
                f"{path}: expected two sentences and a score in row {number}, found {row}; quote commas"
            ) from None
    if len(pairs) < MIN_PAIRS or not all(math.isfinite(score) for *_, score in pairs):
        raise SystemExit(
            f"{path}: expected at least {MIN_PAIRS} pairs with finite scores, found {len(pairs)}; add some"
        )
    return pairs


def open_hidden_state(path, name, reference_sha256):
    """Session of a graph that returns the last hidden state as well; exits on a graph of another export."""
    model = read_graph(path)
    check_made_from(model, path, reference_sha256)
    if not any(name in node.output for node in model.graph.node):
        raise SystemExit(f"{path}: expected the tensor {name} of the reference, found none; run quantize.py")
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    return open_session(model)


def encode_batches(tokenizer, texts, inputs):
    """[{input: int64 [batch, length]}], as the server has them."""
    return [encode(tokenizer, texts[i : i + MAX_BATCH_SIZE], inputs) for i in range(0, len(texts), MAX_BATCH_SIZE)]


def hidden_states(session, name, batches):
    """Hidden states of each batch, float32 [batch, length, hidden]."""
    for batch in tqdm(batches, desc="hidden states", unit="batch", mininterval=1, leave=False):
        yield session.run([name], batch)[0].astype(np.float32)


def compare_states(expected, session, name, batches):
    """Cosine and relative L2 error of the hidden state, averages over texts, real tokens only."""
    rows = []
    for reference, found, batch in zip(expected, hidden_states(session, name, batches), batches, strict=True):
        mask = batch[ATTENTION_MASK]
        rows += [deviations(reference[i : i + 1], found[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
    return {key: float(np.mean([row[key] for row in rows])) for key in ("mean_cosine", "relative_l2_error")}


def sentence_vectors(session, name, batches):
    """Mean of the real tokens' hidden states, at norm 1: float32 [texts, hidden]. Raises ValueError on NaN or Inf."""
    vectors = []
    for found, batch in zip(hidden_states(session, name, batches), batches, strict=True):
        mask = batch[ATTENTION_MASK][:, :, None]
        # padding may hold anything, and 0 · NaN is NaN
        means = np.where(mask, found, 0).sum(axis=1) / mask.sum(axis=1)
        broken = int((~np.isfinite(means)).any(axis=1).sum())
        if broken:
            raise ValueError(f"NaN or Inf in {broken} of {len(means)} sentences")
        vectors.append(means / np.linalg.norm(means, axis=1, keepdims=True))
    return np.concatenate(vectors)


def correlate(session, name, batches, scores):
    """Spearman correlation of the pairs' cosine similarities with their scores; None if it is not defined."""
    from scipy.stats import spearmanr  # here, because it takes a second

    vectors = sentence_vectors(session, name, batches)
    similarities = (vectors[: len(scores)] * vectors[len(scores) :]).sum(axis=1)
    found = float(spearmanr(similarities, scores).statistic)
    return found if math.isfinite(found) else None


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--sts", type=Path, help="CSV (else by tabs): sentence, sentence, score; without it hidden states alone"
    )
    parser.add_argument("--max-texts", type=int, help="use this many texts, and pairs, evenly spread")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.max_texts is not None and args.max_texts < MIN_PAIRS:
        parser.error(f"--max-texts: expected at least {MIN_PAIRS}")
    return args


def measure_graphs(repository, name, reference_sha256, batches, sentences, scores):
    """{key: {"mean_cosine", "relative_l2_error", "spearman"}} of each graph that is there, the reference first."""
    expected, plans = None, {}
    for key in present(repository):
        path = graph_path(repository, key)
        if plans and sha256(path) == reference_sha256:  # FP32 is the reference's own file
            plans[key] = plans[REFERENCE]
            continue
        session = open_hidden_state(path, name, reference_sha256)
        try:
            if expected is None:
                expected = list(hidden_states(session, name, batches))
            plans[key] = compare_states(expected, session, name, batches)
            plans[key]["spearman"] = correlate(session, name, sentences, scores) if scores else None
        except ValueError as error:
            raise SystemExit(f"{path}: expected finite hidden states, found: {error}; run quantize.py") from None
        correlation = "" if plans[key]["spearman"] is None else f", Spearman {plans[key]['spearman']:.4f}"
        print(f"{key:9} hidden state: cosine {plans[key]['mean_cosine']:.6f}{correlation}", flush=True)
    return plans


def main():
    args = parse_args()
    card = read_card(args.repository)
    if not TASKS[card["task"]].per_token:
        raise SystemExit(f"{args.repository}: expected a task with hidden states per token, found {card['task']}")
    pairs = spread(read_pairs(args.sts), args.max_texts) if args.sts else []
    texts = spread(split_texts(read_texts(TEXTS))[1], args.max_texts)
    tokenizer = load_tokenizer(tokenizer_path(args.repository))
    batches = encode_batches(tokenizer, texts, card["inputs"])
    sentences = encode_batches(tokenizer, [p[0] for p in pairs] + [p[1] for p in pairs], card["inputs"])
    reference_path = graph_path(args.repository, REFERENCE)
    name = last_hidden_state(read_graph(reference_path))
    scores = [p[2] for p in pairs]
    plans = measure_graphs(args.repository, name, sha256(reference_path), batches, sentences, scores)
    record = {"model": card, "environment": environment_record(), "hidden_state": name, "texts": len(texts)}
    record["pairs"] = {"file": args.sts.name, "sha256": sha256(args.sts), "count": len(pairs)} if pairs else None
    path = results_folder(args.results, card) / "sts.json"
    write_json(path, record | {"plans": plans})
    print(path)


if __name__ == "__main__":
    main()
