"""Which machine, which versions, which code: the record in every file under results/."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from core.files import ROOT, slug


def environment_record():
    """Machine, versions and code state of this run, for every file under results/.

    Of an absolute path in the arguments only the name is recorded: where it lay is nobody's business.
    """
    return {
        "argv": [Path(arg).name if Path(arg).is_absolute() else arg for arg in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _command("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "dirty": _dirty(),
        "cpu": _cpu()[0],
        "instruction_sets": _cpu()[1],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_record(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


INSTRUCTION_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime-gpu",
    "nvidia-modelopt",
    "nvidia-pytriton",
    "tritonclient",
    "openvino",
)


def gpu_record():
    """Name, compute capability and driver of the first GPU, or None where there is none."""
    line = _command("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    if not line:
        return None
    return dict(zip(("name", "compute_capability", "driver"), line.splitlines()[0].split(", "), strict=True))


def _command(*argv):
    """First output of a command without its line end, or None where it cannot be had."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _dirty():
    """Whether code or configs differ from the commit; None outside a checkout."""
    # results/ and the two generated texts change by measuring, so they do not count
    exclude = [f":!{name}" for name in ("results", "report.md", "README.md")]
    argv = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *exclude]
    try:
        return bool(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu():
    """(name with family and model, instruction sets that decide how fast and how exact INT8 and BF16 are).

    A virtual machine may call two processors by one name; only family and model tell them apart.
    """
    with contextlib.suppress(OSError, KeyError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        found = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
        name = f"{found['model name']}, family {found['cpu family']}, model {found['model']}"
        return name, [flag for flag in INSTRUCTION_SETS if flag in found["flags"].split()]
    return platform.machine(), []


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def results_folder(results, card):
    """Where a model's results of this machine lie: a measurement elsewhere never overwrites them."""
    gpu = gpu_record()
    machine = gpu["name"] if gpu else f"{_cpu()[0]} {len(os.sched_getaffinity(0))} cores"
    return Path(results) / card["slug"] / slug(machine)
