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

from core.files import (
    ASSETS,
    REPOSITORY,
    RESULTS,
    TEXTS,
    read_json,
    read_texts,
    replace_when_done,
    sha256,
    split_texts,
    spread,
    write_json,
)
from core.record import environment_record
from core.tables import ATTENTION_MASK, EMBEDDERS, INPUT_IDS, PRECISIONS, REFERENCE, SERVED
from core.tokens import encode
from precision.int8_check import check_quantization
from precision.int8_graph import drop_unused, flops_share, insert_int8, weight_matmuls
from precision.int8_search import INT8_PRECISIONS, candidate_matmuls, find_recipes, naive_recipes, search_int8
from serving.classifier_repository import is_classifier, refresh
from serving.repository import describe, graph_tensors, read_graph
from tasks.table import TASKS

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


def without_leaks(texts):
    """(texts once each and none that measures quality, {"duplicates", "quality_texts"} left out)."""

    def key(text):  # spaces and case make no other tokens
        return " ".join(text.split()).casefold()

    quality = {key(text) for text in split_texts(read_texts(TEXTS))[1]}
    once = {}
    for text in texts:
        once.setdefault(key(text), text)
    kept = [text for name, text in once.items() if name not in quality]
    return kept, {"duplicates": len(texts) - len(once), "quality_texts": len(once) - len(kept)}


def load_texts(args, inputs):
    """({name of the part: encoded texts}, facts for the record); exits if there is too little text."""
    file = args.calibration_texts or TEXTS
    texts = read_texts(file, "--calibration-texts")
    texts, left_out = without_leaks(texts if args.calibration_texts else split_texts(texts)[0])
    if left_out["quality_texts"]:
        print(
            f"WARNING: {left_out['quality_texts']} calibration texts measure quality too; they are left out",
            file=sys.stderr,
        )
    if len(texts) < MIN_TEXTS:
        raise SystemExit(
            f"--calibration-texts: expected at least {MIN_TEXTS} different texts that do not measure quality, "
            f"found {len(texts)} in {file}; give more text"
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
    facts = {"file": file.name, "sha256": digest.hexdigest(), "left_out": left_out, "cut_at_length": cut}
    facts["calibration_tokens"] = tokens
    return parts, facts | {part: len(encoded[INPUT_IDS]) for part, encoded in parts.items()}


# --- the search ----------------------------------------------------------------------


def find_int8(args, reference, parts, facts):
    """(recipes, names of the MatMuls in INT8, path and content of sensitivity.json); exits if the target is missed."""
    started = time.monotonic()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    target = dict(TASKS["classification" if args.classifier else "embedding"].target)
    for key, value in (("mean_cosine", args.target_cosine), ("relative_l2_error", args.target_l2)):
        if value is not None:
            target[key] = value
    recipes = find_recipes(reference, parts["calibration"], parts["held_out"], args.seed)
    deadline = started + 60 * args.max_minutes

    def convert_chosen(precision, names):
        return convert(precision, reference, recipes, names)

    chosen, found = search_int8(
        reference, recipes, parts["selection"], target, args.min_int8_share, deadline, convert_chosen, args.quick
    )
    record = {
        "model": card,
        "environment": environment_record(),
        "texts": facts,
        "seed": args.seed,
        "target": target | {"int8_flops_share": args.min_int8_share},
    }
    record |= {"seconds": round(time.monotonic() - started, 1), "peak_memory_mib": peak_memory_mib()}
    path = args.results / card["slug"] / "sensitivity.json"
    if not chosen:
        write_json(path, record | found)
        print(path)
        raise SystemExit(missed_target(args, target, found))
    return recipes, chosen, (path, record | found)


def closest(found, min_share):
    """(share, {precision: quality}) of what came closest to a missed target."""
    rows = [(t["int8_flops_share"], {p: t[p] for p in INT8_PRECISIONS}) for t in found["tried"]]
    if not rows:  # no point of the curve was good enough to make BEST of it
        rows = [(p["int8_flops_share"], {"INT8": p}) for p in found["curve"]]
        rows = [row for row in rows if row[0] >= min_share] or rows

    def worst_cosine(row):
        return min(-1 if q["mean_cosine"] is None else q["mean_cosine"] for q in row[1].values())

    return max(rows, key=worst_cosine)


def missed_target(args, target, found):
    """What was reached, in one line, where it is less than the target, and which option asks for less."""
    share, qualities = closest(found, args.min_int8_share)
    finite = [q for q in qualities.values() if q["mean_cosine"] is not None]
    missed = {}
    if len(finite) < len(qualities) or min(q["mean_cosine"] for q in finite) < target["mean_cosine"]:
        missed["--target-cosine"] = "lower"
    if len(finite) < len(qualities) or max(q["relative_l2_error"] for q in finite) > target["relative_l2_error"]:
        missed["--target-l2"] = "raise"
    said = "; ".join(
        f"{p} " + (f"{q['mean_cosine']:.4f} and {q['relative_l2_error']:.3f}" if q in finite else "nothing finite")
        for p, q in qualities.items()
    )
    remedies = [f"{verb} {option}" for option, verb in missed.items()] + ["lower --min-int8-share"]
    return (
        f"{', '.join(missed) or '--min-int8-share'}: expected mean cosine {target['mean_cosine']:.12g} and relative L2 error "
        f"{target['relative_l2_error']:.12g} with at least {args.min_int8_share:.0%} of the FLOPs in INT8, "
        f"found at best {said} with {share:.0%}"
        f"{' in ' + format(args.max_minutes, 'g') + ' minutes' if found['time_was_over'] else ''}; "
        f"INT8 and BEST are left as they were; {' or '.join(remedies)}, or give more minutes or texts"
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


def convert_int8(reference, recipes, chosen, paths):
    """(path, checked graph) of INT8 and BEST, as they are asked for: one graph at a time is in memory."""
    for precision, path in paths.items():
        graph = convert(precision, reference, recipes, chosen)
        check_quantization(path, graph, chosen)
        yield path, graph


def recipe_digest(recipes, chosen):
    """SHA-256 of what a search found: INT8 and BEST of the same search have the same."""
    digest = hashlib.sha256()
    for tensor, recipe in sorted(recipes.items()):
        for name in sorted(chosen & recipe["weights"].keys()):
            arrays = (recipe["offsets"], recipe["factors"], recipe["scale"], *recipe["weights"][name])
            digest.update(f"{tensor} {name}".encode())
            for array in (*arrays, recipe["mean_errors"][name]):
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_graphs(graphs, reference, properties, record=None):
    """Check typed graphs, note where they come from, and move them into place together, or none of them.

    graphs: (path, graph); properties: {path: {name: text}}; record: (path, content) of a
    JSON file that tells of them.
    """
    with contextlib.ExitStack() as stack:
        for path, graph in graphs:
            if graph_tensors(graph) != graph_tensors(reference):
                raise SystemExit(
                    f"{path}: expected the reference's tensors, {describe(graph_tensors(reference))}; "
                    f"found {describe(graph_tensors(graph))}"
                )
            onnx.helper.set_model_props(graph, properties[path])
            temporary = stack.enter_context(replace_when_done(path))
            onnx.save(graph, temporary)
            onnx.checker.check_model(str(temporary), full_check=True)
        if record:
            write_json(stack.enter_context(replace_when_done(record[0])), record[1])


def link_reference(reference, path):
    """FP32 is the reference graph itself: a hard link, or a copy where there are none."""
    with replace_when_done(path) as temporary:
        try:
            os.link(reference, temporary)
        except OSError:
            shutil.copyfile(reference, temporary)


def print_graph(precision, path, share=0.0):
    """One line about a graph that was written."""
    size = f"{path.stat().st_size / 1e6:7.1f} MB"
    print(f"{precision:4} {size}, {share:4.0%} of the weight-MatMul FLOPs in INT8, {path}", flush=True)


def write_int8(args, reference, parts, facts, paths, digests):
    """INT8 and BEST, as many as `paths` has, of one search, or of --naive."""
    record = None
    if args.naive:
        recipes = naive_recipes(reference, parts["calibration"], args.seed)
        chosen = set(candidate_matmuls(reference, recipes))
    else:
        recipes, chosen, record = find_int8(args, reference, parts, facts)
        digests = digests | {"recipe_sha256": recipe_digest(recipes, chosen)}
    share = flops_share(sorted(chosen), weight_matmuls(reference))
    properties = {
        path: digests | {"precision": precision, "int8_flops_share": f"{share:.4f}"}
        for precision, path in paths.items()
    }
    write_graphs(convert_int8(reference, recipes, chosen, paths), reference, properties, record)
    if record:
        print(record[0])
    for precision, path in paths.items():
        print_graph(precision, path, share)


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
        f"(default: {PRECISIONS['INT8'].target['mean_cosine']}; of a classifier's logits {TASKS['classification'].target['mean_cosine']})",
    )
    parser.add_argument(
        "--target-l2",
        type=float,
        help="most relative L2 error of INT8 and BEST, on the same texts "
        f"(default: {PRECISIONS['INT8'].target['relative_l2_error']}; of logits {TASKS['classification'].target['relative_l2_error']})",
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
    parser.add_argument("--only", choices=SERVED, help="make one graph")
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
    if args.target_l2 is not None and not 0 < args.target_l2 < float("inf"):
        parser.error("--target-l2: expected above 0 and finite")
    if args.max_minutes < 0 or args.max_selection_texts < 1 or args.seed < 0:
        parser.error("--max-minutes and --seed: expected 0 or more; --max-selection-texts: at least 1")
    return args


def main():
    args = parse_args()
    reference_path = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    reference = read_graph(reference_path)
    parts, facts = load_texts(args, [i.name for i in reference.graph.input])
    digests = {"calibration_sha256": facts["sha256"], "reference_sha256": sha256(reference_path)}
    print(f"calibration: {facts['calibration_tokens']} tokens of {facts['calibration']} texts", file=sys.stderr)
    paths = {p: args.repository / EMBEDDERS[f"TRT_{p}"] / "1" / "model.onnx" for p in SERVED}
    paths = {args.only: paths[args.only]} if args.only else paths
    if "FP32" in paths:
        link_reference(reference_path, paths["FP32"])
        print_graph("FP32", paths["FP32"])
    if "FP16" in paths:
        path, graph = paths["FP16"], convert_fp16(reference_path, parts["calibration"])
        properties = digests | {"precision": "FP16", "int8_flops_share": "0.0000"}
        write_graphs([(path, graph)], reference, {path: properties})
        print_graph("FP16", path)
    paths = {p: path for p, path in paths.items() if p in INT8_PRECISIONS}
    if paths:
        write_int8(args, reference, parts, facts, paths, digests)
    if args.classifier:
        refresh(args.repository)


if __name__ == "__main__":
    main()
