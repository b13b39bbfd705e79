#!/usr/bin/env python3
"""Write what results/ holds into the marked blocks of report.md and README.md.

Reads:  results/<model>/quality.json, quality.csv, perf.json, plans.json,
        compile.json, tune.json, complexity.json, sensitivity.json, sts.json; of a classifier
        verdicts.json, verdicts.csv, training.json.
Writes: the text between <!-- begin NAME --> and <!-- end NAME --> in report.md and
        README.md, pictures beside the data they show.
Run:    ./report.py
Prints: the table of results. --check writes nothing and fails if a text or picture is
        not what the data gives.
"""

import argparse
import re
import sys
from pathlib import Path

from core.files import RESULTS, ROOT, read_json, replace_when_done
from reporting.complexity import block_complexity
from reporting.pictures import PICTURES, picture_is_current, save_picture
from reporting.tables import BLOCKS
from reporting.verdicts import block_verdicts

FILES = ("quality", "perf", "plans", "compile", "tune", "complexity", "sensitivity", "sts", "verdicts")


def load_results(folder):
    """[{slug, card and one record per name of FILES}] of every model, real weights first.

    A missing file is None, and so is one of another export than the first that is there:
    measurements of two exports are not put side by side.
    """
    models = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []:
        data = {}
        for name in FILES:
            file = path / f"{name}.json"
            data[name] = read_json(file, "run the script that writes it again") if file.exists() else None
        card = next((record["model"] for record in data.values() if record), None)
        if not card:
            continue
        for name, record in data.items():
            # None: complexity.py counted a model that was not exported
            found = record and record["model"].get("reference_sha256")
            if found and card.get("reference_sha256") not in (None, found):
                print(f"{path / name}.json: of another export than the other files, left out", file=sys.stderr)
                data[name] = None
        models.append({"slug": path.name, "folder": path, "card": card} | data)
    if not models:
        raise SystemExit(f"{folder}: expected results of at least one model, found none; run ./run.sh")
    return sorted(models, key=lambda m: m["card"]["weights"] != "real")


def fill_blocks(path, texts):
    """Content of a Markdown file with its marked blocks replaced; exits on a missing end or an unknown name."""

    def replace(match):
        name = match[1]
        if name not in texts:
            raise SystemExit(f"{path}: expected a block of {', '.join(texts)}, found {name}; correct the marker")
        return f"<!-- begin {name} -->\n\n{texts[name]}\n\n<!-- end {name} -->"

    content = path.read_text(encoding="utf-8")
    begins = re.findall(r"<!-- begin (\w+) -->", content)
    ends = re.findall(r"<!-- end (\w+) -->", content)
    lost = [name for name in texts if path == ROOT / "report.md" and name not in begins]
    if not begins or begins != ends or lost:
        raise SystemExit(
            f"{path}: expected pairs of <!-- begin NAME --> and <!-- end NAME -->, found {begins} and {ends}{' without ' + ', '.join(lost) if lost else ''}; restore the markers"
        )
    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", replace, content, flags=re.DOTALL)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text or picture is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[ROOT / "report.md", ROOT / "README.md"],
        help="files with marked blocks",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    models = load_results(args.results)
    encoders = [m for m in models if m["card"].get("task") != "classification"]
    searched = [m for m in models if m in encoders or m["sensitivity"]]
    texts = {name: block(encoders) for name, block in BLOCKS.items()}
    texts |= {"complexity": block_complexity(encoders), "verdicts": block_verdicts(models)}
    texts["sensitivity"] = BLOCKS["sensitivity"](searched)
    stale = []
    for model in models:
        for name, (kind, _, _) in PICTURES.items():
            if model[kind] and not picture_is_current(model, name):
                stale.append(model["folder"] / name)
                if not args.check:
                    save_picture(model, name)
    for path in args.report:
        content = fill_blocks(path, texts)
        if content != path.read_text(encoding="utf-8"):
            stale.append(path)
            if not args.check:
                with replace_when_done(path) as temporary:
                    temporary.write_text(content, encoding="utf-8")
    if args.check and stale:
        raise SystemExit(
            f"expected texts and pictures made from {args.results}, found others in {', '.join(map(str, stale))}; run ./report.py"
        )
    print(
        f"{', '.join(p.name for p in args.report)}: as the data in {args.results} gives them"
        if args.check
        else texts["results"]
    )


if __name__ == "__main__":
    main()
