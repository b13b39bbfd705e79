"""tasks/README.md and examples/*/README.md: every block marked console is executed in a copy of the project, and its
answers compared.

Blocks that train for minutes or install a package run with EXAMPLES=1 only: ./test.sh --examples.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, copy_project, free_ports

PAGE = ROOT / "tasks/README.md"
SLOW = ("pip install", "examples/")
NUMBER = re.compile(r"-?\d+\.\d+(e-?\d+)?")


def read_blocks(page):
    """{heading: [(command, lines of its answer)]} of the blocks marked console."""
    blocks = {}
    for section in page.read_text(encoding="utf-8").split("\n## ")[1:]:
        found = re.search(r"```console\n(.*?)```", section, re.S)
        for line in found[1].splitlines() if found else ():
            steps = blocks.setdefault(section.splitlines()[0], [])
            if line.startswith("$ "):
                steps.append((line[2:], []))
            else:
                steps[-1][1].append(line)
    return blocks


BLOCKS = read_blocks(PAGE)
EXAMPLES = {
    p.parent.name: steps for p in sorted(ROOT.glob("examples/*/README.md")) for steps in read_blocks(p).values()
}
# a Python of another version is beside this one where pyenv or uv put it
PYTHONS = [str(path) for path in sorted(Path(sys.base_prefix).parent.glob("*/bin"))]


def with_ports(command, ports):
    """The command with the test's own ports."""
    options = " ".join(f"--{name}-port {port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True))
    command = re.sub(r"(serve\.sh start)", rf"\1 {options}", command)
    command = re.sub(r"(serve\.sh stop)", rf"\1 --http-port {ports[0]}", command)
    command = re.sub(r"(send_request\.py)", rf"\1 -u 127.0.0.1:{ports[0]}", command)
    return command.replace("127.0.0.1:8000", f"127.0.0.1:{ports[0]}")


def alike(found, expected, tolerance):
    """Whether two answers have the same words, and numbers that differ by at most the tolerance."""
    numbers = [[float(m[0]) for m in NUMBER.finditer(text)] for text in (found, expected)]
    words = [NUMBER.sub("#", text) for text in (found, expected)]
    return words[0] == words[1] and all(abs(a - b) <= tolerance for a, b in zip(*numbers, strict=True))


def follow(steps, project, ports):
    """Execute steps in a copy of the project; each has to succeed, and to answer what the page says."""
    path = ":".join([f"{project / '.venv/bin'}", *PYTHONS, os.environ["PATH"]])
    environment = dict(os.environ, PATH=path, HF_HUB_OFFLINE="1")
    # two trainings of the same seed differ: the order of sums depends on the processor and on what else it does
    tolerance = 0.2 if any("train_" in command for command, _ in steps) else 0.02
    for command, expected in steps:
        done = subprocess.run(
            with_ports(command, ports), shell=True, cwd=project, env=environment, capture_output=True, text=True, timeout=1800
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-2000:]}"
        if expected:
            assert alike(done.stdout.strip(), "\n".join(expected), tolerance), done.stdout


@pytest.mark.parametrize("heading", [*BLOCKS, *EXAMPLES])
def test_the_page_shows_what_is_answered(heading, tmp_path):
    steps = (BLOCKS | EXAMPLES)[heading]
    if any(word in command for command, _ in steps for word in SLOW) and not os.environ.get("EXAMPLES"):
        pytest.skip("installs a package or trains for minutes; ./test.sh --examples")
    project, ports = copy_project(tmp_path), free_ports(3)
    stop = with_ports("./serve.sh stop", ports)
    try:
        follow(steps, project, ports)
    finally:
        subprocess.run(stop, shell=True, cwd=project, capture_output=True)


def test_every_task_has_a_section_with_an_answer():
    from tasks.table import GENERATION, OWN, TASKS

    page = PAGE.read_text(encoding="utf-8")
    assert all(f"--task {task} " in page for task in (*TASKS, *GENERATION) if task != OWN)
    assert all(any(answer for _, answer in steps) for steps in BLOCKS.values())
