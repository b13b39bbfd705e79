"""Find NVIDIA's perf_analyzer, or fetch it: what perf.py does before it measures.

Taken from PATH; where there is none (or only the empty package of that name), from the
tritonclient wheel that carries it, into build/perf_analyzer/; or from the SDK image.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from core.files import ROOT, replace_when_done

WHEEL = "tritonclient==2.51.0"  # later wheels no longer carry the binary
SDK_IMAGE = "nvcr.io/nvidia/tritonserver:26.05-py3-sdk"


def find_perf_analyzer(docker, shared):
    """(command, environment) of a working perf_analyzer; fetches it once where there is none.

    shared: folder that the container has to see under the same name.
    """
    if docker:
        if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
            raise SystemExit("--docker: expected a running Docker, found none; install it, or leave --docker out")
        user = f"{os.getuid()}:{os.getgid()}"
        return [
            "docker",
            "run",
            "--rm",
            "--net=host",
            f"--user={user}",
            "-v",
            f"{shared}:{shared}",
            SDK_IMAGE,
            "perf_analyzer",
        ], dict(os.environ)
    found = shutil.which("perf_analyzer")
    if found and runs(found, os.environ):
        return [found], dict(os.environ)
    folder = ROOT / "build" / "perf_analyzer"
    libraries = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    environment = dict(os.environ, LD_LIBRARY_PATH=libraries)
    binary = folder / "perf_analyzer"
    if not binary.exists():
        fetch_perf_analyzer(binary)
    link_libraries(folder)
    if not runs(binary, environment):
        raise SystemExit(
            f"{binary}: expected a program that runs, found one that does not; put perf_analyzer on PATH, or use --docker"
        )
    return [str(binary)], environment


def runs(binary, environment):
    """Whether it answers --version."""
    with contextlib.suppress(OSError):
        return subprocess.run([binary, "--version"], env=environment, capture_output=True).returncode == 0
    return False


def fetch_perf_analyzer(binary):
    """Take the program out of the tritonclient wheel."""
    print(f"fetching perf_analyzer from {WHEEL}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"perf_analyzer: expected {WHEEL} from pip, found it failing; put perf_analyzer on PATH, or use --docker"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/bin/perf_analyzer"))
            with replace_when_done(binary) as temporary:
                temporary.write_bytes(archive.read(name))
                temporary.chmod(0o755)


def link_libraries(folder):
    """Two libraries that the binary needs lie in nvidia-pytriton under hashed names."""
    spec = importlib.util.find_spec("pytriton")
    libraries = Path(spec.submodule_search_locations[0]).parent / "nvidia_pytriton.libs" if spec else Path()
    for name, pattern in {"libcudart.so.12": "libcudart-*.so.12*", "libb64.so.0d": "libb64-*.so.0d"}.items():
        for library in libraries.glob(pattern):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(library)
