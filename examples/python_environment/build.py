#!/usr/bin/env python3
"""Build a repository whose models run with packages, and one with a Python, that are not the server's.

Reads:  model.py, config.pbtxt and requirements.txt beside this file.
Writes: --output: own_packages with its environment as a folder, own_packages_packed with the same as an archive, and
        own_python with an environment of --other-python and the stub of that version.
Run:    ./examples/python_environment/build.py --other-python python3.12
Prints: a line for each model, then the command that serves them.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import make_parser
from core.files import ROOT
from serving.environments import make_environment, run

HERE = Path(__file__).resolve().parent
MODELS = ("own_packages", "own_packages_packed", "own_python")
REQUIREMENTS = HERE / "requirements.txt"
STUB = "triton_python_backend_stub"


def write_model(folder, environment):
    """model.py and config.pbtxt with this name, and with the environment's name in the model's folder."""
    (folder / "1").mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "model.py", folder / "1")
    config = (HERE / "config.pbtxt").read_text(encoding="utf-8")
    config = config.replace('"own_packages"', f'"{folder.name}"').replace("/environment", f"/{environment}")
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")


def copy_stub(version, folder):
    """The stub for another Python than the server's; the pip package has those of several versions."""
    package = importlib.util.find_spec("pytriton")
    places = package.submodule_search_locations if package else ["pytriton"]
    stub = Path(places[0]) / "tritonserver/python_backend_stubs" / version / STUB
    if not stub.is_file():
        raise SystemExit(f"{stub}: expected the stub for Python {version}, found none; build one as README.md says")
    shutil.copy(stub, folder)


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/python_environment/repository")
    parser.add_argument(
        "--other-python", help="command of a Python of another version; without it there is no own_python"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    output = args.output.resolve()
    if output.exists() and {path.name for path in output.iterdir()} - set(MODELS):
        raise SystemExit(
            f"--output {output}: expected a new folder or one of this script, found others' files; name another"
        )
    # an environment has its own path in its scripts, so it is made where it is to stay
    folder, packed, python = (output / name for name in MODELS)
    write_model(folder, "environment")
    version = make_environment(folder / "environment", REQUIREMENTS)
    print(f"{folder.name}: Python {version}, a folder")
    write_model(packed, "environment.tar.gz")
    pack = [folder / "environment/bin/venv-pack", "--force", "--prefix", folder / "environment"]
    run(*pack, "--output", packed / "environment.tar.gz")
    print(f"{packed.name}: Python {version}, an archive")
    if args.other_python:
        write_model(python, "environment")
        other = make_environment(python / "environment", REQUIREMENTS, python=args.other_python)
        if other != version:
            copy_stub(other, python)
        print(f"{python.name}: Python {other}, a folder")
    print(f"./serve.sh start --device cpu --any-repository {args.output}")


if __name__ == "__main__":
    main()
