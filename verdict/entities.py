#!/usr/bin/env python3
"""Show whether each precision of an entity service finds the entities that FP32 finds.

Reads:  --repository: a service of token classification, with the graphs that quantize.py made; --texts, one a line.
Writes: results/<model>/<machine>/entities.json.
Run:    python -m verdict.entities --repository build/entities --texts texts.txt
Prints: a line per graph: precision, recall and F1 of its entities against those of FP32.

An entity is found if its label and both ends are the same. No labels are needed, and no server: graphs are executed here.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.arguments import make_parser
from core.files import RESULTS, read_texts, sha256, write_json
from core.onnx_runtime import open_session
from core.record import environment_record, results_folder
from core.repository import EXPORT, graph_path, present, read_card, tokenizer_path
from core.tables import LOGITS, REFERENCE, SPANS, TEXT, WORDS
from core.tokens import encode, load_tokenizer
from serving.models.answers import token_classification

BATCH = 8
TASK = "token-classification"


def find_entities(path, batches, settings):
    """Counter of (number of the text, label, start, end) that a graph finds."""
    session, found, number = open_session(path), Counter(), 0
    inputs = [tensor.name for tensor in session.get_inputs()]
    for texts, encoded in tqdm(batches, desc=path.parts[-3], unit="batch", mininterval=1, leave=False):
        (logits,) = session.run([LOGITS], {name: encoded[name] for name in inputs})
        tensors = encoded | {LOGITS: logits, TEXT: np.array([[text.encode()] for text in texts], dtype=object)}
        for (answer,) in token_classification.answer(tensors, settings, {})["ENTITIES"]:
            found.update((number, e["label"], e["start"], e["end"]) for e in json.loads(answer))
            number += 1
    return found


def agreement(expected, found):
    """{"entities", "precision", "recall", "f1"} of found entities against the expected ones."""
    same = (expected & found).total()
    row = {"entities": found.total(), "precision": same / max(found.total(), 1), "recall": same / expected.total()}
    return row | {"f1": 2 * same / (expected.total() + found.total())}


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="one a line; none that calibrated")
    parser.add_argument("--f1", type=float, default=0.99, help="least of a precision that holds (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main():
    args = parse_args()
    card = read_card(args.repository)
    if card["task"] != TASK:
        raise SystemExit(f"{args.repository}: expected a service of {TASK}, found {card['task']}; name another")
    keys, reference = present(args.repository), graph_path(args.repository, REFERENCE)
    if REFERENCE not in keys:
        raise SystemExit(f"{reference}: expected the graph that the others are compared with, found none; {EXPORT}")
    texts, tokenizer = read_texts(args.texts, "--texts"), load_tokenizer(tokenizer_path(args.repository))
    parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    batches = [(part, encode(tokenizer, part, (*card["inputs"], SPANS, WORDS))) for part in parts]
    settings, plans = token_classification.settings_of(card, tokenizer), {}
    expected = find_entities(reference, batches, settings)
    if not expected:
        raise SystemExit(f"{args.texts}: expected texts with entities, found none; give other texts")
    for key in keys:
        found = expected if key == REFERENCE else find_entities(graph_path(args.repository, key), batches, settings)
        row = plans[key] = agreement(expected, found)
        row["holds"] = row["f1"] >= args.f1
        print(
            f"{key:9} {row['entities']} entities, precision {row['precision']:.4f}, recall {row['recall']:.4f}, F1 {row['f1']:.4f}"
        )
    record = {"model": card, "environment": environment_record(), "plans": plans}
    record["texts"] = {"file": args.texts.name, "sha256": sha256(args.texts), "count": len(texts)}
    path = results_folder(args.results, card) / "entities.json"
    write_json(path, record)
    print(path)


if __name__ == "__main__":
    main()
