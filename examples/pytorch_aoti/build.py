#!/usr/bin/env python3
"""Compile a sentence encoder ahead of time with AOTInductor, check it against torch, and write the repository that serves it.

Reads:  --model, a checkpoint as torch2onnx.py takes it; config.pbtxt beside this file.
Writes: --output: the model "encoder" with its model.pt2 and the config that the server of this machine takes.
Run:    ./examples/pytorch_aoti/build.py
Prints: the largest error to torch, then the command that serves it.

It needs a C++ compiler (g++) and takes a minute or two.
"""

import os
import shutil
import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import PACKAGED_MODEL, make_parser
from core.files import ROOT, replace_when_done
from core.tables import EMBEDDING

HERE = Path(__file__).resolve().parent
OPTIONS = {
    # a wrong token is found inside a loop; where threads share the loop, it ends the process and not the request
    "cpp.threads": 1,
    # the shape that is recorded has no dimension of 1, and the package would refuse one when it checks its inputs
    "aot_inductor.check_lowerbound": False,
    # one compilation reads each header once; precompiled, they would stay in /tmp
    "aot_inductor.precompile_headers": False,
}
SHAPES = ((1, 1), (1, 5), (3, 16), (8, 100))  # (texts, tokens) that are compared with torch
MAX_ERROR = 1e-4  # of a vector of length 1


def load_encoder(model):
    """(module from token tensors to pooled vectors, what the checkpoint's files say of it)."""
    from tasks import heads  # it imports torch

    options = dict.fromkeys(("revision", "tokenizer", "max_length", "hidden_state", "random_weights"))
    options |= {"task": "sentence-embedding", "model": model, "seed": 0, "packaged_if_offline": False}
    module, _, card = heads.load(Namespace(**options))
    return module, card


def compile_package(module, card, path):
    """Write the module to path, a .pt2 for any batch and length."""
    import torch

    from core.checkpoint import sample_input

    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    sample = sample_input(card["inputs"], 2, 16)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own code
        program = torch.export.export(module, sample, dynamic_shapes=((axes,) * len(sample),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)


def compare(module, card, path):
    """The largest error of the package to torch, on tokens and shapes other than those it was recorded with."""
    import torch

    from core.checkpoint import sample_input

    package, errors = torch._inductor.aoti_load_package(str(path)), []
    torch.manual_seed(0)
    for batch, length in SHAPES:
        ids, mask, *others = sample_input(card["inputs"], batch, min(length, card["max_length"]))
        ids.random_(100)
        mask[1:, length // 2 :] = 0  # all but the first are padded
        with torch.inference_mode():
            errors.append(float((package(ids, mask, *others) - module(ids, mask, *others)).abs().max()))
    return max(errors)


def write_config(card, path):
    """The stock container's config in the words of Triton 2.51, which knows no platform torch_aoti."""
    from serving.configs import config_text, read_config

    config = read_config(HERE / "config.pbtxt")
    config.platform, config.backend, config.default_model_filename = "", "pytorch", "model.pt2"
    del config.input[len(card["inputs"]) :]
    config.output[0].dims[:] = [-1, *card["outputs"][EMBEDDING]]
    path.write_text(config_text(config), encoding="utf-8")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=PACKAGED_MODEL, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "build/pytorch_aoti/repository")
    args = parser.parse_args()
    if not shutil.which("g++"):
        raise SystemExit("g++: expected a C++ compiler on PATH, found none; install the package g++ of your system")
    module, card = load_encoder(args.model)
    folder = args.output / "encoder"
    with replace_when_done(folder / "1/model.pt2") as temporary, tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch  # else a copy of the package stays in /tmp
        package = Path(scratch) / "model.pt2"
        try:
            compile_package(module, card, package)
        except Exception as error:  # torch.export, AOTInductor and the compiler each raise their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SystemExit(f"{args.model}: expected a model that AOTInductor compiles, found: {reason}") from None
        if (error := compare(module, card, package)) > MAX_ERROR:
            raise SystemExit(f"{args.model}: expected torch's vectors within {MAX_ERROR:g}, found {error:.1e}")
        shutil.copyfile(package, temporary)
    write_config(card, folder / "config.pbtxt")
    print(f"AOTInductor agrees with torch: max abs error {error:.1e}")
    print(f"AOTI_RUNTIME_CHECK_INPUTS=1 ./serve.sh start --device cpu --any-repository {args.output}")


if __name__ == "__main__":
    main()
