#!/usr/bin/env python3
"""Measure what each precision does to the last hidden state, and to the similarity of sentences.

Reads:  model_repository/model_ONNX and model_TRT_*/1/model.onnx, assets/, with --sts a CSV of
        two sentences and a score a line, as the STS benchmark has.
Writes: results/<model>/sts.json.
Run:    ./sts.py --sts stsb_dev.csv
Prints: one line per graph: cosine of the last hidden state, Spearman correlation.

The graphs are executed here, without a server: served ones return EMBEDDING alone, whose
few outputs a token say less than the encoder's hidden state. A sentence's vector is the
mean of its real tokens' hidden states, as Sentence-BERT does (Reimers and Gurevych 2019).
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from scipy.stats import spearmanr
from tqdm import tqdm

from core.files import (
    ASSETS,
    REPOSITORY,
    RESULTS,
    TEXTS,
    read_json,
    read_texts,
    sha256,
    split_texts,
    spread,
    write_json,
)
from core.metrics import deviations
from core.onnx_runtime import open_session
from core.record import environment_record
from core.tables import ATTENTION_MASK, EMBEDDERS, INPUT_IDS, MAX_BATCH_SIZE, REFERENCE
from precision.int8_graph import last_hidden_state
from serving.repository import check_made_from, read_graph

MIN_PAIRS = 3  # fewer have no rank correlation


def read_pairs(path):
    """[(sentence, sentence, score)] of a CSV; exits on a line that has another form."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise SystemExit(f"{path}: expected a CSV file, found {error.strerror}; name one with --sts") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: expected UTF-8, found {error}; convert the file") from None
    pairs = []
    for number, row in enumerate(rows, 1):
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


def open_hidden_state(path, name, reference_path, reference_sha256):
    """Session of a graph that returns the last hidden state as well; exits on a graph of another export."""
    model = read_graph(path)
    check_made_from(model, path, reference_path, reference_sha256)
    if not any(name in node.output for node in model.graph.node):
        raise SystemExit(f"{path}: expected the tensor {name} of the reference, found none; run quantize.py")
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    return open_session(model)


def encode_texts(assets, texts):
    """[{INPUT_IDS, ATTENTION_MASK}] in batches: int64 [batch, length], as a served text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(assets / "tokenizer" / "tokenizer.json"))
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([e.ids for e in encodings], dtype=np.int64)
    mask = np.array([e.attention_mask for e in encodings], dtype=np.int64)
    starts = range(0, len(texts), MAX_BATCH_SIZE)
    return [{INPUT_IDS: ids[s : s + MAX_BATCH_SIZE], ATTENTION_MASK: mask[s : s + MAX_BATCH_SIZE]} for s in starts]


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
    vectors = sentence_vectors(session, name, batches)
    similarities = (vectors[: len(scores)] * vectors[len(scores) :]).sum(axis=1)
    found = float(spearmanr(similarities, scores).statistic)
    return found if math.isfinite(found) else None


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sts", type=Path, help="CSV: sentence, sentence, score; without it hidden states alone")
    parser.add_argument("--max-texts", type=int, help="use this many texts, and pairs, evenly spread")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.max_texts is not None and args.max_texts < MIN_PAIRS:
        parser.error(f"--max-texts: expected at least {MIN_PAIRS}")
    return args


def main():
    args = parse_args()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    pairs = spread(read_pairs(args.sts), args.max_texts) if args.sts else []
    texts = spread(split_texts(read_texts(TEXTS))[1], args.max_texts)
    batches = encode_texts(args.assets, texts)
    sentences = encode_texts(args.assets, [p[0] for p in pairs] + [p[1] for p in pairs]) if pairs else []
    paths = {suffix: args.repository / model / "1" / "model.onnx" for suffix, model in EMBEDDERS.items()}
    name, reference_sha256 = last_hidden_state(read_graph(paths[REFERENCE])), sha256(paths[REFERENCE])
    expected, plans = None, {}
    for suffix, path in paths.items():
        session = open_hidden_state(path, name, paths[REFERENCE], reference_sha256)
        if expected is None:
            expected = list(hidden_states(session, name, batches))
        try:
            plans[suffix] = compare_states(expected, session, name, batches)
            plans[suffix]["spearman"] = correlate(session, name, sentences, [p[2] for p in pairs]) if pairs else None
        except ValueError as error:
            raise SystemExit(f"{path}: expected finite hidden states, found: {error}; run quantize.py") from None
        correlation = "" if plans[suffix]["spearman"] is None else f", Spearman {plans[suffix]['spearman']:.4f}"
        print(f"{suffix:9} hidden state: cosine {plans[suffix]['mean_cosine']:.6f}{correlation}", flush=True)
    record = {
        "model": card,
        "environment": environment_record(),
        "hidden_state": name,
        "texts": len(texts),
        "pairs": {"file": args.sts.name, "sha256": sha256(args.sts), "count": len(pairs)} if pairs else None,
        "plans": plans,
    }
    path = args.results / card["slug"] / "sts.json"
    write_json(path, record)
    print(path)


if __name__ == "__main__":
    main()
