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
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_record(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


PACKAGES = ("torch", "transformers", "onnx", "onnxruntime-gpu", "nvidia-modelopt", "nvidia-pytriton", "tritonclient")


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


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def results_folder(results, card):
    """Where a model's results of this machine lie: a measurement elsewhere never overwrites them."""
    gpu = gpu_record()
    machine = gpu["name"] if gpu else f"{_cpu_name()} {len(os.sched_getaffinity(0))} cores"
    return Path(results) / card["slug"] / slug(machine)
