#!/usr/bin/env python3
"""Check repositories, and write what a CPU serves of them: one model that tokenises, computes and answers in a single process.

Reads:  --repository: one or more.
Writes: --output: a folder for each, with the service's model alone; graph and tokenizer stay where they are.
Run:    python -m serving.one_pass --repository build/reviews --output build/serve/8000/models
Prints: for each repository the folder to serve; on standard error "reviews: one pass, ONNX Runtime, FP32, packed, 2 cores"

Names, tensors and errors are those of the ensemble; serve.sh --path ensemble serves that instead. So is the task's own
repository always, whose five models answer together, a service with a second output, and one that PyTorch executes.
"""

import functools
import os
import sys
from pathlib import Path

from core.arguments import make_parser
from core.engines import ENGINES, TITLES, has_bf16, why_missing
from core.files import replace_folder_when_done
from core.repository import choose, graph_path, present, read_card, tokenizer_path
from core.runner import packed_inputs
from core.tables import CPU_PRECISIONS, HIDDEN_STATE, ONE_PASS_BATCH_SIZE, PACKED_FILE, PRECISIONS, REFERENCE, model_key
from core.tokens import load_tokenizer
from serving import generation
from serving.check import check_all, check_engine
from serving.configs import config_text, service_config
from serving.repository import write_file, write_service
from tasks.table import GENERATION, OWN


def why_not(engine, precision):
    """Why this machine cannot serve with an engine and precision, in words; "" where it can."""
    if precision not in (REFERENCE, *CPU_PRECISIONS):
        return f"expected {', '.join(CPU_PRECISIONS)} on a CPU, found one of GPUs alone; serve its plan there, or take another"
    if precision != REFERENCE and engine == "onnxruntime" and not PRECISIONS[precision].on_cpu:
        return f"expected an engine that computes in {precision}, found none of ONNX Runtime's kernels; take openvino"
    if precision == "BF16" and not has_bf16():
        return "expected a CPU with instructions for BF16, found one without: OpenVINO would compute FP32; take FP32"
    return why_missing(engine)


def graph_settings(repository, card, precision, engine, pack=True):
    """What opens the graph of a precision: the packed one where there is one. BF16 is made of FP32's by the engine.

    pack: False where so many texts come at once that those of one length fill a batch. Padding then costs less than the
    attention of packed texts, which is computed over all tokens of a batch.
    """
    if reason := why_not(engine, precision):
        raise SystemExit(f"--engine {engine} --precision {precision}: {reason}")
    packed, own = card.get("packed") if pack else None, precision in (REFERENCE, "FP32", "BF16")
    # the graph of FP32 is the reference by another name, and BF16 is made of it
    if precision == "FP32" and not packed:
        own = model_key(precision) not in present(repository)
    path = graph_path(repository, choose(repository, REFERENCE if own else precision))
    beside = path.with_name(PACKED_FILE)
    path, packed = (beside, packed) if packed and beside.is_file() else (path, None)
    return {
        "graph": str(path.resolve()),
        "inputs": packed_inputs(card["inputs"]) if packed else card["inputs"],
        "position_offset": packed["position_offset"] if packed else None,
        "max_length": card["max_length"],
        "engine": engine,
        "precision": "FP32" if precision == REFERENCE else precision,
        "cores": len(os.sched_getaffinity(0)),
    }


def opener(settings, output):
    """What Runner opens a graph with."""
    return functools.partial(ENGINES[settings["engine"]], settings["graph"], output, settings["precision"])


def choose_graph(repository, card, precision=None, engine=None, pack=True):
    """(what opens graph and tokenizer, the same in words): as asked, else as verdict.choose chose, else as recorded."""
    service = card["service"]
    chosen = service.get("cpu_engine"), service.get("cpu_precision")
    if chosen[0] and not (precision or engine) and (reason := why_not(*chosen)):
        print(
            f"{service['name']}: chosen was {', '.join(chosen)}: {reason}; choose again: verdict.choose",
            file=sys.stderr,
        )
        chosen = None, None
    precision = precision or chosen[1] or service["precision"]
    settings = graph_settings(
        repository, card, precision, engine or chosen[0] or service.get("engine") or "onnxruntime", pack
    )
    settings["tokenizer"] = str(tokenizer_path(repository).parent.resolve())
    form = "padded" if settings["position_offset"] is None else "packed"
    return settings, f"{TITLES[settings['engine']]}, {settings['precision']}, {form}"


def has_one_pass(card, engine):
    """Whether one model can do all, or only the ensemble serves."""
    by_torch = (card.get("service") or {}).get("engine") == "pytorch" and not engine
    return not (card["task"] == OWN or HIDDEN_STATE in card["outputs"] or by_torch)


def graphs_read(card, precision, engine):
    """Keys of the graphs that a start looks into: not those that it does not serve; None: all."""
    service = card.get("service") or {}
    if not has_one_pass(card, engine) or "precision" not in service:
        return None
    return {REFERENCE, model_key(precision or service.get("cpu_precision") or service["precision"])}


def write_one_pass(repository, output, precision, engine):
    """Write the folder; returns a line of what it is, or None where only the ensemble serves."""
    card = read_card(repository)
    if not has_one_pass(card, engine):
        return None
    service = card["service"]
    if card["task"] in GENERATION:
        if engine not in (None, "onnxruntime"):
            raise SystemExit(f"--engine: expected onnxruntime for --task {card['task']}, found {engine}; leave it out")
        with replace_folder_when_done(output) as temporary:
            by = generation.write_one_pass(repository, card, temporary, precision)
        return f"{service['name']}: one pass, {by}"
    settings, by = choose_graph(repository, card, precision, engine)
    by += f", {settings['cores']} cores"
    settings["max_request_texts"] = service["max_batch_size"]
    joined = max(service["max_batch_size"], ONE_PASS_BATCH_SIZE)
    config = service_config(service["name"], card, joined, by)
    with replace_folder_when_done(output) as temporary:
        folder = temporary / service["name"]
        write_service(folder / "1", card, load_tokenizer(tokenizer_path(repository)), settings)
        write_file(folder / "config.pbtxt", config_text(config))
    return f"{service['name']}: one pass, {by}"


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, action="append", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", choices=(REFERENCE, *CPU_PRECISIONS), help="default: the service's")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: what verdict.choose chose, else onnxruntime")
    return parser.parse_args()


def main():
    args = parse_args()
    read = {path: graphs_read(read_card(path), args.precision, args.engine) for path in args.repository}
    print(*check_all(args.repository, read=read), sep="\n", file=sys.stderr)
    for number, repository in enumerate(args.repository, 1):
        folder = (args.output / str(number)).resolve()
        said = write_one_pass(repository, folder, args.precision, args.engine)
        if not said:
            check_engine(repository)
        print(folder if said else repository)
        if said:
            print(said, file=sys.stderr)


if __name__ == "__main__":
    main()
