#!/usr/bin/env python3
"""Prove what is in a TensorRT plan, and note where it comes from.

Reads:  trtexec's layer information and log, the graph a plan was built from.
Writes: model_TRT_*/1/layers.json and manifest.json beside model.plan;
        results/<model>/plans.json.
Run:    ./plans.py summary      (build_trt.sh calls the other commands)
Prints: one line per plan: precision, layers and weight MatMuls per precision, size.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from core.files import ASSETS, REPOSITORY, RESULTS, read_json, replace_when_done, sha256, write_json
from core.record import environment_record, gpu_record
from core.tables import EMBEDDERS, INPUT_IDS, MAX_BATCH_SIZE, REFERENCE, SERVED
from precision.int8_graph import weight_matmuls
from serving.classifier_repository import check_classifier_repository, is_classifier, read_card, refresh
from serving.repository import check_embedder, plan_folder, read_config, read_graph

# "Format/Datatype" of a layer's tensors: Half, Float, "Row major linear FP32", "Row major Int8 format"
DATA_TYPES = (("INT8", r"int8"), ("BF16", r"bf16|bfloat16"), ("FP16", r"fp16|half"), ("FP32", r"fp32|float"))
OPT_LENGTH = 128  # tokens that a classifier's plan is tuned for, where its length is dynamic
NEEDED = {"FP16": "FP16", "INT8": "INT8", "BEST": "INT8"}  # what a plan of this precision has to contain


# --- what is in a plan ---------------------------------------------------------------


def layer_precision(layer):
    """INT8, BF16, FP16, FP32 or "other": the narrowest type among a layer's inputs.

    A GEMM that reads Int8 multiplies in Int8; shape and mask arithmetic is "other".
    """
    types = " ".join(str(t.get("Format/Datatype", "")) for t in layer.get("Inputs", [])).lower()
    return next((name for name, pattern in DATA_TYPES if re.search(pattern, types)), "other")


def count_precisions(path, matmuls):
    """Count layers and weight MatMuls per precision in trtexec's --exportLayerInfo file.

    matmuls: names of the weight MatMuls in the ONNX graph; a layer's Metadata lists the
    nodes it came from as [ONNX Layer: name]. One MatMul in several layers (a reformat and
    the product) counts once, as the GEMM. Raises ValueError where the file has no details.
    """
    layers = json.loads(path.read_text()).get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError("layers without details; --profilingVerbosity=detailed is needed")
    found = {}
    for layer in layers:
        gemm = re.search(r"gemm|matrix.?multiply|matmul", f"{layer.get('LayerType')} {layer.get('TacticName')}".lower())
        names = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata") or "")
        for name in matmuls.intersection(names):
            if gemm or name not in found:
                found[name] = layer_precision(layer)
    return {
        "layers": dict(Counter(map(layer_precision, layers))),
        "weight_matmuls": dict(Counter(found.values())),
        "weight_matmuls_not_named": len(matmuls) - len(found),
    }


def prove(precision, counts):
    """Raise ValueError if the plan has nothing of the precision it is named after."""
    needed = NEEDED.get(precision)
    named = counts["weight_matmuls"] or counts["layers"]  # layers, where TensorRT names no MatMul
    if needed and not named.get(needed):
        raise ValueError(
            f"expected layers in {needed}, found {named}: {precision} in name only; build from the Q/DQ and typed "
            "graphs of quantize.py (no --plain-int8), on a GPU whose tensor cores have this precision"
        )


# --- recording -----------------------------------------------------------------------


def read_log(text):
    """{tensorrt_version, gpu, compute_capability} as trtexec's log says them, None where it does not."""

    def find(pattern):
        match = re.search(pattern, text)
        return match[1].strip() if match else None

    return {
        "tensorrt_version": find(r"TensorRT version: ([\d.]+)"),
        "gpu": find(r"Selected Device: (.+)"),
        "compute_capability": find(r"Compute Capability: ([\d.]+)"),
    }


def record(args):
    """Prove a built plan and move it, its layers and its manifest into place."""
    folder = plan_folder(args.repository, args.precision)
    graph = read_graph(args.graph)
    reference = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    try:
        counts = count_precisions(args.layers, set(weight_matmuls(read_graph(reference))))
        if not args.plain:
            prove(args.precision, counts)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{folder / 'model.plan'}: {error}; the plan was not kept") from None
    if not args.plan.stat().st_size:
        raise SystemExit(f"{args.plan}: expected a plan, found an empty file; free disk space and build again")
    log = read_log(args.log.read_text(errors="replace"))
    properties = {p.key: p.value for p in graph.metadata_props}
    capability = log["compute_capability"]
    tf32 = None if capability is None else "on" if float(capability) >= 8 else "off"
    manifest = {
        "precision": args.precision,
        "built_as": args.built_as,
        "plain_int8": args.plain,
        "graph": str(args.graph.relative_to(args.repository)),
        "graph_sha256": sha256(args.graph),
        "reference_sha256": sha256(reference),
        "calibration_sha256": properties.get("calibration_sha256"),
        "plan_sha256": sha256(args.plan),
        "plan_bytes": args.plan.stat().st_size,
        "command": args.command_line,
        **log,
        "driver": (gpu_record() or {}).get("driver"),
        "tf32": "off" if "--noTF32" in args.command_line else tf32,
        "counts": counts,
        "build_s": args.seconds,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    # the manifest goes first and comes last: a plan without one is never taken for good
    (folder / "manifest.json").unlink(missing_ok=True)
    os.replace(args.plan, folder / "model.plan")
    with replace_when_done(folder / "layers.json") as temporary:
        temporary.write_bytes(args.layers.read_bytes())
    write_json(folder / "manifest.json", manifest)
    if is_classifier(args.repository):
        refresh(args.repository)  # from now on the plan is what a GPU serves
    print(describe(manifest))


def describe(manifest):
    """One line for people."""
    matmuls = ", ".join(f"{n} {p}" for p, n in manifest["counts"]["weight_matmuls"].items()) or "not named by TensorRT"
    return (
        f"{manifest['precision']:4} {manifest['plan_bytes'] / 1e6:7.1f} MB in {manifest['build_s']:.0f} s, "
        f"weight MatMuls: {matmuls}; TensorRT {manifest['tensorrt_version']}, {manifest['gpu']}"
    )


# --- commands ------------------------------------------------------------------------


def show_length(args):
    """Print the length of the exported graph, after it was held against the configs."""
    reference = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    length = read_graph(reference).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    if is_classifier(args.repository):  # its configs are checked against its graphs
        check_classifier_repository(args.repository)
        print(length or f"1 to {read_card(args.repository)['max_length']}")
        return
    for precision in SERVED:
        path = plan_folder(args.repository, precision).parent / "config.pbtxt"
        dims = next((list(t.dims) for t in read_config(path).input if t.name == INPUT_IDS), None)
        if dims != [length]:
            raise SystemExit(f"{path}: expected length {length} as in {reference}, found {dims}; run torch2onnx.py")
    print(length)


def show_shapes(args):
    """Print trtexec's shapes, three lines: smallest, optimal and largest."""
    reference = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    tensors = [(i.name, i.type.tensor_type.shape.dim[1].dim_value) for i in read_graph(reference).graph.input]
    largest_batch, lengths = MAX_BATCH_SIZE, (None, None, None)
    if is_classifier(args.repository):
        card = read_card(args.repository)
        largest_batch, limit = card["service"]["max_batch_size"], card["max_length"]
        lengths = (1, min(OPT_LENGTH, limit), limit)
    for batch, length in zip((1, min(args.opt_batch, largest_batch), largest_batch), lengths, strict=True):
        print(",".join(f"{name}:{batch}x{fixed or length}" for name, fixed in tensors))


def check_graphs(args):
    """Exit unless every typed graph belongs to the present reference."""
    if is_classifier(args.repository):
        for precision in args.precisions:
            read_graph(args.repository / EMBEDDERS[f"TRT_{precision}"] / "1" / "model.onnx")
        check_classifier_repository(args.repository)
        return
    reference = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    digest = sha256(reference)
    for precision in args.precisions:
        check_embedder(args.repository, f"TRT_{precision}", digest, "onnx")


def summarize(args):
    """results/<model>/plans.json: the manifests of the plans there are."""
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    paths = {p: plan_folder(args.repository, p) / "manifest.json" for p in SERVED}
    manifests = {p: json.loads(path.read_text()) for p, path in paths.items() if path.exists()}
    for precision, manifest in list(manifests.items()):
        if manifest["reference_sha256"] != card["reference_sha256"]:
            print(
                f"{paths[precision]}: of another export than {card['name']}, left out; build it again", file=sys.stderr
            )
            del manifests[precision]
    if not manifests:
        raise SystemExit(f"{args.repository}: expected at least one plan with a manifest, found none; run build_trt.sh")
    for manifest in manifests.values():
        print(describe(manifest))
    path = args.results / card["slug"] / "plans.json"
    write_json(path, {"model": card, "environment": environment_record(), "plans": manifests})
    print(path)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(required=True, metavar="length | shapes | graphs | record | summary")
    commands.add_parser("length", help="print the graph's length; fail if a config has another").set_defaults(
        run=show_length
    )
    shapes = commands.add_parser("shapes", help="print trtexec's smallest, optimal and largest shapes")
    shapes.add_argument("--opt-batch", type=int, default=4)
    shapes.set_defaults(run=show_shapes)
    graphs = commands.add_parser("graphs", help="fail if a typed graph is missing or older than the reference")
    graphs.add_argument("precisions", nargs="+", choices=SERVED)
    graphs.set_defaults(run=check_graphs)
    new = commands.add_parser("record", help="prove a plan, write its manifest, move it into place")
    new.add_argument("--precision", choices=SERVED, required=True)
    for name in ("--graph", "--plan", "--layers", "--log"):
        new.add_argument(name, type=Path, required=True)
    new.add_argument("--built-as", required=True, help="flags or typed")
    new.add_argument("--plain", action="store_true", help="literal --int8 and --best: count, but do not refuse")
    new.add_argument("--seconds", type=float, required=True)
    new.add_argument("command_line", nargs="+", help="the trtexec command, after --")
    new.set_defaults(run=record)
    commands.add_parser("summary", help="write results/<model>/plans.json").set_defaults(run=summarize)
    args = parser.parse_args()
    args.repository = args.repository.resolve()
    if is_classifier(args.repository):
        args.assets = args.repository
    return args


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
