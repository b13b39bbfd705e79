"""tests/soak.py and tests/failover.py, shortly and on a tiny service: nothing is wrong or lost, and both can fail."""

import json
import os
import shutil

import onnx
import pytest
from conftest import free_ports, run, start_server, succeed
from onnx import numpy_helper


@pytest.fixture(scope="module")
def served(tiny):
    done, (http, _) = start_server(tiny.repository)
    assert done.returncode == 0, done.stderr
    yield f"127.0.0.1:{http}"
    succeed("serve.sh", "stop", "--http-port", http)


def soak(url, repository, results, seconds):
    options = ("--seconds", seconds, "--clients", 4, "--results", results)
    return run("tests/soak.py", "--repository", repository, "--url", url, *options)


def test_a_minute_of_good_and_bad_requests(served, tiny, tmp_path):
    done = soak(served, tiny.repository, tmp_path, 60)
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("*/*/soak.json")
    found = json.loads(path.read_text())["runs"]["FP32"]
    assert set(found["outcomes"]) == {"good, right", "bad, refused"} and min(found["outcomes"].values()) > 100
    (_, first), *_, (_, last) = found["memory_mib"]
    assert first > 50 and last < first + 60


def test_answers_of_another_graph_are_found_wrong(served, tiny, tmp_path):
    other = shutil.copytree(tiny.repository, tmp_path / "other")
    path = other / "model_ONNX/1/model.onnx"
    graph = onnx.load(path)
    head = next(i for i in graph.graph.initializer if i.name == graph.graph.node[-1].input[1])
    head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), head.name))
    onnx.save(graph, path)
    done = soak(served, other, tmp_path, 5)
    assert done.returncode == 1 and "good requests wrong" in done.stdout


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
def test_servers_behind_a_balancer_lose_nothing_that_is_asked_for_again(tiny, tmp_path):
    port, quick = free_ports(33)[0], [] if os.environ.get("EXAMPLES") else ["--quick"]
    options = ("--repository", tiny.repository, "--http-port", port, "--hang-s", 4, "--results", tmp_path)
    done = run("tests/failover.py", *options, *quick)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/*/failover.json")
    faults = json.loads(path.read_text())["faults"]
    assert len(faults) == (2 if quick else 5) and all(row["requests"] > 20 for rows in faults.values() for row in rows)
    assert not any(row["lost"] for row in faults["all restarted, each drained first"])
