"""What the shell scripts ask the tables: one line of answer a call.

Run:    python -m serving.ask build --precision FP16 --major 10    (from the project's folder)
Prints: "flags model_ONNX/1/model.onnx model_TRT_FP16/1 --fp16"

Only `source` and `manifest` read files, and nothing is written.
"""

import argparse
import json
import re
import tarfile
from pathlib import Path

from core.files import read_json, sha256
from core.tables import FURTHER, IMAGE, MODELS, PINNED_TENSORRT, PRECISIONS, REFERENCE, SERVED, model_key
from tasks.table import ALIASES, GENERATION, TASKS, served_precisions

SMS = (75, 80, 86, 89, 90, 100, 120)  # of GPUs with tensor cores: ten times the compute capability


def how_built(precision, major, typed=False, plain=False):
    """(key of the model whose graph is built, trtexec's flags, "flags" or "typed").

    TensorRT 10 takes flags; from 11 on, and with `typed`, the types in the graph are the precision. plain: the
    flags of INT8 and BEST on the reference graph.
    """
    row = PRECISIONS[precision]
    if typed or major >= 11 or not row.served:
        return model_key(precision), ("--stronglyTyped",) if major == 10 else (), "typed"
    reference = plain or row.trt10_graph == "reference"
    return REFERENCE if reference else model_key(precision), row.trt10_flags, "flags"


def build_line(args):
    """built_as, the graph and the plan's folder as they lie in a repository, then the flags."""
    key, flags, built_as = how_built(args.precision, args.major, args.typed, args.plain)
    folder = f"{MODELS[model_key(args.precision)].name}/1"
    return " ".join((built_as, f"{MODELS[key].name}/1/model.onnx", folder, *flags))


def needs_line(args):
    """What builds and executes those of the asked precisions that not every TensorRT and GPU has; "" where none is asked."""
    found = []
    for precision in (p for p in FURTHER if p in args.precisions):
        capability = round(10 * PRECISIONS[precision].capability)
        having = ", ".join(str(sm) for sm in SMS if sm >= capability)
        found.append(f"; {precision} takes TensorRT 10 or later and a GPU of SM {having}")
    return "".join(found)


def mount_option(args):
    """Value of docker's --mount for a folder; -v would take a colon in its path for a separator."""
    refused = next((c for c in ',"\n' if c in args.source), None)
    if refused:
        raise SystemExit(
            f"{args.source}: expected a path that docker run --mount can name, found {refused!r} in it; move or rename the folder"
        )
    return f"type=bind,source={args.source},target={args.target}{'' if args.writable else ',readonly'}"


def read_source(args):
    """What an image is made of: "package", "repository" or "checkpoint", the precision and the name; a repository's task."""
    path = args.model
    if path.is_file():
        return " ".join(("package", *read_package(path)))
    from core.repository import RECORD, read_card  # it imports onnx

    if not (path / RECORD).is_file() and not (path / MODELS[REFERENCE].name).is_dir():
        name = re.sub(r"[^A-Za-z0-9.]", "-", re.split("[/:]", str(path))[-1])
        return f"checkpoint {REFERENCE} {name}"
    card = read_card(path)
    service = card.get("service") or {}
    if not service.get("name"):
        raise SystemExit(f"{path}: expected a record that says what is served, found none; run torch2onnx.py")
    return f"repository {service['precision']} {service['name']} {card['task']}"


def read_package(path):
    """(precision, name) of a package of verdicts.py, from the manifest.json in its only folder."""
    try:
        with tarfile.open(path) as archive:  # a plan in the package has a manifest.json too, further down
            member = next(m for m in archive if m.name.count("/") == 1 and m.name.endswith("/manifest.json"))
            manifest = json.load(archive.extractfile(member))
        return manifest["model"].removeprefix("TRT_"), manifest["name"]
    except (OSError, tarfile.TarError, StopIteration, ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(
            f"{path}: expected a package of verdicts.py, found another file; name a checkpoint, a repository or a package"
        ) from None


def check_manifest(args):
    """The name in an unpacked package's manifest; exits unless its files are those that the manifest names."""
    path = args.folder / "manifest.json"
    manifest = read_json(path, "pack it again: ./verdicts.py package")
    noted = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(noted, dict):
        raise SystemExit(f"{path}: expected the files of a package, found none; pack it again: ./verdicts.py package")
    found = {str(p.relative_to(args.folder)): p for p in args.folder.rglob("*") if p.is_symlink() or p.is_file()}
    del found[path.name]
    for name in sorted(noted.keys() | found.keys()):
        if name not in found or found[name].is_symlink() or sha256(found[name]) != noted.get(name):
            raise SystemExit(
                f"{args.folder / name}: expected the files that the package's manifest names, found another or none; "
                "its native code would be run: get the package again from where it was made"
            )
    return manifest["name"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        required=True,
        metavar="image | tensorrt | precisions | further | models | build | needs | mount | source | manifest",
    )
    for name, answer in (
        ("image", IMAGE),
        ("tensorrt", PINNED_TENSORRT),
        ("precisions", " ".join(SERVED)),
        ("further", " ".join(FURTHER)),
    ):
        commands.add_parser(name).set_defaults(run=lambda _, answer=answer: answer)
    models = commands.add_parser("models", help="what a service of a task may be served in")
    models.add_argument("task", choices=(*TASKS, *GENERATION, *ALIASES))
    models.set_defaults(run=lambda args: " ".join(served_precisions(args.task)))
    build = commands.add_parser("build", help="how trtexec makes a plan: built_as, graph, folder, flags")
    build.add_argument("--precision", choices=(*SERVED, *FURTHER), required=True)
    build.add_argument("--major", type=int, required=True, help="TensorRT's major version")
    build.add_argument("--typed", action="store_true")
    build.add_argument("--plain", action="store_true")
    build.set_defaults(run=build_line)
    needs = commands.add_parser("needs", help="what the further ones of some precisions need")
    needs.add_argument("precisions", nargs="+", choices=(*SERVED, *FURTHER))
    needs.set_defaults(run=needs_line)
    mount = commands.add_parser("mount", help="the value of docker's --mount")
    mount.add_argument("source")
    mount.add_argument("target")
    mount.add_argument("--writable", action="store_true")
    mount.set_defaults(run=mount_option)
    source = commands.add_parser("source", help="what an image is made of: kind, precision, name")
    source.add_argument("model", type=Path)
    source.set_defaults(run=read_source)
    manifest = commands.add_parser("manifest", help="hold an unpacked package against its manifest")
    manifest.add_argument("folder", type=Path)
    manifest.set_defaults(run=check_manifest)
    return parser.parse_args()


def main():
    args = parse_args()
    print(args.run(args))


if __name__ == "__main__":
    main()
