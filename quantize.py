#!/usr/bin/env python3
"""Make one typed ONNX graph per precision: the file that fixes what TensorRT computes.

Reads:  model_repository/model_ONNX/1/model.onnx, assets/tokenizer/, assets/texts.txt.
Writes: model_repository/model_TRT_{FP32,FP16,INT8,BEST}/1/model.onnx,
        results/<model>/sensitivity.json.
Run:    ./quantize.py
Prints: one line per graph: precision, size, share of the weight-MatMul FLOPs in INT8.

FP32 is the reference graph. FP16 is converted by ModelOpt AutoCast. INT8 has Q/DQ pairs
around weight MatMuls, rest FP32; BEST has the same pairs, rest FP16. Which MatMuls, their
ranges and smoothing are found by int8_search.py: the largest share that meets the target.
Three of four texts calibrate, the fourth selects; none of them measures quality later.
"""

import argparse
import contextlib
import hashlib
import io
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import numpy_helper

from classifier_repository import is_classifier, refresh
from classifier_tokens import encode
from common import (
    ASSETS,
    ATTENTION_MASK,
    EMBEDDERS,
    GATES,
    INPUT_IDS,
    LOGITS_GATE,
    PRECISIONS,
    REFERENCE,
    REPOSITORY,
    RESULTS,
    TEXTS,
    environment_record,
    read_json,
    read_texts,
    replace_when_done,
    sha256,
    split_texts,
    spread,
    write_json,
)
from int8_graph import drop_unused, flops_share, insert_int8, weight_matmuls
from int8_search import candidate_matmuls, find_recipes, measure, meets, naive_recipes, run_graph, search_int8
from repository import describe, graph_tensors, read_graph

MIN_TEXTS = 16  # four select, twelve calibrate
MIN_CALIBRATION_TOKENS = 256  # fewer do not show the outliers
SELECT_EVERY = 4


def load_modelopt():
    """ModelOpt's two converters to FP16; imported late because they take seconds."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # it tells every step and warns about packages that are not needed here
    from modelopt.onnx.autocast import convert_to_mixed_precision
    from modelopt.onnx.autocast.convert import convert_to_f16

    return convert_to_mixed_precision, convert_to_f16


# --- calibration data ----------------------------------------------------------------


def load_tokenizer(assets):
    """The exported tokenizer, which pads and truncates to the length of the graph."""
    path = assets / "tokenizer" / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise SystemExit(f"{path}: expected a tokenizer, found: {error}; run torch2onnx.py") from None


def load_texts(args, inputs):
    """({name of the part: encoded texts}, facts for the record); exits if there is too little text."""
    file = args.calibration_texts or TEXTS
    texts = read_texts(file) if args.calibration_texts else split_texts(read_texts(file))[0]
    if len(texts) < MIN_TEXTS:
        raise SystemExit(
            f"--calibration-texts: expected at least {MIN_TEXTS} texts, found {len(texts)} in {file}; give more text"
        )
    tokenizer = load_tokenizer(args.assets)
    cut = sum(bool(e.overflowing) for e in tokenizer.encode_batch(texts))
    if cut == len(texts):
        print(f"WARNING: all {cut} calibration texts are longer than the length; their ends were cut", file=sys.stderr)
    select = texts[SELECT_EVERY - 1 :: SELECT_EVERY]
    parts = {
        "calibration": encode(tokenizer, [t for i, t in enumerate(texts) if (i + 1) % SELECT_EVERY], inputs),
        "held_out": encode(tokenizer, select, inputs),  # smoothing and ranges are compared on them
        "selection": encode(tokenizer, spread(select, args.max_selection_texts), inputs),
    }
    tokens = int(parts["calibration"][ATTENTION_MASK].sum())
    if tokens < MIN_CALIBRATION_TOKENS:
        raise SystemExit(
            f"--calibration-texts: expected at least {MIN_CALIBRATION_TOKENS} tokens, found {tokens}; give more text"
        )
    digest = hashlib.sha256(parts["calibration"][INPUT_IDS].tobytes() + parts["selection"][INPUT_IDS].tobytes())
    facts = {"file": file.name, "sha256": digest.hexdigest(), "cut_at_length": cut, "calibration_tokens": tokens}
    return parts, facts | {part: len(encoded[INPUT_IDS]) for part, encoded in parts.items()}


# --- the check of Q/DQ ---------------------------------------------------------------


def quantized_matmuls(graph):
    """Names of MatMul and Gemm nodes whose both operands come from DequantizeLinear."""
    producer = {output: node for node in graph.graph.node for output in node.output}

    def dequantized(name):
        node = producer.get(name)
        while node is not None and node.op_type in ("Transpose", "Cast"):
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    nodes = (n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm"))
    return {n.name for n in nodes if dequantized(n.input[0]) and dequantized(n.input[1])}


def check_quantization(path, graph, asked):
    """Exit unless Q/DQ is what TensorRT takes: signed, symmetric, and on the MatMuls asked for."""
    constants = {i.name: i for i in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = constants.get(node.input[2])
            if zero is None or zero.data_type != onnx.TensorProto.INT8 or numpy_helper.to_array(zero).any():
                raise SystemExit(
                    f"{path}: expected signed INT8 with zero point 0 at {node.name}, found another; TensorRT refuses it"
                )
    found = quantized_matmuls(graph)
    if found != set(asked):
        other = sorted(found ^ set(asked))[0]
        raise SystemExit(
            f"{path}: expected INT8 on the MatMuls asked for, found another choice at {other}; report it with the model's name"
        )


# --- the search ----------------------------------------------------------------------


def find_int8(args, reference, parts, facts):
    """(recipes, names of the MatMuls in INT8); writes sensitivity.json; exits if the target is missed."""
    started = time.monotonic()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    target = dict(LOGITS_GATE if args.classifier else GATES["INT8"])
    if args.target_cosine is not None:
        target["mean_cosine"] = args.target_cosine
    recipes = find_recipes(reference, parts["calibration"], parts["held_out"], args.seed)
    deadline = started + 60 * args.max_minutes
    chosen, found = search_int8(
        reference, recipes, parts["selection"], target, args.min_int8_share, deadline, args.quick
    )
    shapes = weight_matmuls(reference)
    record = {
        "model": card,
        "environment": environment_record(),
        "texts": facts,
        "seed": args.seed,
        "target": target | {"int8_flops_share": args.min_int8_share},
        "reached": None,
        "int8_flops_share": flops_share(chosen, shapes) if chosen else None,
    }
    if chosen:
        expected = run_graph(reference, parts["selection"])
        graphs = {p: convert(p, reference, recipes, chosen) for p in ("INT8", "BEST")}
        record["reached"] = {p: measure(graph, expected, parts["selection"]) for p, graph in graphs.items()}
    record |= {"seconds": round(time.monotonic() - started, 1), "peak_memory_mib": peak_memory_mib()}
    path = args.results / card["slug"] / "sensitivity.json"
    write_json(path, record | found)
    print(path)
    if not chosen or not all(meets(row, target) for row in record["reached"].values()):
        raise SystemExit(missed_target(args, target, record["reached"], found))
    return recipes, chosen


def missed_target(args, target, reached, found):
    """What was reached, in one line, where it is less than the target."""
    rows = [p for p in found["curve"] if p["mean_cosine"] is not None]
    large = [p for p in rows if p["int8_flops_share"] >= args.min_int8_share] or rows
    best = max(large, key=lambda p: p["mean_cosine"], default=None)
    said = "no finite EMBEDDING"
    if best:
        said = (
            f"at best {best['mean_cosine']:.4f} and {best['relative_l2_error']:.3f} with {best['int8_flops_share']:.0%}"
        )
    if reached:
        said = "; ".join(f"{p} {r['mean_cosine']} and {r['relative_l2_error']}" for p, r in reached.items())
    return (
        f"--target-cosine: expected mean cosine {target['mean_cosine']:g} and relative L2 error {target['relative_l2_error']:g} "
        f"with at least {args.min_int8_share:.0%} of the FLOPs in INT8, found {said}"
        f"{' in ' + format(args.max_minutes, 'g') + ' minutes' if found['time_was_over'] else ''}; "
        "INT8 and BEST are left as they were; lower the target or the share, or give more minutes or texts"
    )


def peak_memory_mib():
    """The most memory this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# --- the four graphs -----------------------------------------------------------------


def convert(precision, reference, recipes, chosen):
    """Reference graph -> typed ModelProto of INT8 or BEST."""
    graph = insert_int8(reference, recipes, chosen)
    if precision == "INT8":
        return graph
    _, convert_to_f16 = load_modelopt()
    with contextlib.redirect_stdout(io.StringIO()):
        return drop_unused(convert_to_f16(graph, keep_io_types=True))  # EMBEDDING stays float32


def convert_fp16(reference, calibration):
    """Reference graph path -> typed ModelProto in FP16, but for what leaves its range on real texts."""
    convert_to_mixed_precision, _ = load_modelopt()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source = Path(folder) / "model.onnx"  # ModelOpt writes beside its input
        shutil.copyfile(reference, source)
        np.savez(Path(folder) / "calibration.npz", **{k: v[:8] for k, v in calibration.items()})
        return convert_to_mixed_precision(
            str(source),
            low_precision_type="fp16",
            keep_io_types=True,  # EMBEDDING stays float32
            calibration_data=str(Path(folder) / "calibration.npz"),
        )


def write_graph(graph, path, reference, properties):
    """Check the typed graph, note where it comes from, and move it into place."""
    if graph_tensors(graph) != graph_tensors(reference):
        raise SystemExit(
            f"{path}: expected the reference's tensors, {describe(graph_tensors(reference))}; found {describe(graph_tensors(graph))}"
        )
    onnx.helper.set_model_props(graph, properties)
    with replace_when_done(path) as temporary:
        onnx.save(graph, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)


def link_reference(reference, path):
    """FP32 is the reference graph itself: a hard link, or a copy where there are none."""
    with replace_when_done(path) as temporary:
        try:
            os.link(reference, temporary)
        except OSError:
            shutil.copyfile(reference, temporary)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calibration-texts",
        type=Path,
        help="one text a line; default: every second line of assets/texts.txt, the others measure quality",
    )
    parser.add_argument(
        "--target-cosine",
        type=float,
        help="least mean cosine of INT8 and BEST, on the texts that select "
        f"(default: {GATES['INT8']['mean_cosine']}; of a classifier's logits {LOGITS_GATE['mean_cosine']})",
    )
    parser.add_argument(
        "--min-int8-share", type=float, default=0.9, help="least share of the FLOPs in INT8 (default: %(default)s)"
    )
    parser.add_argument("--max-minutes", type=float, default=30, help="for the search (default: %(default)s)")
    parser.add_argument("--max-selection-texts", type=int, default=32, help="fewer are quicker (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="select on 8 texts; no sensitivity where all in INT8 meet the target"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tokens where there are many texts")
    parser.add_argument(
        "--naive", action="store_true", help="no search: all MatMuls, largest values as ranges; for comparison"
    )
    parser.add_argument("--only", choices=PRECISIONS, help="make one graph")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, help="default: assets/; a classifier's repository is its own")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.classifier = is_classifier(args.repository)
    args.assets = args.assets or (args.repository if args.classifier else ASSETS)
    if args.quick:
        args.max_selection_texts = 8
    for name in ("target_cosine", "min_int8_share"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            parser.error(f"--{name.replace('_', '-')}: expected above 0 and at most 1")
    if args.max_minutes < 0 or args.max_selection_texts < 1 or args.seed < 0:
        parser.error("--max-minutes and --seed: expected 0 or more; --max-selection-texts: at least 1")
    return args


def main():
    args = parse_args()
    reference_path = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    reference = read_graph(reference_path)
    parts, facts = load_texts(args, [i.name for i in reference.graph.input])
    shapes = weight_matmuls(reference)
    recipes, chosen = {}, set()
    print(f"calibration: {facts['calibration_tokens']} tokens of {facts['calibration']} texts", file=sys.stderr)
    for precision in [args.only] if args.only else PRECISIONS:
        path = args.repository / EMBEDDERS[f"TRT_{precision}"] / "1" / "model.onnx"
        if precision == "FP32":
            link_reference(reference_path, path)
        elif precision == "FP16":
            graph = convert_fp16(reference_path, parts["calibration"])
        else:
            if args.naive:
                recipes = naive_recipes(reference, parts["calibration"], args.seed)
                chosen = candidate_matmuls(reference, recipes)
            elif not chosen:
                recipes, chosen = find_int8(args, reference, parts, facts)
            graph = convert(precision, reference, recipes, set(chosen))
            check_quantization(path, graph, chosen)
        share = flops_share(chosen, shapes) if precision in ("INT8", "BEST") else 0.0
        if precision != "FP32":
            properties = {
                "calibration_sha256": facts["sha256"],
                "reference_sha256": sha256(reference_path),
                "precision": precision,
                "int8_flops_share": f"{share:.4f}",
            }
            write_graph(graph, path, reference, properties)
        print(
            f"{precision:4} {path.stat().st_size / 1e6:7.1f} MB, {share:4.0%} of the weight-MatMul FLOPs in INT8, {path}",
            flush=True,
        )
    if args.classifier:
        refresh(args.repository)


if __name__ == "__main__":
    main()
