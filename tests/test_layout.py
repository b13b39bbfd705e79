"""The house itself: what lies at the top, the arrows between modules, the length of files, and how fast -h answers."""

import ast
import os
import subprocess

import pytest
from conftest import ROOT, run

FLOORS = {"core": 0, "tasks": 1, "serving": 2, "precision": 2, "roofline": 2, "verdict": 3, "reporting": 3, "bench": 3}
TOP = 4  # scripts


def tracked(*patterns):
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("no checkout: git does not list the files")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def modules():
    """{dotted name: names of the project's modules that it imports, also inside functions}."""
    paths = [p for p in tracked("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", "model_repository")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    found = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        found[name] = imported & names.keys()
    return found


def test_at_the_top_lies_what_a_person_runs_or_reads():
    assert len({path.relative_to(ROOT).parts[0] for path in tracked()}) <= 37


def test_no_file_is_too_long_to_read():
    assert not [p for p in tracked("*.py") + tracked("*.sh") if len(p.read_text().splitlines()) > 300]


def test_imports_make_no_circle_and_point_downwards():
    imports = modules()
    up = [(a, b) for a, found in imports.items() for b in found if floor(a) < floor(b) or floor(a) == floor(b) == TOP]
    assert not up
    while imports:
        ends = {name for name, found in imports.items() if not found & imports.keys()}
        assert ends, f"a circle among {sorted(imports)}"
        imports = {name: found for name, found in imports.items() if name not in ends}


# a locale whose characters are ASCII alone, as in a container without one
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def floor(name):
    return FLOORS.get(name.split(".")[0], TOP)


@pytest.mark.timing
@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]), ids=lambda path: path.name)
def test_help_comes_before_heavy_packages(path):
    before = os.times()
    done = run(path.relative_to(ROOT), "-h", env=os.environ | ASCII)
    after = os.times()
    assert done.returncode == 0 and "usage:" in done.stdout
    # processor time: others may have the processors meanwhile
    assert sum(after[2:4]) - sum(before[2:4]) < 2
