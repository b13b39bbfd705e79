"""run.sh: the README's first command, from a copy of the project to a filled report."""

import json
import os
import subprocess

import pytest
from conftest import copy_project, free_ports


@pytest.fixture
def copy(tmp_path):
    return copy_project(tmp_path)


def run_sh(copy, *options):
    http, grpc, metrics = map(str, free_ports(3))
    ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(copy / "cache"))
    command = ["./run.sh", *map(str, options), *ports]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900, env=environment)
    return done, http


def test_quick_run_ends_with_a_table_and_an_updated_report(copy):
    done, http = run_sh(copy, "--quick")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "WARNING" in done.stdout and "going on with all-MiniLM-L6-v2" in done.stdout
    assert "| TRT_BEST | ONNX Runtime, CPU |" in done.stdout
    records = [json.loads(path.read_text()) for path in copy.glob("results/all-MiniLM-L6-v2/*/perf.json")]
    (record,) = (record for record in records if record["quick"])
    assert len(record["rows"]) == 14
    speed = next(r for r in record["rows"] if r["model"] == "TRT_BEST" and r["concurrency"] == 8)
    row = f"| {speed['throughput_infer_per_s']:.1f} | {speed['latency_p50_ms']:.1f} / "
    assert row in done.stdout and row in (copy / "report.md").read_text()
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"--http-port={http}" not in processes


def test_a_failing_step_is_named_with_the_end_of_its_log(copy):
    done, _ = run_sh(copy, "--model", copy / "nowhere")
    assert done.returncode == 1
    assert "step export failed (exit 1)" in done.stderr and "expected a folder with a checkpoint" in done.stderr
    assert "quantize" not in done.stdout


def test_unknown_option_is_bad_usage(copy):
    done, _ = run_sh(copy, "--fast")
    assert done.returncode == 2 and "--fast" in done.stderr
