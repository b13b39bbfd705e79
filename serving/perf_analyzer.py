"""NVIDIA's perf_analyzer: find it where perf.py says, or fetch it into build/perf_analyzer/, and run it for a given
number of requests.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections import namedtuple
from pathlib import Path

from core.files import ROOT, replace_when_done
from core.tables import SDK_IMAGE

WHEEL = "tritonclient==2.51.0"  # later wheels no longer carry the binary

# container: its name, where the tool runs in one, else None
Tool = namedtuple("Tool", "command environment container")


class Refused(Exception):
    """A window that must not become a number."""


class Hung(Refused):
    """perf_analyzer did not end. With a given number of requests it sometimes waits for ever."""


# --- running it ----------------------------------------------------------------------


def run_requests(tool, options, requests, folder, timeout_s):
    """Send `requests` requests -> ([(sent, answered)] in nanoseconds, the tool's CSV). Raises Refused, Hung."""
    csv_path, times_path = folder / "window.csv", folder / "times.json"
    for path in (csv_path, times_path):
        path.unlink(missing_ok=True)
    options = [*options, "--request-count", str(requests), "--verbose-csv", "-f", str(csv_path)]
    done = run_tool(tool, [*options, "--profile-export-file", str(times_path)], timeout_s)
    if done.returncode or not csv_path.exists() or not times_path.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise Refused(f"perf_analyzer: {lines[-1]}")
    (experiment,) = json.loads(times_path.read_text(encoding="utf-8"))["experiments"]
    answered = [request for request in experiment["requests"] if request["response_timestamps"]]
    times = [(request["timestamp"], request["response_timestamps"][-1]) for request in answered]
    if len(times) != requests:
        raise Refused(f"perf_analyzer: expected {requests} requests, found {len(times)}")
    return times, csv_path.read_text(encoding="utf-8")


def run_tool(tool, options, timeout_s):
    """The finished process. Raises Hung after timeout_s; nothing of the tool goes on then, nor after Ctrl-C."""
    try:
        argv = [*tool.command, *options]
        return subprocess.run(argv, env=tool.environment, capture_output=True, text=True, timeout=timeout_s)
    except BaseException as error:
        if tool.container:  # killing docker's client leaves its container running
            subprocess.run(["docker", "rm", "--force", tool.container], capture_output=True)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Hung(f"perf_analyzer: expected it to end within {timeout_s:.0f} s, found it waiting") from None
        raise


# --- finding it ----------------------------------------------------------------------


def find_perf_analyzer(docker, shared):
    """A Tool that works; fetched once where there is none. The container sees the folder `shared` under its name."""
    if docker:
        return find_in_docker(shared)
    found = shutil.which("perf_analyzer")
    if found and runs(found, os.environ):
        return Tool([found], dict(os.environ), None)
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
    return Tool([str(binary)], environment, None)


def find_in_docker(shared):
    """perf_analyzer of the SDK image, in a container that has a name, so that it can be removed."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        raise SystemExit("--docker: expected a running Docker, found none; install it, or leave --docker out")
    name = f"perf_analyzer-{uuid.uuid4().hex[:12]}"
    command = ["docker", "run", "--rm", f"--name={name}", "--net=host", f"--user={os.getuid()}:{os.getgid()}"]
    command += ["--mount", f"type=bind,source={shared},target={shared}", SDK_IMAGE, "perf_analyzer"]
    return Tool(command, dict(os.environ), name)


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
