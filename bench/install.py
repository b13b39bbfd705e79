"""The peers' own environments: build/bench/<requirements>/venv, which see the project's packages too.

So torch is there once, and every peer that takes it runs the same; what a peer pins otherwise lies before it.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from core.files import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements"
BUILD = ROOT / "build" / "bench"


def python_of(requirements):
    """The interpreter of a file of requirements; None: that which runs this."""
    return BUILD / requirements / "venv" / "bin" / "python" if requirements else Path(sys.executable)


def is_installed(requirements):
    """Whether the environment is there and made of the present file."""
    if requirements is None:
        return True
    done = BUILD / requirements / "installed.txt"
    return done.is_file() and done.read_bytes() == (REQUIREMENTS / f"{requirements}.txt").read_bytes()


def install(requirements):
    """Make the environment of a file of requirements; returns None, or why it failed: pip's last line."""
    folder = BUILD / requirements
    source = REQUIREMENTS / f"{requirements}.txt"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
    python = python_of(requirements)
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(source)]
    with open(folder / "install.log", "w", encoding="utf-8") as log:
        code = subprocess.run(pip, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = [
            line
            for line in (folder / "install.log").read_text(encoding="utf-8").splitlines()
            if line.startswith("ERROR")
        ]
        return f"pip: {lines[-1] if lines else f'exit {code}'}"
    # only now: an interrupted installation is done again
    (folder / "installed.txt").write_bytes(source.read_bytes())
    return None


def versions(requirements):
    """{package: version} of what matters to a peer's answer, as its interpreter sees it; {} without one."""
    if not python_of(requirements).exists():
        return {}
    code = f"""
import importlib.metadata as m
for name in {packages(requirements)!r}:
    try: print(name, m.version(name))
    except m.PackageNotFoundError: pass
"""
    done = subprocess.run([str(python_of(requirements)), "-c", code], capture_output=True, text=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    if "onnxruntime" in found:  # of both, the peer's own lies before the project's
        found.pop("onnxruntime-gpu", None)
    return found


COMMON = ("torch", "transformers", "tokenizers", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")


def packages(requirements):
    """Names in a file of requirements, and what most peers stand on."""
    lines = (
        (REQUIREMENTS / f"{requirements}.txt").read_text(encoding="utf-8").splitlines()
        if requirements
        else ["nvidia-pytriton"]
    )
    names = [line.split("=")[0].split("[")[0].split("<")[0].strip() for line in lines if line[:1].isalpha()]
    return [*names, *(name for name in COMMON if name not in names)]
