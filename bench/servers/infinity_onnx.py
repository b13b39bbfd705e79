"""infinity with its ONNX engine on a checkpoint in a folder: exports it first, then is infinity's own command.

Called as: infinity_onnx.py CHECKPOINT COPY [infinity's arguments]. The copy gets the graphs, also the one that
infinity's optimizer writes beside the model; the checkpoint itself stays as it is.
"""

import shutil
import sys
from pathlib import Path


def export(checkpoint, copy):
    """A copy of the checkpoint with model.onnx in it, unless that was made before."""
    from optimum.exporters.onnx import main_export

    if not (copy / "model.onnx").is_file():
        shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
        main_export(str(copy), output=copy, task="text-classification", do_validation=False)


def main():
    checkpoint, copy, *sys.argv[1:] = map(str, sys.argv[1:])
    export(checkpoint, Path(copy))
    from infinity_emb.cli import cli
    from infinity_emb.transformer.classifier import optimum

    find = optimum.get_onnx_files
    # it hands on an absolute path as the name of a file in the model's folder, and optimum finds none of that name
    optimum.get_onnx_files = lambda **options: find(**options).relative_to(copy)
    cli()


if __name__ == "__main__":
    main()
