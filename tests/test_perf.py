"""perf.py: real levels on the real server, and rows that must be refused."""

import pytest
from conftest import free_ports, run, succeed

import common
import perf

CSV = """Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,Avg latency
8,50.5,7,334,74,24,19000,277,3,19110,21159,21654,32815,19722
"""


def output(client, server):
    return (
        f"  Client: \n    Request count: {client}\n  Server: \n    Inference count: {server}\n    Execution count: 20\n"
    )


@pytest.fixture(scope="module")
def record(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perf")
    options = ("--assets", chain.assets, "--results", folder, "--concurrency", 1, 4, "--window-requests", 15)
    succeed("perf.py", "--url", chain.grpc, *options)
    return common.read_json(folder / "all-MiniLM-L6-v2/perf.json", "") | {"folder": folder / "all-MiniLM-L6-v2/perf"}


def test_every_embedder_is_measured_alone_at_every_level(record):
    assert [(r["embedder"], r["concurrency"]) for r in record["rows"]] == [
        (e, c) for e in common.EMBEDDERS for c in (1, 4)
    ]
    for row in record["rows"]:
        assert "error" not in row, row
        assert row["client_requests"] == pytest.approx(row["server_inferences"], abs=3 * row["concurrency"])
        assert 0 < row["latency_p50_ms"] <= row["latency_p90_ms"] <= row["latency_p99_ms"]
        # Little's law: requests under way = throughput x mean latency
        assert row["throughput_infer_per_s"] * row["latency_mean_ms"] / 1e3 == pytest.approx(
            row["concurrency"], rel=0.25
        )


def test_dynamic_batching_is_seen_under_load(record):
    rows = {r["concurrency"]: r for r in record["rows"] if r["embedder"] == "ONNX"}
    assert rows[1]["mean_batch_size"] == 1
    assert rows[4]["mean_batch_size"] > 1.2


def test_raw_output_is_kept(record):
    assert len(list(record["folder"].glob("*.csv"))) == len(record["rows"])


def test_a_window_that_something_else_called_into_is_refused(tmp_path):
    (tmp_path / "run.csv").write_text(CSV)
    good = perf.read_row(tmp_path / "run.csv", output(100, 100), 50)
    assert "error" not in good and good["latency_p50_ms"] == 19.11 and good["mean_batch_size"] == 5
    bad = perf.read_row(tmp_path / "run.csv", output(100, 340), 50)
    assert "client counted 100 requests, server 340" in bad["error"]


def test_no_server_is_one_clear_line(chain, tmp_path):
    (port,) = free_ports(1)
    done = run("perf.py", "--url", f"127.0.0.1:{port}", "--assets", chain.assets, "--results", tmp_path)
    assert done.returncode == 1 and "./serve.sh start" in done.stderr and "Traceback" not in done.stderr
