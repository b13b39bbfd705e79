"""serve.sh: starting and stopping the real server, from any folder, on this machine only."""

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

from conftest import ROOT, free_ports, run, start_server, succeed

from core import tables

# 127.0.0.1, and the same as an IPv6 address, as the kernel writes them
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")


def listening(port):
    """Addresses on which something listens on a port, in the kernel's notation."""
    lines = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    fields = [line.split() for line in lines]
    return {f[1] for f in fields if f[1].endswith(f":{port:04X}") and f[3] == "0A"}


def test_it_starts_answers_and_stops_from_any_folder_and_is_on_loopback_only(tiny, tmp_path):
    for name in ("core", "serving", "numpy", "onnx", "model", "onnx_runtime"):  # none of them is to be taken
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shutil.copytree(tiny.repository, tmp_path / "my:tiny")
    http, grpc, metrics = free_ports(3)
    ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    options = ("start", "--device", "cpu", "--model-repository", "my:tiny", *ports)
    done = run("serve.sh", *options, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    try:
        body = {"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a text"]}]}
        url = f"http://127.0.0.1:{http}/v2/models/tiny/infer"
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as response:
            outputs = {o["name"] for o in json.loads(response.read())["outputs"]}
        assert {"LABEL", "SCORE"} <= outputs
        for port in (http, grpc, metrics):
            assert listening(port) and listening(port) <= {f"{address}:{port:04X}" for address in LOOPBACK}
    finally:
        stopped = run("serve.sh", "stop", "--http-port", http, cwd=tmp_path, env=environment)
    assert stopped.returncode == 0 and "stopped" in stopped.stdout


def test_a_port_in_use_is_named_and_nothing_is_started(tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        http, metrics = free_ports(2)
        grpc = taken.getsockname()[1]
        ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
        done = run("serve.sh", "start", "--device", "cpu", "--model-repository", tiny.repository, *ports)
    assert done.returncode == 1 and f"port {grpc}" in done.stderr
    assert run("serve.sh", "status", "--http-port", http).returncode == 1


def test_a_model_that_does_not_load_ends_the_server_and_shows_why(tiny, tmp_path):
    folder = shutil.copytree(tiny.repository, tmp_path / "tiny")
    path = folder / "tokenizer/1/model.py"
    path.write_text(
        path.read_text().replace(
            "def initialize(self, args):", "def initialize(self, args):\n        raise ValueError('planted')"
        )
    )
    done, (http, _) = start_server(folder, path="ensemble")
    assert done.returncode == 1 and "planted" in done.stderr
    assert run("serve.sh", "status", "--http-port", http).returncode == 1
    assert str(http) not in processes()


def test_stop_ends_only_its_own_server():
    (other,) = free_ports(1)
    state = ROOT / "build/serve" / str(other)
    state.mkdir(parents=True)
    try:
        with subprocess.Popen(["sleep", "60"]) as sleeper:
            # a pid of the past, taken over by another program since
            (state / "server.pid").write_text(f"{sleeper.pid} 1\n")
            assert "no server" in succeed("serve.sh", "stop", "--http-port", other).stdout
            assert sleeper.poll() is None
            sleeper.kill()
    finally:
        shutil.rmtree(state)


def test_ctrl_c_in_run_leaves_nothing_behind(tiny, tmp_path):
    http, grpc, metrics = map(str, free_ports(3))
    command = [str(ROOT / "serve.sh"), "run", "--device", "cpu", "--model-repository", str(tiny.repository)]
    command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("ready"):
            break
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(timeout=60) != 0
        assert http not in processes()
    finally:
        subprocess.run([ROOT / "serve.sh", "stop", "--http-port", http], capture_output=True)


def test_the_readme_shows_the_docker_command_that_serve_sh_runs():
    script = "source ./serve.sh; has_gpu() { true; }; parse_args start --device gpu; prepare_gpu; printf '%s ' \"${server[@]}\""
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tables.IMAGE in done.stdout
    command = done.stdout.replace(str(ROOT), "$PWD").split()
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ").replace('"', "")
    assert " ".join(command) in " ".join(readme.split())


def test_the_container_of_a_service_mounts_its_repository_alone(tiny, tmp_path):
    script = 'source ./serve.sh; has_gpu() { true; }; parse_args start --device gpu --model-repository "$1"; prepare_gpu; printf \'%s \' "${server[@]}"'
    argv = ["bash", "-c", script, "bash"]
    done = subprocess.run([*argv, tiny.repository], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("--mount") == 1
    assert f"--mount type=bind,source={tiny.repository},target=/models,readonly" in done.stdout
    done = subprocess.run([*argv, "/data/a,b"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "/data/a,b: expected a path" in done.stderr


def test_unknown_command_is_bad_usage():
    assert run("serve.sh", "restart").returncode == 2
    assert run("serve.sh", "start", "--device", "tpu").returncode == 2


def processes():
    """Command lines of all running tritonservers."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return "\n".join(line for line in listing.splitlines() if "tritonserver" in line)
