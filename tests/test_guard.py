"""HAProxy in front: what serve.sh --guard refuses, and deploy/haproxy.cfg as it stands before strangers."""

import contextlib
import gzip
import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import tritonclient.grpc
from conftest import ROOT, free_ports, run
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
GENERATE, ONE = "/v2/models/tiny/generate", json.dumps({"TEXT": "a text"}).encode()
CONFIG = ROOT / "deploy/haproxy.cfg"


@contextlib.contextmanager
def guarded(tiny, *options, **limits):
    """A server behind its guard; limits are the guard's environment."""
    http_port, grpc, metrics = free_ports(3)
    ports = ("--http-port", http_port, "--grpc-port", grpc, "--metrics-port", metrics, "--drain-s", 5)
    options = ("--device", "cpu", "--model-repository", tiny.repository, "--guard", *options)
    try:
        done = run("serve.sh", "start", *options, *ports, env=os.environ | limits)
        assert done.returncode == 0, done.stderr
        yield SimpleNamespace(http=http_port, grpc=grpc)
    finally:
        run("serve.sh", "stop", "--http-port", http_port)
        left = subprocess.run(["ps", "-wweo", "stat,args"], capture_output=True, text=True).stdout.splitlines()
        marks = (f"serve/{http_port}/haproxy.pid", f"triton-{http_port}-")
        assert not [line for line in left if any(mark in line for mark in marks) and line[0] != "Z"]


@pytest.fixture(scope="module")
def service(tiny):
    with guarded(tiny) as found:
        yield found


def ask(port, body=ONE, path=GENERATE, timeout_s=30, **headers):
    """Status of a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("POST", path, body, headers, encode_chunked="Transfer-Encoding" in headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_good_requests_pass_over_both_protocols(service):
    assert ask(service.http) == 200
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{service.grpc}") as client:
        assert client.is_server_ready() and client.get_model_metadata("tiny").name == "tiny"


@pytest.mark.parametrize(
    "body, headers, status",
    [
        (b'{"TEXT": "' + b"a" * 600_000 + b'"}', {}, 413),
        (gzip.compress(ONE), {"Content_Encoding": "gzip"}, 400),
        ([b"{"] * 1000, {"Transfer_Encoding": "chunked"}, 400),
    ],
    ids=["a large body", "a compressed body", "a body in chunks"],
)
def test_a_body_that_could_cost_much_is_refused_before_triton_sees_it(service, body, headers, status):
    assert ask(service.http, body, **headers) == status
    assert ask(service.http) == 200


def test_a_client_that_sends_nothing_is_let_go(service):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.http, timeout=20)) as connection:
        connection.putrequest("POST", GENERATE)
        connection.putheader("Content-Length", "100")
        connection.endheaders()
        assert connection.getresponse().status == 408


def test_above_its_limit_it_refuses_at_once_and_is_well_again_after(tiny):
    with guarded(tiny, IN_FLIGHT="4") as service:
        ends, found = time.monotonic() + 4, []

        def ask_on():
            while time.monotonic() < ends:
                started = time.monotonic()
                found.append((ask(service.http), time.monotonic() - started))

        threads = [threading.Thread(target=ask_on) for _ in range(48)]
        for thread in threads:
            thread.start()
        assert run("serve.sh", "status", "--http-port", service.http).returncode == 0  # busy is not ill
        for thread in threads:
            thread.join()
        assert {status for status, _ in found} == {200, 429}  # every request got one or the other
        assert sorted(seconds for _, seconds in found)[len(found) * 99 // 100] < 4
        time.sleep(1)
        assert ask(service.http) == 200


def test_a_server_that_is_gone_behind_its_guard_is_not_called_healthy(tiny):
    with guarded(tiny) as service:
        listing = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
        mark = f"shm-region-prefix-name=triton-{service.http}-"
        (pid,) = [int(line.split()[0]) for line in listing if "bin/tritonserver" in line and mark in line]
        os.kill(pid, 9)
        time.sleep(1)
        assert run("serve.sh", "status", "--http-port", service.http).returncode == 1


def test_a_guard_that_is_gone_comes_back_with_the_server(tiny):
    with guarded(tiny, "--supervise") as service:
        subprocess.run(["pkill", "-KILL", "-f", f"^haproxy .*serve/{service.http}/haproxy.pid"], check=True)
        ends = time.monotonic() + 40
        while time.monotonic() < ends and not answers(service.http):
            time.sleep(0.5)
        assert answers(service.http)


def answers(port):
    with contextlib.suppress(OSError):
        return ask(port) == 200
    return False


def test_strangers_need_a_token_and_reach_inference_only(service):
    http_port, grpc = free_ports(2)
    places = {"BIND": http_port, "SERVER": service.http, "GRPC_BIND": grpc, "GRPC_SERVER": service.grpc}
    places = {name: f"127.0.0.1:{port}" for name, port in places.items()}
    refused = subprocess.run(["haproxy", "-f", CONFIG], env=os.environ | places, capture_output=True, text=True)
    assert refused.returncode and "TOKEN: expected the environment to name it" in refused.stderr
    proxy = subprocess.Popen(["haproxy", "-f", CONFIG], env=os.environ | places | {"TOKEN": "secret"})
    try:
        time.sleep(1)
        token = {"Authorization": "Bearer secret"}
        assert ask(http_port, **token) == 200
        assert (
            ask(http_port) == ask(http_port, Authorization="Bearer ") == ask(http_port, Authorization="Bearer x") == 401
        )
        for path in ("/v2/repository/index", "/v2/models/tiny/config", "/v2/logging", "/v2/models/../logging"):
            assert ask(http_port, path=path, **token) == 403, path
        with tritonclient.grpc.InferenceServerClient(places["GRPC_BIND"]) as client:
            assert client.is_server_live(headers={"authorization": "Bearer secret"})
            with pytest.raises(InferenceServerException):
                client.get_model_config("tiny", headers={"authorization": "Bearer secret"})
            with pytest.raises(InferenceServerException):
                client.is_server_live()
    finally:
        proxy.terminate()
        proxy.wait()


def test_a_guard_that_is_not_installed_is_named(tiny, tmp_path):
    for tool in ("bash", "dirname", "realpath", "mkdir", "sed", "flock", "cut", "python3", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    http_port = free_ports(1)[0]
    options = ("--device", "cpu", "--model-repository", tiny.repository, "--guard", "--http-port", http_port)
    done = run("serve.sh", "start", *options, env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 1 and "expected haproxy on PATH" in done.stderr
