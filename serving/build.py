"""What build_trt.sh does around trtexec: shapes, graphs, the proof of what is in a plan, and its manifest.

Reads:  trtexec's layer information and log, the graph that a plan was built from.
Writes: model_TRT_*/1/layers.json and manifest.json beside model.plan; results/<model>/<machine>/plans.json.
Run:    python -m serving.build summary --repository DIR
Prints: one line per plan: precision, size, build time, weight MatMuls per precision.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from core.files import REPOSITORY, RESULTS, read_json, replace_when_done, sha256, write_json
from core.record import environment_record, gpu_record, results_folder
from core.repository import check_made_from, graph_path, graph_properties, read_card, read_graph, weight_matmuls
from core.tables import FURTHER, OPT_BATCH_SIZE, OPT_LENGTH, PRECISIONS, REFERENCE, SERVED, model_key
from roofline.gpus import having
from serving.plans import REMEDY, plan_path, shapes

# "Format/Datatype" of a layer's tensors: Half, Float, "Row major linear FP32", "Row major Int8 format"
DATA_TYPES = (
    ("FP8", r"fp8|float8|e4m3"),
    ("INT8", r"int8"),
    ("BF16", r"bf16|bfloat16"),
    ("FP16", r"fp16|half"),
    ("FP32", r"fp32|float"),
)
IN_LOG = {
    "tensorrt_version": r"TensorRT version: ([\d.]+)",
    "gpu": r"Selected Device: (.+)",
    "compute_capability": r"Compute Capability: ([\d.]+)",
}
IN_CONTAINER = re.compile(r"/(models|cache|usr/src/tensorrt)(/|$)")  # the same on every machine


# --- what is in a plan ---------------------------------------------------------------


def layer_precision(layer):
    """FP8, INT8, BF16, FP16, FP32 or "other": the narrowest type among a layer's inputs.

    A GEMM that reads Int8 multiplies in Int8, one that reads FP8 in FP8; shape and mask arithmetic is "other".
    """
    types = " ".join(str(t.get("Format/Datatype", "")) for t in layer.get("Inputs", [])).lower()
    return next((name for name, pattern in DATA_TYPES if re.search(pattern, types)), "other")


def count_precisions(path, matmuls):
    """Count layers and weight MatMuls per precision in trtexec's --exportLayerInfo file.

    matmuls: names of the weight MatMuls in the ONNX graph; a layer's Metadata lists the
    nodes it came from as [ONNX Layer: name]. One MatMul in several layers (a reformat and
    the product) counts once, as the GEMM. Raises ValueError where the file has no details.
    """
    layers = json.loads(path.read_text(encoding="utf-8")).get("Layers", [])
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
    needed = PRECISIONS[precision].plan_has
    named = counts["weight_matmuls"] or counts["layers"]  # layers, where TensorRT names no MatMul
    if needed and not named.get(needed):
        raise ValueError(
            f"expected layers in {needed}, found {named}: {precision} in name only; build from the Q/DQ and typed "
            "graphs of quantize.py (no --plain-int8), on a GPU whose tensor cores have this precision"
        )


# --- recording -----------------------------------------------------------------------


def read_log(text):
    """{tensorrt_version, gpu, compute_capability} as trtexec's log says them, None where it does not."""
    found = {key: re.search(pattern, text) for key, pattern in IN_LOG.items()}
    return {key: match and match[1].strip() for key, match in found.items()}


def without_paths(argument, repository):
    """An argument as anybody may read it: the repository by its name, the last name of every other path."""
    argument = argument.replace(str(repository), repository.name)
    return re.sub(r"(?<![^=,])/[^,]+", lambda m: m[0] if IN_CONTAINER.match(m[0]) else Path(m[0]).name, argument)


def record(args):
    """Prove a built plan and move it, its layers and its manifest into place."""
    plan, graph = plan_path(args.repository, model_key(args.precision)), args.repository / args.graph
    reference = graph_path(args.repository, REFERENCE)
    plain = args.plain and PRECISIONS[args.precision].trt10_graph == "typed"
    try:
        counts = count_precisions(args.layers, set(weight_matmuls(read_graph(reference))))
        if not plain:
            prove(args.precision, counts)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{plan}: {error}; the plan was not kept") from None
    if not args.plan.is_file() or not args.plan.stat().st_size:
        raise SystemExit(f"{plan}: expected trtexec to write it, found no or an empty file; see {args.log}")
    log = read_log(args.log.read_text(errors="replace"))
    capability = log["compute_capability"]
    tf32 = None if capability is None else "on" if float(capability) >= 8 else "off"
    manifest = {
        "precision": args.precision,
        "built_as": args.built_as,
        "plain_int8": plain,
        "graph": args.graph,
        "graph_sha256": sha256(graph),
        "reference_sha256": sha256(reference),
        "calibration_sha256": graph_properties(read_graph(graph)).get("calibration_sha256"),
        "plan_sha256": sha256(args.plan),
        "plan_bytes": args.plan.stat().st_size,
        "command": [without_paths(argument, args.repository) for argument in args.command_line],
        **log,
        "driver": (gpu_record() or {}).get("driver"),
        "tf32": "off" if "--noTF32" in args.command_line else tf32,
        "counts": counts,
        "build_s": args.seconds,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    # the manifest goes first and comes last: a plan without one is never taken for good
    plan.with_name("manifest.json").unlink(missing_ok=True)
    os.replace(args.plan, plan)
    with replace_when_done(plan.with_name("layers.json")) as temporary:
        temporary.write_bytes(args.layers.read_bytes())
    write_json(plan.with_name("manifest.json"), manifest)
    print(describe(manifest))


def describe(manifest):
    """One line for people."""
    matmuls = ", ".join(f"{n} {p}" for p, n in manifest["counts"]["weight_matmuls"].items()) or "not named by TensorRT"
    return (
        f"{manifest['precision']:4} {manifest['plan_bytes'] / 1e6:7.1f} MB in {manifest['build_s']:.0f} s, by "
        f"{manifest['built_as']}, weight MatMuls: {matmuls}; TensorRT {manifest['tensorrt_version']}, {manifest['gpu']}"
    )


# --- commands ------------------------------------------------------------------------


def show_shapes(args):
    """Print trtexec's shapes, three lines: smallest, optimal and largest."""
    card = read_card(args.repository)
    for option, value, largest in (
        ("--opt-batch", args.opt_batch, card["service"]["max_batch_size"]),
        ("--opt-length", args.opt_length, card["max_length"]),
    ):
        if value is not None and not 1 <= value <= largest:
            args.parser.error(f"{option}: expected 1 to {largest}, found {value}")
    for batch, length in shapes(card, args.opt_batch or OPT_BATCH_SIZE, args.opt_length or OPT_LENGTH):
        print(",".join(f"{name}:{batch}x{length}" for name in card["inputs"]))


def check_gpu(precisions, gpu):
    """Exit where the GPU, of gpu_record, has no tensor cores for a precision that is asked for; None is not compared."""
    for name in precisions:
        needed = PRECISIONS[name].capability
        if name in FURTHER and gpu and float(gpu["compute_capability"]) < needed:
            raise SystemExit(
                f"{name}: expected a GPU of compute capability {needed:g} or later ({', '.join(having(name))}), found "
                f"{gpu['name']} with {gpu['compute_capability']}; build it there, or FP16, INT8 and BEST here"
            )


def check_graphs(args):
    """Exit unless every typed graph belongs to the present reference, this GPU has its arithmetic, and the disk room for the plans."""
    check_gpu(args.precisions, gpu_record())
    digest, needed = sha256(graph_path(args.repository, REFERENCE)), 0
    for precision in args.precisions:
        path = graph_path(args.repository, model_key(precision))
        check_made_from(read_graph(path), path, digest)
        needed += 2 * path.stat().st_size
    free = shutil.disk_usage(args.repository).free
    if free < needed:
        raise SystemExit(
            f"{args.repository}: expected {needed >> 20} MiB of free disk for the plans, found {free >> 20} MiB; free some"
        )


def summarize(args):
    """Write plans.json: the manifests of the plans there are."""
    card, manifests = read_card(args.repository), {}
    for precision in (*SERVED, *FURTHER):
        path = plan_path(args.repository, model_key(precision)).with_name("manifest.json")
        if not path.exists():
            continue
        manifest = read_json(path, REMEDY)
        if manifest["reference_sha256"] == card["reference_sha256"]:
            manifests[precision] = manifest
            print(describe(manifest))
        else:
            print(f"{path}: of another export than {card['name']}, left out; build it again", file=sys.stderr)
    if not manifests:
        raise SystemExit(f"{args.repository}: expected at least one plan with a manifest, found none; run build_trt.sh")
    path = results_folder(args.results, card) / "plans.json"
    write_json(path, {"model": card, "environment": environment_record(), "plans": manifests})
    print(path)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="shapes | graphs | record | summary")

    def command(name, run, text):
        new = commands.add_parser(name, help=text)
        new.add_argument("--repository", type=Path, default=REPOSITORY)
        new.set_defaults(run=run, parser=new)
        return new

    new = command("shapes", show_shapes, "print trtexec's smallest, optimal and largest shapes")
    new.add_argument("--opt-batch", type=int, help=f"default {OPT_BATCH_SIZE}")
    new.add_argument("--opt-length", type=int, help=f"where the length is dynamic; default {OPT_LENGTH}")
    new = command("graphs", check_graphs, "fail if a typed graph is missing or older than the reference")
    new.add_argument("precisions", nargs="+", choices=(*SERVED, *FURTHER))
    new = command("record", record, "prove a plan, write its manifest, move it into place")
    new.add_argument("--precision", choices=(*SERVED, *FURTHER), required=True)
    new.add_argument("--graph", required=True, help="as it lies in the repository")
    for name in ("--plan", "--layers", "--log"):
        new.add_argument(name, type=Path, required=True)
    new.add_argument("--built-as", choices=("flags", "typed"), required=True)
    new.add_argument("--plain", action="store_true", help="literal --int8 and --best: count, but do not refuse")
    new.add_argument("--seconds", type=float, required=True)
    new.add_argument("command_line", nargs="+", help="the trtexec command, after --")
    new = command("summary", summarize, "write results/<model>/<machine>/plans.json")
    new.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.repository = args.repository.resolve()
    return args


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
