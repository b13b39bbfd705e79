"""What each way of keeping INT8 close brings: one added after another, with all weight MatMuls in INT8.

The last row adds attention's own products, as quantize.py --attention does, and shows what they cost.

Reads:  --repository: graph, record and tokenizer of an export; the texts that calibrate, and those that measure.
Writes: results/<model>/<machine>/ablation.json.
Run:    python -m precision.ablation --repository build/NAME
Prints: one line per row of the table: share in INT8, mean cosine, relative L2 error.
"""

import sys
from pathlib import Path

from core.arguments import make_parser
from core.files import REPOSITORY, RESULTS, TEXTS, evaluation_texts, spread, write_json
from core.record import environment_record, results_folder
from core.repository import graph_path, read_card, read_graph, tokenizer_path, weight_matmuls
from core.tables import REFERENCE
from core.tokens import encode, load_tokenizer
from precision.calibration import load_texts, read_calibration_texts, text_key
from precision.int8_attention import product_share
from precision.int8_graph import flops_share, outlier_counts
from precision.int8_recipes import WAYS, candidate_matmuls, find_recipes, naive_recipes
from precision.int8_search import measure, run_graph
from precision.makers import Learnt, insert_int8, learn_products
from tasks.examples import examples
from tasks.table import TASKS

SELECTION_TEXTS = 32
ADDED = {
    "second_order": "second-order rounding",
    "outliers": "outlier channels in floating point",
}
ROWS = {"largest values as ranges": None, "smoothing, ranges by error, bias correction": ()} | {
    f"+ {ADDED[way]}": WAYS[: i + 1] for i, way in enumerate(WAYS)
}
PRODUCTS = "+ attention's products in INT8"  # the row after them: an option, with its price


def measuring_texts(args):
    """Texts that neither calibrate nor select."""
    texts = evaluation_texts(args.texts)
    used, _ = read_calibration_texts(args.calibration_texts)  # none of them is one of the default
    both = {text_key(text) for text in texts} & {text_key(text) for text in used}
    if both:
        raise SystemExit(
            f"{args.texts}: expected texts that do not calibrate, found {len(both)} that do; leave them out"
        )
    return spread(texts, args.max_texts)


def make_graphs(reference, parts, seed):
    """Yield (title, share of the weight-MatMul FLOPs in INT8, graph) of ROWS and PRODUCTS."""
    for title, ways in ROWS.items():
        if ways is None:
            recipes = naive_recipes(reference, parts["calibration"], seed)
        else:
            recipes = find_recipes(reference, parts["calibration"], parts["held_out"], seed, ways=ways)
        names = candidate_matmuls(reference, recipes)
        share = flops_share(names, weight_matmuls(reference), outlier_counts(recipes))
        learnt = Learnt(recipes=recipes, chosen=set(names))
        yield title, share, insert_int8(reference, learnt)
    yield PRODUCTS, share, insert_int8(reference, learn_products(reference, learnt, parts))


def measure_rows(reference, parts, seed, encoded, task):
    """[{"ways", "int8_flops_share", "mean_cosine", "relative_l2_error"}], each printed when done.

    The last one has {"products_flops_share"} too: that of attention's products in all MatMuls.
    """
    expected, rows = run_graph(reference, encoded, task), []
    for title, share, graph in make_graphs(reference, parts, seed):
        row = {"ways": title, "int8_flops_share": share} | measure(graph, expected, encoded, task)
        rows.append(row)
        quality = "not finite"
        if row["mean_cosine"] is not None:
            quality = f"cosine {row['mean_cosine']:.5f}, relative L2 {row['relative_l2_error']:.2%}"
        print(f"{title:50} {row['int8_flops_share']:6.1%} in INT8, {quality}", flush=True)
    rows[-1]["products_flops_share"] = product_share(reference, encoded)
    return rows


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--calibration-texts", type=Path, help="as of quantize.py")
    parser.add_argument(
        "--texts", type=Path, help="that measure, one a line (default: the half that may not calibrate)"
    )
    parser.add_argument("--max-texts", type=int, help="measure with this many, evenly spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.max_texts is not None and args.max_texts < 1:
        parser.error("--max-texts: expected at least 1")
    if args.seed < 0:
        parser.error("--seed: expected 0 or more")
    return args


def main():
    args = parse_args()
    card = read_card(args.repository)
    if card["task"] not in TASKS:
        raise SystemExit(f"{args.repository}: expected a task with INT8, found {card['task']}; it has FP16 alone")
    reference, tokenizer = (
        read_graph(graph_path(args.repository, REFERENCE)),
        load_tokenizer(tokenizer_path(args.repository)),
    )
    parts, facts = load_texts(args.calibration_texts, tokenizer, card, SELECTION_TEXTS)
    texts = measuring_texts(args)
    encoded = encode(tokenizer, examples(card, texts), card["inputs"])
    rows = measure_rows(reference, parts, args.seed, encoded, TASKS[card["task"]])
    record = {"model": card, "environment": environment_record(), "texts": facts, "seed": args.seed, "rows": rows}
    record["measured"] = {"file": (args.texts or TEXTS).name, "texts": len(texts)}
    path = results_folder(args.results, card) / "ablation.json"
    write_json(path, record)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
