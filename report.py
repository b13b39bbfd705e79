#!/usr/bin/env python3
"""Write what results/ holds into the marked blocks of report.md and README.md, and into tables of each model.

Reads:  results/<slug>/<machine>/: the records that reporting/findings.py names (KINDS) and training.json, each of which is
        written by the script that measured it; for pictures quality.csv and verdicts.csv too.
Writes: the text between <!-- begin NAME --> and <!-- end NAME --> in report.md and README.md; beside the data
        tables.md, every table of that model on that machine, and pictures.
Run:    ./report.py
Prints: the table of results. --check writes nothing and fails if a text or picture is not what the data gives
        or was drawn by older code.
"""

import re
import sys
from pathlib import Path

from core.arguments import make_parser
from core.files import RESULTS, ROOT, read_json, replace_when_done
from reporting.findings import KINDS
from reporting.markdown import DETAILS, is_encoder
from reporting.records import read_record
from reporting.sections import blocks, details


def read_folder(folder):
    """{card, folder and one record per name of KINDS} of a model on a machine; None without measurements.

    A missing file is None, and so is one of another export than the first that is there: measurements of two
    exports are not put side by side.
    """
    data = {name: read_record(folder / f"{name}.json") for name in KINDS}
    card = next((record["model"] for record in data.values() if record), None)
    for name, record in data.items():
        # None: complexity.py counted a model that was not exported
        found = record and record["model"].get("reference_sha256")
        if found and card.get("reference_sha256") not in (None, found):
            print(f"{folder / name}.json: of another export than the other files, left out", file=sys.stderr)
            data[name] = None
    return card and {"slug": folder.parent.name, "machine": folder.name, "folder": folder, "card": card} | data


def load_results(results):
    """One entry per model and machine that has measurements, real weights first."""
    for path in results.glob("*/*.json"):
        raise SystemExit(
            f"{path}: expected results of each machine in a folder of its own, found the layout of an older version; "
            f"remove the files in {path.parent} and measure again with ./run.sh"
        )
    models = [m for m in map(read_folder, sorted(p for p in results.glob("*/*") if p.is_dir())) if m]
    if not models:
        raise SystemExit(f"{results}: expected results of at least one model, found none; run ./run.sh")
    trained = [read_json(path, "run train_classifier.py again") for path in sorted(results.glob("*/*/training.json"))]
    trainings = {r["weights_sha256"]: r for r in trained if r.get("weights_sha256")}
    for m in models:
        weights = "" if m["card"]["weights"] == "real" else f" ({m['card']['weights'].split(',')[0]} weights)"
        weights += " at dynamic length" if is_encoder(m) and not m["card"].get("fixed_length", True) else ""
        m["title"] = f"{m['card']['name']}{weights}"
        m["training"] = trainings.get(m["card"].get("weights_sha256"))
        m["padded"] = fixed_twin(m, models)
    return sorted(models, key=lambda m: m["card"]["weights"] != "real")


def fixed_twin(model, models):
    """Of an encoder at dynamic length: the same at fixed length on that machine; else None."""
    if not is_encoder(model) or model["card"].get("fixed_length", True):
        return None
    twin = model["slug"].removesuffix("-dynamic"), model["machine"]
    return next((m for m in models if (m["slug"], m["machine"]) == twin), None)


def fill_blocks(path, texts):
    """Content of a Markdown file with its marked blocks replaced; exits on a missing or an unknown marker."""
    content = path.read_text(encoding="utf-8")
    begins, ends = (re.findall(rf"<!-- {word} (\w+) -->", content) for word in ("begin", "end"))
    needed = texts.keys() - {"summary"} if path == ROOT / "report.md" else {}  # the summary is README's alone
    if not begins or begins != ends or not set(needed) <= set(begins) <= set(texts):
        raise SystemExit(
            f"{path}: expected pairs of <!-- begin NAME --> and <!-- end NAME --> with the names {', '.join(texts)}, "
            f"found {begins} and {ends}; restore the markers"
        )

    def replace(match):
        return f"<!-- begin {match[1]} -->\n\n{texts[match[1]]}\n\n<!-- end {match[1]} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", replace, content, flags=re.DOTALL)


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text or picture is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    own = [ROOT / "report.md", ROOT / "README.md"]
    parser.add_argument("--report", type=Path, nargs="+", default=own, help="files with marked blocks")
    return parser.parse_args()


def main():
    args = parse_args()
    # here: matplotlib takes a second, which --help does not wait for
    from reporting.pictures import PICTURES, picture_is_current, save_picture

    models = load_results(args.results)
    texts = blocks(models)
    pictures = {m["folder"] / f"{kind}.png": (m, kind) for m in models for kind in PICTURES if m[kind]}
    pictures = {path: of for path, of in pictures.items() if not picture_is_current(*of, path)}
    contents = {m["folder"] / DETAILS: details(m) for m in models}
    contents |= {path: fill_blocks(path, texts) for path in args.report}
    contents = {p: text for p, text in contents.items() if not p.exists() or p.read_text(encoding="utf-8") != text}
    if args.check and (pictures or contents):
        raise SystemExit(
            f"expected texts and pictures made from {args.results} by this code, found others in "
            f"{', '.join(map(str, [*pictures, *contents]))}; run ./report.py"
        )
    for path, of in pictures.items():
        save_picture(*of, path)
    for path, content in contents.items():
        with replace_when_done(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"{', '.join(p.name for p in args.report)}: as {args.results} gives them" if args.check else texts["results"])


if __name__ == "__main__":
    main()
