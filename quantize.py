#!/usr/bin/env python3
"""Make one typed ONNX graph per precision: the file that fixes what TensorRT computes.

Reads:  model_repository/model_ONNX/1/model.onnx, the record and the tokenizer of its export, assets/texts.txt.
Writes: model_repository/model_TRT_{FP32,FP16,INT8,BEST}/1/model.onnx, of a service also model_TRT_INT8/1/packed.onnx,
        results/<model>/<machine>/sensitivity.json. With --precisions BF16 FP8: model_TRT_{BF16,FP8}/1/model.onnx,
        sensitivity_fp8.json, and precisions.json: every precision on texts that chose nothing.
Run:    ./quantize.py
Prints: one line per graph: precision, size, share of the weight-MatMul FLOPs in INT8.

FP32 is the reference graph. FP16 is converted by ModelOpt AutoCast. INT8 has Q/DQ pairs around weight MatMuls, rest
FP32: it shows the arithmetic. BEST has the same pairs, rest FP16: it is the one to deploy. Which MatMuls, their ranges
and smoothing are searched for: the largest share that meets the target. Three of four texts calibrate, the fourth
selects; none of them measures quality later.
"""

import contextlib
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import onnx

from core.arguments import make_parser
from core.files import REPOSITORY, RESULTS, TEXTS, read_texts, replace_when_done, sha256, write_json
from core.record import environment_record, results_folder
from core.repository import graph_path, graph_tensors, is_own, read_card, read_graph, tokenizer_path, weight_matmuls
from core.tables import FURTHER, PACKED_FILE, REFERENCE, SERVED, model_key
from core.tokens import load_tokenizer
from precision.calibration import load_texts
from precision.further import describe_precisions, measure_precisions
from precision.int8_attention import attention_products
from precision.int8_check import check_quantization
from precision.int8_graph import flops_share, outlier_counts
from precision.int8_recipes import candidate_matmuls, find_recipes, naive_recipes, recipe_digest
from precision.int8_rounding import FP8, INT8
from precision.int8_search import SEARCHED, missed_target, search_int8
from precision.makers import Learnt, learn_products, make_graph
from precision.packed import make_packed
from serving.repository import write_repository
from tasks.table import GENERATION, TASKS

QUICK_TEXTS = 8

# --- the search ----------------------------------------------------------------------


def find_target(args, task):
    """What the search keeps: {"mean_cosine": least, "relative_l2_error": most}."""
    asked = {"mean_cosine": args.target_cosine, "relative_l2_error": args.target_l2}
    return task.target | {name: value for name, value in asked.items() if value is not None}


def find_int8(args, card, reference, parts, facts, precisions=SEARCHED):
    """(recipes, names of the MatMuls in INT8, path and content of sensitivity.json); exits if the target is missed.

    precisions: those of one search; ("FP8",) finds FP8 in the same way.
    """
    started = time.monotonic()
    task = TASKS[card["task"]]
    target = find_target(args, task)
    fp8 = precisions == ("FP8",)
    recipes = find_recipes(reference, parts["calibration"], parts["held_out"], args.seed, FP8 if fp8 else INT8)
    share, selection = args.min_int8_share, parts["selection"]
    attention = parts if args.attention and not fp8 else None
    # --quick, and FP8: where all in it meet the target, nothing more is measured
    for deadline in [0.0] * (args.quick or fp8) + [started + 60 * args.max_minutes]:
        chosen, found = search_int8(reference, recipes, selection, task, target, share, deadline, precisions, attention)
        found["time_was_over"] &= deadline > 0
        if chosen:
            break
    record = {"model": card, "environment": environment_record(), "texts": facts, "seed": args.seed}
    record |= {"target": target | {"int8_flops_share": share}, "attention": attention is not None}
    record |= {"seconds": round(time.monotonic() - started, 1), "peak_memory_mib": peak_memory_mib()}
    path = results_folder(args.results, card) / f"sensitivity{'_fp8' if fp8 else ''}.json"
    if not chosen:
        write_json(path, record | found)
        print(path)
        said = missed_target(found, target, share, args.max_minutes, precisions)
        raise SystemExit(said + ", or leave out --attention" * (attention is not None))
    return recipes, chosen, (path, record | found)


def peak_memory_mib():
    """The most memory this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def learn(args, card, reference, parts, facts):
    """(Learnt for INT8 and BEST, what their graphs say of it, path and content of sensitivity.json or None)."""
    record = None
    if args.naive:
        recipes = naive_recipes(reference, parts["calibration"], args.seed)
        chosen = set(candidate_matmuls(reference, recipes))
    else:
        recipes, chosen, record = find_int8(args, card, reference, parts, facts)
    learnt = Learnt(recipes=recipes, chosen=chosen)
    learnt = learn_products(reference, learnt, parts) if args.attention else learnt
    said = {} if args.naive else {"recipe_sha256": recipe_digest(recipes, chosen, learnt.products)}
    return learnt, said, record


# --- the graphs ----------------------------------------------------------------------


def link_or_copy(source, temporary):
    """The same file twice: a hard link, or a copy where there are none."""
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)


def check_graph(path, precision, graph, reference, learnt):
    """Exit unless a graph has the reference's inputs and outputs, and Q/DQ as TensorRT takes it."""
    if graph_tensors(graph) != graph_tensors(reference):
        raise SystemExit(
            f"{path}: expected the reference's tensors, {graph_tensors(reference)}; found {graph_tensors(graph)}; "
            "report it with the model's name"
        )
    if learnt.chosen and precision in (*SEARCHED, "FP8"):
        kind = onnx.TensorProto.FLOAT8E4M3FN if precision == "FP8" else onnx.TensorProto.INT8
        products = [node.name for nodes in attention_products(reference) for node in nodes if learnt.products]
        check_quantization(path, graph, learnt.chosen.union(products), kind)


def save_graph(graph, path):
    """Write a graph and check what was written."""
    onnx.save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)


def write_packed(path, graph, stack, properties):
    """The packed graph of INT8 beside the padded one, moved into place with it; without one an older one goes."""
    if not graph:
        path.unlink(missing_ok=True)
    else:
        onnx.helper.set_model_props(graph, properties | {"precision": "INT8"})
        save_graph(graph, stack.enter_context(replace_when_done(path)))


def write_graphs(paths, reference_path, reference, learnt, properties, record=None):
    """Make and check the graphs of some precisions, and move them into place together, or none of them.

    paths: {precision: path}; properties: {name: text} of where they come from; record: (path, content) of a JSON file
    that tells of them. One graph at a time is in memory.
    """
    share = flops_share(sorted(learnt.chosen), weight_matmuls(reference), outlier_counts(learnt.recipes))
    with contextlib.ExitStack() as stack:
        for precision, path in paths.items():
            graph = make_graph(precision, reference, learnt)
            check_graph(path, precision, graph, reference, learnt)
            temporary = stack.enter_context(replace_when_done(path))
            if graph is reference:
                link_or_copy(reference_path, temporary)
                continue
            onnx.helper.set_model_props(
                graph, properties | {"precision": precision, "int8_flops_share": f"{share:.4f}"}
            )
            save_graph(graph, temporary)
            if precision == "INT8":
                write_packed(path.with_name(PACKED_FILE), make_packed(reference_path, learnt), stack, properties)
        if record:
            write_json(stack.enter_context(replace_when_done(record[0])), record[1])
    if record:
        print(record[0])
    for precision, path in paths.items():
        kind = ("FP8" if precision == "FP8" else "INT8") + " with attention's products" * bool(learnt.products)
        size = f"{path.stat().st_size / 1e6:7.1f} MB"
        print(f"{precision:4} {size}, {share:4.0%} of the weight-MatMul FLOPs in {kind}, {path}", flush=True)


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--calibration-texts",
        type=Path,
        help="one text a line; default: every second line of assets/texts.txt, the others measure quality",
    )
    for option, key, what in (
        ("--target-cosine", "mean_cosine", "least mean cosine of INT8 and BEST, on the texts that select"),
        ("--target-l2", "relative_l2_error", "most relative L2 error of INT8 and BEST, on the same texts"),
    ):
        defaults = ", ".join(f"{name} {task.target[key]:g}" for name, task in TASKS.items())
        parser.add_argument(option, type=float, help=f"{what} (default: {defaults})")
    parser.add_argument(
        "--min-int8-share", type=float, default=0.9, help="least share of the FLOPs in INT8 (default: %(default)s)"
    )
    parser.add_argument("--max-minutes", type=float, default=30, help="for the search (default: %(default)s)")
    parser.add_argument("--max-selection-texts", type=int, default=32, help="fewer are quicker (default: %(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"select on {QUICK_TEXTS} texts; no sensitivity where all in INT8 meet the target",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tokens where there are many texts")
    parser.add_argument(
        "--naive", action="store_true", help="no search: all MatMuls, largest values as ranges; for comparison"
    )
    parser.add_argument(
        "--attention",
        action="store_true",
        help="attention's own products in INT8 too, in INT8 and BEST; precision.ablation shows what it costs",
    )
    parser.add_argument(
        *("--precisions", "--only"),
        dest="only",
        nargs="+",
        choices=(*SERVED, *FURTHER),
        default=SERVED,
        help=f"make these graphs (default: {' '.join(SERVED)}; further: {' '.join(FURTHER)}, for TensorRT)",
    )
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.max_selection_texts = QUICK_TEXTS
    if args.naive and "FP8" in args.only:
        parser.error("--naive: expected no FP8 among --precisions, which is always searched for; leave out one of them")
    if args.attention and not set(args.only) & set(SEARCHED):
        parser.error(f"--attention: expected {' or '.join(SEARCHED)} among --precisions, found {' '.join(args.only)}")
    for name in ("target_cosine", "min_int8_share"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            parser.error(f"--{name.replace('_', '-')}: expected above 0 and at most 1")
    if args.target_l2 is not None and not 0 < args.target_l2 < float("inf"):
        parser.error("--target-l2: expected above 0 and finite")
    if args.max_minutes < 0 or args.max_selection_texts < 1 or args.seed < 0:
        parser.error("--max-minutes and --seed: expected 0 or more; --max-selection-texts: at least 1")
    return args


def print_fp16(args, card):
    """FP16 of a service that generates: it has no other typed graphs."""
    from precision.generation import write_fp16  # here: only such a repository needs it

    if "FP16" not in args.only:
        raise SystemExit(f"--only: expected FP16 for --task {card['task']}, found {' '.join(args.only)}; name FP16")
    texts = read_texts(args.calibration_texts or TEXTS, "--calibration-texts")
    for path in write_fp16(args.repository, card, texts):
        print(f"FP16 {path.stat().st_size / 1e6:7.1f} MB, {path}")
    write_repository(args.repository)


def main():
    args = parse_args()
    card = read_card(args.repository)
    if card["task"] in GENERATION:
        print_fp16(args, card)
        return
    reference_path = graph_path(args.repository, REFERENCE)
    reference = read_graph(reference_path)
    tokenizer = load_tokenizer(tokenizer_path(args.repository))
    parts, facts = load_texts(args.calibration_texts, tokenizer, card, args.max_selection_texts)
    properties = {"calibration_sha256": facts["sha256"], "reference_sha256": sha256(reference_path)}
    print(f"calibration: {facts['calibration_tokens']} tokens of {facts['calibration']} texts", file=sys.stderr)
    paths = {p: graph_path(args.repository, model_key(p)) for p in (*SERVED, *FURTHER) if p in args.only}
    fp8 = {p: paths.pop(p) for p in ("FP8",) if p in paths}
    further = any(p in args.only for p in FURTHER)
    try:
        for precision in [p for p in paths if p not in SEARCHED]:
            path = {precision: paths.pop(precision)}
            write_graphs(path, reference_path, reference, Learnt(parts["calibration"]), properties)
        if paths:
            learnt, said, record = learn(args, card, reference, parts, facts)
            write_graphs(paths, reference_path, reference, learnt, properties | said, record)
        if fp8:
            recipes, chosen, record = find_int8(args, card, reference, parts, facts, ("FP8",))
            learnt = Learnt(recipes=recipes, chosen=chosen)
            write_graphs(fp8, reference_path, reference, learnt, properties, record)
    finally:  # also where a search ends with a missed target: the graphs made before it are there
        if further or not is_own(args.repository):  # the configs name the graphs that are there
            write_repository(args.repository)
    if further:
        print(*describe_precisions(path := measure_precisions(args.repository, card, args.results)), path, sep="\n")


if __name__ == "__main__":
    main()
