#!/usr/bin/env python3
"""Write a classifier's model repository: tokenizer, graph, postprocess, and their ensemble.

Reads:  --repository, where torch2onnx.py --task classification (and quantize.py) left graphs.
Writes: the configs of every graph there is, and of the ensemble through --precision. With
        --output: a repository of its own with that one graph, for an image or a package.
Run:    ./classifier_repository.py --repository build/reviews --precision FP16
Prints: "build/reviews: reviews answers through model_TRT_FP16, 2 labels, up to 8 texts a request"

A repository holds all that its server needs; nothing lies beside it.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import tokenizers

from core import onnx_runtime, tables
from core.files import REPOSITORY, ROOT, read_json, replace_when_done, sha256, write_json
from core.record import gpu_record
from core.tables import EMBEDDERS, INPUT_IDS, LOGITS, MAX_BATCH_SIZE, REFERENCE
from core.tokens import encode, load_served_tokenizer
from serving.classifier_configs import (
    OUR_COMMENTS,
    PLATFORMS,
    ensemble_config,
    model_config,
    postprocess_config,
    tokenizer_config,
)
from serving.repository import (
    PINNED_TENSORRT,
    check_one_search,
    config_text,
    describe,
    graph_properties,
    graph_tensors,
    read_config,
    read_graph,
    tensors,
)

PARTS = ("tokenizer", "postprocess", *EMBEDDERS.values())
SCORES = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
WARMUP_TEXT = "A real text, for the first run of each model."
REMEDY = "run torch2onnx.py --task classification"


# --- writing -------------------------------------------------------------------------


def check_name(name):
    """Exit if the ensemble cannot be called so."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in PARTS:
        raise SystemExit(
            f"--name: expected letters, digits, dots, dashes, and none of {', '.join(PARTS)}; found {name}; choose another"
        )
    return name


def present(repository):
    """Suffixes of the models whose graphs are there, the reference first."""
    return [s for s, model in EMBEDDERS.items() if (repository / model / "1" / "model.onnx").is_file()]


def is_classifier(repository):
    """Whether the folder is a classifier's repository: it holds its own record."""
    return (repository / "model.json").is_file()


def own_record(folder):
    """The record of a classifier's repository, {} where the folder is none."""
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) and card.get("task") == "classification" else {}


def read_card(repository):
    """The record of the export; exits where it is that of no classifier."""
    path = repository / "model.json"
    card = read_json(path, REMEDY)
    if card.get("task") != "classification":
        raise SystemExit(f"{path}: expected the record of a classifier, found another; {REMEDY}")
    return card


def engine_of(repository, suffix):
    """plan where build_trt.sh left one, else onnx: the typed graph itself."""
    return "plan" if (repository / EMBEDDERS[suffix] / "1" / "model.plan").is_file() else "onnx"


def write_tokenizer(repository, tokenizer, package=Path(tokenizers.__file__).parent):
    """tokenizer.json beside the tokenizer's config, and the package that reads it.

    The stock Triton container has no tokenizers package; it is one abi3 library, so a copy of
    the installed one serves there too.
    """
    folder = repository / "tokenizer"
    (folder / "1").mkdir(parents=True, exist_ok=True)
    with replace_when_done(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    copy_folder(package, folder / "site-packages" / "tokenizers")


def copy_folder(source, target):
    """A copy of a folder without compiled Python; what was there is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, suffix=".tmp"))
    try:
        shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        temporary.chmod(0o755)  # mkdtemp's is for one user; the server in a container is another
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path, content):
    """Write text or bytes, atomically."""
    with replace_when_done(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_configs(repository, name, suffix, max_batch_size):
    """All of a repository but graphs and tokenizer.json: configs, code, labels, warm-up."""
    card = read_card(repository)
    feeds = encode(load_served_tokenizer(repository / "tokenizer" / "tokenizer.json"), [WARMUP_TEXT], card["inputs"])
    length = feeds[INPUT_IDS].shape[1]
    configs = [
        tokenizer_config(card, max_batch_size),
        postprocess_config(card, max_batch_size),
        ensemble_config(name, suffix, card, max_batch_size),
    ]
    for other in present(repository):
        configs.append(model_config(other, card, max_batch_size, engine_of(repository, other), length))
        for tensor, values in feeds.items():
            content = np.ascontiguousarray(values[0], dtype="<i8").tobytes()  # as Triton reads it
            write_file(repository / EMBEDDERS[other] / "warmup" / tensor, content)
    for config in configs:
        (repository / config.name / "1").mkdir(parents=True, exist_ok=True)
        write_file(repository / config.name / "config.pbtxt", config_text(config, OUR_COMMENTS))
    write_file(repository / "tokenizer/1/model.py", (REPOSITORY / "tokenizer/1/model.py").read_bytes())
    write_file(repository / "postprocess/1/model.py", (ROOT / "postprocess.py").read_bytes())
    labels = {"labels": card["labels"], "score": SCORES[card["problem_type"]]}
    write_json(repository / "postprocess/1/labels.json", labels)
    settings = {"name": name, "precision": suffix.removeprefix("TRT_"), "max_batch_size": max_batch_size}
    older = card.get("service", {}).get("name")
    if older and older != name:
        shutil.rmtree(repository / older, ignore_errors=True)
    write_json(repository / "model.json", card | {"service": settings})


def choose(repository, precision):
    """Suffix of a precision whose graph is there."""
    suffix = REFERENCE if precision == REFERENCE else f"TRT_{precision}"
    if suffix not in present(repository):
        path = repository / EMBEDDERS[suffix] / "1" / "model.onnx"
        raise SystemExit(
            f"{path}: expected the graph of --precision {precision}, found none; "
            f"{REMEDY if suffix == REFERENCE else f'run quantize.py --repository {repository}'}"
        )
    return suffix


def refresh(repository):
    """Configs for the graphs that quantize.py has just made, with the settings of before."""
    service = read_card(repository)["service"]
    write_configs(repository, service["name"], choose(repository, service["precision"]), service["max_batch_size"])


def check_target(source, target):
    """Exit unless the folder may be replaced: it is new, empty, or a repository of this script, and not the source."""
    if target.resolve() == source.resolve():
        raise SystemExit(f"{target}: expected another folder than --repository, found the same; name another")
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not empty and "service" not in own_record(target):
        raise SystemExit(
            f"{target}: expected an empty folder or a repository to replace, found other files; name another"
        )


def extract(source, target, name, precision, max_batch_size, engine="onnx"):
    """Write a repository with one graph of `source` into `target`, which must be new or one of ours.

    engine: onnx, what any machine can serve, or plan, for the GPU that the plan was built on.
    """
    suffix, card = choose(source, precision), read_card(source)
    check_target(source, target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        version = temporary / EMBEDDERS[suffix] / "1"
        version.mkdir(parents=True)
        if engine == "plan":
            copy_plan(source / EMBEDDERS[suffix] / "1", version)
            check_plan_fits(source, source / EMBEDDERS[suffix] / "1" / "model.plan", card)
        else:
            copy_graph(source / EMBEDDERS[suffix] / "1", version)
        write_json(temporary / "model.json", card | {"service": {}})
        package = source / "tokenizer" / "site-packages" / "tokenizers"
        write_tokenizer(temporary, load_served_tokenizer(source / "tokenizer" / "tokenizer.json"), package)
        write_configs(temporary, name, suffix, max_batch_size)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return suffix


def copy_graph(source, target):
    """The graph as ONNX Runtime executes it right.

    Its CPU kernel for float16 QuantizeLinear truncates (onnx_runtime.open_session); the project's
    backend mends that when it loads a graph, a stock server would not.
    """
    graph = onnx.load(source / "model.onnx")
    before = graph.SerializeToString(deterministic=True)
    onnx_runtime.quantize_from_float32(graph)
    if graph.SerializeToString(deterministic=True) == before:
        shutil.copyfile(source / "model.onnx", target / "model.onnx")
    else:
        onnx.save(graph, target / "model.onnx")


def copy_plan(source, target):
    """The plan with its manifest and the graph beside it as it is; exits where one is missing."""
    for name in ("model.plan", "manifest.json"):
        if not (source / name).is_file():
            raise SystemExit(
                f"{source / name}: expected a TensorRT plan and its manifest, found none; "
                "run build_trt.sh, or leave --engine plan out"
            )
    for name in ("model.onnx", "model.plan", "manifest.json"):
        shutil.copyfile(source / name, target / name)


# --- checking ------------------------------------------------------------------------


def check_classifier_repository(repository, engine="onnx"):
    """Exit with the first disagreement between record, graphs and configs; else a summary."""
    card = read_card(repository)
    service = card.get("service") or {}
    remedy = f"run classifier_repository.py --repository {repository}"
    if not service:
        raise SystemExit(f"{repository / 'model.json'}: expected what is served, found nothing; {remedy}")
    found = present(repository)
    suffix, batch = choose(repository, service["precision"]), service["max_batch_size"]
    for path in sorted(p for p in repository.iterdir() if p.is_dir()):
        if not (path / "config.pbtxt").is_file():
            raise SystemExit(f"{path / 'config.pbtxt'}: expected a config, found none; {remedy}")
    expected = [tokenizer_config(card, batch), postprocess_config(card, batch)]
    expected += [ensemble_config(service["name"], suffix, card, batch)]
    expected += [model_config(s, card, batch, engine_of(repository, s), 1) for s in found]
    for config in expected:
        path = repository / config.name / "config.pbtxt"
        if tensors(read_config(path)) != tensors(config):
            raise SystemExit(
                f"{path}: expected {describe(tensors(config))}; found {describe(tensors(read_config(path)))}; {remedy}"
            )
    properties = {s: check_graph(repository, s, card, engine) for s in found}
    if {"TRT_INT8", "TRT_BEST"} <= set(found):
        check_one_search(repository, properties)
    load_served_tokenizer(repository / "tokenizer" / "tokenizer.json")
    return f"{repository.name}: {service['name']} answers through {EMBEDDERS[suffix]}, {len(found)} of {len(EMBEDDERS)} graphs, {len(card['labels'])} labels"


def check_graph(repository, suffix, card, engine):
    """One graph: whole, with the agreed tensors, and made from the present export. Returns the graph's properties."""
    path = repository / EMBEDDERS[suffix] / "1" / "model.onnx"
    graph = read_graph(path)
    names = {v.name for v in (*graph.graph.input, *graph.graph.output)}
    if names != {*card["inputs"], LOGITS}:
        raise SystemExit(
            f"{path}: expected {', '.join(card['inputs'])}, {LOGITS}; found {', '.join(sorted(names))}; {REMEDY}"
        )
    logits = next(dims for name, _, dims in graph_tensors(graph) if name == LOGITS)
    if logits != (len(card["labels"]),):
        raise SystemExit(f"{path}: expected {len(card['labels'])} logits, found {list(logits)}; {REMEDY}")
    properties = graph_properties(graph)
    made_from = properties.get("reference_sha256") or sha256(path)
    if made_from != card["reference_sha256"]:
        raise SystemExit(
            f"{path}: expected a graph of the export {card['reference_sha256'][:12]}, found one of {made_from[:12]}; "
            f"run quantize.py --repository {repository}"
        )
    platform = read_config(path.parents[1] / "config.pbtxt").platform
    wanted = PLATFORMS[engine_of(repository, suffix)]
    if platform != wanted:
        raise SystemExit(
            f"{path.parents[1] / 'config.pbtxt'}: expected platform {wanted}, found {platform}; "
            f"run classifier_repository.py --repository {repository}"
        )
    if engine == "plan" and wanted == PLATFORMS["plan"]:
        check_plan_fits(repository, path.with_name("model.plan"), card)
    return properties


def check_plan_fits(repository, plan, card):
    """Exit unless the plan is the manifest's, of the present graph, for this GPU and the TensorRT of the pinned image."""
    remedy = "run build_trt.sh on the GPU that serves"
    manifest = read_json(plan.with_name("manifest.json"), remedy)
    gpu = gpu_record() or {}
    # a repository with one graph lacks the reference, from which trtexec's flags make FP32 and FP16
    graph = repository / manifest.get("graph", "")
    for what, key, expected in (
        ("SHA-256", "plan_sha256", sha256(plan)),
        ("the export", "reference_sha256", card["reference_sha256"]),
        ("the graph", "graph_sha256", sha256(graph) if graph.is_file() else card["reference_sha256"]),
        ("GPU", "gpu", gpu.get("name")),
        ("TensorRT", "tensorrt_version", PINNED_TENSORRT),
    ):
        if expected and manifest.get(key) != expected:
            raise SystemExit(f"{plan}: expected {what} {expected}, found one for {manifest.get(key)}; {remedy}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--precision", choices=(REFERENCE, *tables.SERVED), help="default: as before")
    parser.add_argument("--name", help="of the ensemble (default: as before)")
    parser.add_argument(
        "--max-batch-size", type=int, help=f"texts in one request (default: as before, or {MAX_BATCH_SIZE})"
    )
    parser.add_argument(
        "--output", type=Path, help="write a repository with that one graph here, and leave the other alone"
    )
    parser.add_argument(
        "--engine", choices=tuple(PLATFORMS), default="onnx", help="with --output: the graph, or its TensorRT plan"
    )
    args = parser.parse_args()
    if args.max_batch_size is not None and args.max_batch_size < 1:
        parser.error("--max-batch-size: expected at least 1")
    return args


def main():
    args = parse_args()
    before = read_card(args.repository).get("service") or {}
    name = check_name(args.name or before.get("name") or args.repository.resolve().name)
    precision = args.precision or before.get("precision", REFERENCE)
    batch = args.max_batch_size or before.get("max_batch_size", MAX_BATCH_SIZE)
    suffix = choose(args.repository, precision)
    if args.output:
        extract(args.repository, args.output, name, precision, batch, args.engine)
    else:
        write_configs(args.repository, name, suffix, batch)
    labels = len(read_card(args.repository)["labels"])
    where = args.output or args.repository
    check_classifier_repository(where, args.engine)
    print(f"{where}: {name} answers through {EMBEDDERS[suffix]}, {labels} labels, up to {batch} texts a request")


if __name__ == "__main__":
    main()
