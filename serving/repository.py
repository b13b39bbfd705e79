#!/usr/bin/env python3
"""Write a model repository's configs: tokenizer, graphs, the answers' step, and their ensemble.

Reads:  --repository, where torch2onnx.py (and quantize.py) left record and graphs.
Writes: the configs of every graph there is, executed by --engine, and of the ensemble through --precision. With
        --output: a repository of its own with that one graph, for an image or a package.
Run:    python -m serving.repository --repository build/reviews --precision FP16
Prints: "build/reviews: reviews answers through model_TRT_FP16, up to 8 texts a request"

A repository holds all that its server needs; only the task's own has record and tokenizer in assets/ beside it.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import tokenizers

from core.arguments import make_parser
from core.files import ROOT, replace_folder_when_done, replace_when_done, write_json
from core.onnx_runtime import quantize_from_float32
from core.repository import (
    HEALTH,
    RECORD,
    answering_key,
    assets_of,
    check_choice,
    check_name,
    graph_path,
    is_own,
    own_record,
    read_card,
    script_path,
    site_packages,
    tokenizer_path,
)
from core.tables import (
    ENGINES,
    FURTHER,
    GRAPH,
    INPUT_IDS,
    MAX_BATCH_SIZE,
    MODELS,
    NAMES,
    PACKED_FILE,
    PRECISIONS,
    REFERENCE,
    SERVED,
    TORCH,
)
from core.tokens import encode, load_tokenizer
from serving import generation
from serving.check import check_repository, expected_configs
from serving.configs import config_text
from serving.plans import copy_plan
from tasks.examples import answers_of, examples
from tasks.table import OWN, TASKS

WARMUP_TEXT = "A real text, for the first run of each model."
TOKENIZER_CODE = ROOT / "model_repository" / "tokenizer" / "1"
MODELS_CODE = ROOT / "serving" / "models"
ON_CPU = ("openvino", "pytorch")  # engines that a service's record names; the others follow from its files


# --- writing -------------------------------------------------------------------------


def write_file(path, content):
    """Write text or bytes, atomically, unless that is what the file holds already."""
    content = content.encode() if isinstance(content, str) else content
    if not (path.is_file() and path.read_bytes() == content):
        with replace_when_done(path) as temporary:
            temporary.write_bytes(content)


def write_tokenizer(repository, served, package=Path(tokenizers.__file__).parent):
    """tokenizer.json and the package that reads it, where the server looks for them.

    The stock Triton container has no tokenizers package; it is one abi3 library, so a copy of the installed
    one serves there too.
    """
    with replace_when_done(tokenizer_path(repository)) as temporary:
        served.save(str(temporary))
    copy_folder(package, site_packages(repository) / "tokenizers")


def copy_folder(source, target):
    """A copy of a folder without compiled Python; what was there is replaced."""
    with replace_folder_when_done(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def write_repository(repository, **service):
    """All of a repository but graphs, tokenizer.json and the record's other parts: configs, code, settings, warm-up.

    service: "name", "precision", "engine", "max_batch_size", "threshold" where they are other than in the record; None
    takes one out of it.
    """
    card = read_card(repository)
    if generation.is_generation(card):
        return generation.write_repository(repository, **service)
    task, before = TASKS[card["task"]], card.get("service") or {}
    service = {"precision": REFERENCE, "max_batch_size": MAX_BATCH_SIZE} | before | service
    card["service"] = {key: value for key, value in service.items() if value is not None}
    name = check_name(card["service"]["name"], repository)
    if card["task"] != OWN or card["service"].get("engine"):
        check_choice(repository, card["service"])
    tokenizer = load_tokenizer(tokenizer_path(repository))
    feeds = encode(tokenizer, examples(card, [WARMUP_TEXT]), card["inputs"])
    for config in expected_configs(repository, card, feeds[INPUT_IDS].shape[1]):
        folder = repository / config.name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.pbtxt", config_text(config))
        if config.name in NAMES.values():
            for tensor, values in feeds.items():  # as Triton reads it
                write_file(folder / "warmup" / tensor, np.ascontiguousarray(values[0], dtype="<i8").tobytes())
    for code in ("model.py", "texts.py"):
        write_file(repository / "tokenizer/1" / code, (TOKENIZER_CODE / code).read_bytes())
    if task.answers:
        if task.windows:
            write_service(
                repository / name / "1", card, tokenizer, {"graph_model": name + GRAPH, "tokenizer": "tokenizer"}
            )
        else:
            write_answers(repository / "postprocess/1", card, tokenizer, "postprocess.py", {})
    if before.get("name") not in (None, name):  # read_card has held it against paths
        for folder in (before["name"], before["name"] + GRAPH):
            shutil.rmtree(repository / folder, ignore_errors=True)
    (example,) = examples(card, [WARMUP_TEXT])
    given = zip(task.takes, example if isinstance(example, tuple) else (example,), strict=True)
    asked = [{"name": n, "shape": [1, 1], "datatype": "BYTES", "data": [text]} for n, text in given]
    write_json(assets_of(repository) / HEALTH, {"model": name, "body": {"inputs": asked}})
    write_json(assets_of(repository) / RECORD, card)


def write_answers(folder, card, tokenizer, code, settings):
    """A version of a Python model: its code, the functions of the task's answers, and the settings of both."""
    task = TASKS[card["task"]]
    write_file(folder / "model.py", (MODELS_CODE / code).read_bytes())
    for name in filter(None, ("__init__", task.answers)):
        write_file(folder / "answers" / f"{name}.py", (MODELS_CODE / "answers" / f"{name}.py").read_bytes())
    write_json(folder / "settings.json", settings | answers_settings(card, tokenizer))


def answers_settings(card, tokenizer):
    """What makes answers of a task's tensors, and what it needs of the record."""
    answers = answers_of(card["task"])
    return {"answers": TASKS[card["task"]].answers} | (answers.settings_of(card, tokenizer) if answers else {})


def service_settings(card, settings):
    """What a service in one model reads of its task; settings: "tokenizer", its folder, and what opens a graph or asks it."""
    task = TASKS[card["task"]]
    facts = {"takes": task.takes, "also": task.also, "output": task.output, "per_token": task.per_token}
    return {"engine": "Triton", "inputs": card["inputs"]} | facts | settings


def write_service(folder, card, tokenizer, settings):
    """A version of a service in one model; settings as in service_settings."""
    for name in ("runner", "engines", "onnx_runtime"):
        write_file(folder / f"{name}.py", (ROOT / "core" / f"{name}.py").read_bytes())
    write_file(folder / "rows.py", (MODELS_CODE / "rows.py").read_bytes())
    write_file(folder / "texts.py", (TOKENIZER_CODE / "texts.py").read_bytes())
    write_answers(folder, card, tokenizer, "service.py", service_settings(card, settings))


def check_target(source, target):
    """Exit unless the folder may be replaced: it is new, empty, or a repository of this script, and not the source."""
    if target.resolve() == source.resolve():
        raise SystemExit(f"{target}: expected another folder than --repository, found the same; name another")
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not empty and "service" not in own_record(target):
        raise SystemExit(
            f"{target}: expected an empty folder or a repository to replace, found other files; name another"
        )


def extract(source, target, precision, engine="onnxruntime", **service):
    """Write a repository with one graph of `source` into `target`, which must be new or one of ours.

    engine: onnxruntime, what any machine serves; tensorrt, for the GPU that the plan was built on; openvino or pytorch.
    service: as write_repository takes it.
    """
    check_target(source, target)
    card = read_card(source)
    if generation.is_generation(card):
        return generation.extract(source, target, precision, **service)
    asked = {"engine": engine if engine in ON_CPU else None, "precision": precision}
    check_choice(source, asked)
    key = answering_key(asked)
    with replace_folder_when_done(target) as temporary:
        version = temporary / NAMES[key] / "1"
        version.mkdir(parents=True)
        if engine == "tensorrt":
            copy_plan(source, key, version, card)
        elif key == TORCH:
            shutil.copyfile(script_path(source), version / script_path(source).name)
        elif not PRECISIONS[MODELS[key].precision].on_cpu:
            raise SystemExit(f"--precision {precision}: expected --engine tensorrt, no CPU computes it; name it")
        elif engine == "openvino":
            shutil.copyfile(graph_path(source, key), version / "model.onnx")
        else:
            copy_graph(graph_path(source, key), version / "model.onnx")
        beside = source / NAMES[key] / "1" / PACKED_FILE
        if card.get("packed") and engine != "tensorrt" and beside.is_file():
            shutil.copyfile(beside, version / PACKED_FILE)
        else:
            card["packed"] = None
        # what was chosen for a CPU may be a graph that is left behind
        own = asked | {"cpu_engine": None, "cpu_precision": None}
        write_json(temporary / RECORD, card | {"service": (card.get("service") or {}) | own})
        write_tokenizer(temporary, load_tokenizer(tokenizer_path(source)), site_packages(source) / "tokenizers")
        write_repository(temporary, **asked, **service)
    return key


def copy_graph(source, target):
    """The graph as ONNX Runtime executes it right.

    Its CPU kernel for float16 QuantizeLinear truncates (core/onnx_runtime.py); the project's backend mends that
    when it loads a graph, a stock server would not.
    """
    graph = onnx.load(source)
    before = graph.SerializeToString(deterministic=True)
    quantize_from_float32(graph)
    if graph.SerializeToString(deterministic=True) == before:
        shutil.copyfile(source, target)
    else:
        onnx.save(graph, target)


# --- the command ---------------------------------------------------------------------


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--precision", choices=(REFERENCE, *SERVED, *FURTHER), help="default: as before")
    parser.add_argument("--name", help="of the ensemble (default: as before)")
    parser.add_argument("--max-batch-size", type=int, help="texts in one request (default: as before)")
    parser.add_argument(
        "--output", type=Path, help="write a repository with that one graph here, and leave the other alone"
    )
    parser.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        help="what executes the graphs (default: as before); tensorrt with --output: the plan of that graph",
    )
    args = parser.parse_args()
    if args.engine == "tensorrt" and not args.output:
        parser.error("--engine tensorrt: expected --output with it; without, a plan is served where there is one")
    if args.max_batch_size is not None and args.max_batch_size < 1:
        parser.error("--max-batch-size: expected at least 1")
    return args


def main():
    args = parse_args()
    given = {"precision": args.precision, "max_batch_size": args.max_batch_size}
    given |= {"name": args.name and check_name(args.name, "--name")}
    given = {key: value for key, value in given.items() if value is not None}
    card = read_card(args.repository)
    before = card.get("service") or {}
    if args.engine in ON_CPU and generation.is_generation(card):
        raise SystemExit(f"--engine {args.engine}: expected a service of an encoder task, found {card['task']}")
    if args.engine in ON_CPU and is_own(args.repository) and not args.output:
        raise SystemExit(
            f"--engine {args.engine}: expected --output with it, as the task's own five stay; name a folder"
        )
    where = args.output or args.repository
    if args.output:
        precision = given.pop("precision", before.get("precision", REFERENCE))
        extract(args.repository, args.output, precision, args.engine or before.get("engine") or "onnxruntime", **given)
    else:
        engine = {"engine": args.engine if args.engine in ON_CPU else None} if args.engine else {}
        write_repository(args.repository, **given, **engine)
    print(f"{os.path.relpath(where)}: {check_repository(where)}")


if __name__ == "__main__":
    main()
