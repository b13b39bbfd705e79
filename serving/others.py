#!/usr/bin/env python3
"""Models that the project did not make: leave out those that would keep a server from its work, name those that it does not serve.

Reads:  model repositories; with --url the index of a running server.
Writes: --output: for each repository a folder of links to the models that may be loaded.
Run:    python -m serving.others examples/build --output build/serve/8000/others
Prints: for each repository the folder to serve; on standard error "not served: NAME: expected …, found …; do …"

Triton 2.51 waits without an end for a stub that cannot start, and after one broken archive of an environment it unpacks no
other: so environments (EXECUTION_ENV_PATH) are looked at before the start, and everything else is told afterwards by Triton.
"""

import ctypes.util
import json
import os
import re
import sys
import tarfile
import urllib.request
import zlib
from pathlib import Path

from core.arguments import make_parser
from core.files import replace_folder_when_done
from core.repository import EXPORT
from serving.configs import read_config

ENVIRONMENT, STUB = "EXECUTION_ENV_PATH", "triton_python_backend_stub"
HOST_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PACKED = "pack one, see examples/python_environment/README.md"


def read_names(environment):
    """Paths inside an environment, a folder or a packed archive; exits with what it is instead."""
    if environment.is_dir():
        found = [*environment.glob("lib/*"), *environment.glob("lib/python*/site-packages/numpy-*")]
        return [str(path.relative_to(environment)) for path in found]
    if not environment.exists():
        raise SystemExit(f"{environment}: expected an environment, found none; make it, or {PACKED}")
    try:
        with tarfile.open(environment) as archive:
            return [name.removeprefix("./") for name in archive.getnames()]
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise SystemExit(
            f"{environment}: expected a packed environment (tar.gz), found none: {reason}; {PACKED}"
        ) from None


def stub_version(folder):
    """Version of Python that a model's own stub is for; the server's own where it has none."""
    stub = folder / STUB
    found = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes()) if stub.is_file() else None
    return found[1].decode() if found else HOST_VERSION


def check_environment(environment, version):
    """Exit unless a stub for this version of Python can run in the environment."""
    names = read_names(environment)
    parts = [name.split("/") for name in names]
    versions = {
        p[1].removeprefix("python") for p in parts if p[0] == "lib" and len(p) > 1 and re.match(r"python\d", p[1])
    }
    if version not in versions:
        raise SystemExit(
            f"{environment}: expected Python {version}, as the stub has it, found {', '.join(sorted(versions)) or 'none'}; "
            f"make it with that Python, or put the stub of its version into the model's folder"
        )
    library = f"libpython{version}.so.1.0"
    if version != HOST_VERSION and f"lib/{library}" not in names and not ctypes.util.find_library(f"python{version}"):
        raise SystemExit(
            f"{environment}: expected lib/{library}, found none; link it there from that Python's lib folder"
        )
    numpy = [m[1] for name in names if (m := re.search(r"/numpy-(\d+)[^/]*\.dist-info$", name))]
    if numpy and int(numpy[0]) > 1:
        raise SystemExit(
            f"{environment}: expected numpy<2, with which the stub of Triton 2.51 works, found {numpy[0]}.x; pip install 'numpy<2' there"
        )


def check_model(folder):
    """Exit where the model's environment would stop the server, or the config is none."""
    path = folder / "config.pbtxt"
    config = read_config(path) if path.exists() else None
    if config and ENVIRONMENT in config.parameters:
        value = config.parameters[ENVIRONMENT].string_value
        environment = Path(value.replace("$$TRITON_MODEL_DIRECTORY", str(folder)))
        check_environment(environment, stub_version(folder))


def link_models(repository, output):
    """Links to the models of a repository that may be loaded; the others are named."""
    models = sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not models:
        raise SystemExit(
            f"--any-repository {repository}: expected folders of models, found none; run the example's build.py"
        )
    with replace_folder_when_done(output) as temporary:
        for folder in models:
            try:
                check_model(folder)
            except SystemExit as fault:
                print(f"not served: {folder.name}: {str(fault).removesuffix(f'; {EXPORT}')}", file=sys.stderr)
                continue
            os.symlink(folder, temporary / folder.name)


def one_line(reason):
    """Triton's reason without the stack of Python calls behind it."""
    return " ".join(reason.split("\n\nAt:")[0].split())


def name_missing(url, repositories):
    """Name each model of the repositories that the server does not serve; exits where another one is missing."""
    own = {path.name for repository in repositories for path in repository.iterdir()}
    request = urllib.request.Request(f"http://{url}/v2/repository/index", b"{}")
    with urllib.request.urlopen(request, timeout=60) as response:
        index = json.load(response)
    served = {model["name"] for model in index if model.get("state") == "READY"}
    for model in index:
        if model["name"] not in served and model.get("reason") != "unloaded":
            line = f"not served: {model['name']}: {one_line(model.get('reason', 'Triton gives no reason'))}"
            if model["name"] not in own:
                raise SystemExit(line)
            print(line, file=sys.stderr)
    if not served:
        raise SystemExit("expected a model that is served, found none; see the lines above")


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("repositories", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--url", help="HOST:PORT of the server's HTTP")
    args = parser.parse_args()
    if bool(args.output) == bool(args.url):
        parser.error("expected either --output, before the start, or --url, after it")
    return args


def main():
    args = parse_args()
    if args.url:
        return name_missing(args.url, args.repositories)
    for number, repository in enumerate(args.repositories, 1):
        folder = (args.output / str(number)).resolve()
        link_models(repository.resolve(), folder)
        print(folder)


if __name__ == "__main__":
    main()
