"""embed.py on Ray: what is killed goes on, nothing is lost, nothing is there twice, and nobody else can reach it."""

import os
import shutil
import subprocess
import time

import psutil
import pytest
from conftest import ROOT, free_ports
from embed_packages import python  # noqa: F401
from test_embed_jobs import read_answers, write_rows

from bench import processes
from bench.embed_speed import vary
from core.files import TEXTS, read_texts
from serving import bulk_run

ROWS = 16_000
GIVE_UP_S = 240  # of a busy machine; a quiet one needs a tenth


@pytest.fixture
def start(python, tiny, tmp_path):  # noqa: F811
    """A function that starts the same job each time, in a session of its own, and gives its process."""
    source = write_rows(tmp_path / "texts.jsonl", [(text,) for text in vary(read_texts(TEXTS), ROWS)])
    command = [
        python,
        ROOT / "embed.py",
        "--input",
        source,
        "--output",
        tmp_path / "out",
        "--repository",
        tiny.repository,
    ]
    started = []

    def begin(*options, **environment):
        others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(
                [*map(str, command), *map(str, options)], stdout=subprocess.PIPE, stderr=log, text=True,
                env=others | environment, start_new_session=True,
            )  # fmt: skip
        started.append(processes.Server(process, {}, tmp_path / "log", 0))
        return process

    yield begin
    for each in started:  # Ray's agents outlive a driver that is killed by a minute
        processes.end(each)


def parts(tmp_path):
    return sorted(tmp_path.glob("out/part-*.parquet"))


def wait_parts(tmp_path, process, count):
    """Until so many pieces have their file."""
    ends = time.monotonic() + GIVE_UP_S
    while len(parts(tmp_path)) < count and time.monotonic() < ends and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None and len(parts(tmp_path)) >= count, (tmp_path / "log").read_text()


def tree(process):
    return psutil.Process(process.pid).children(recursive=True)


def test_after_kills_of_driver_and_worker_no_row_is_lost_and_none_is_there_twice(start, tmp_path):
    driver = start()
    wait_parts(tmp_path, driver, 1)
    driver.kill()
    driver.wait()
    done = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    driver = start()
    wait_parts(tmp_path, driver, len(done) + 2)
    family = tree(driver)
    listening = {
        c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    }  # with the workers' own
    workers = [p for p in family if "MapWorker" in " ".join(p.cmdline())]
    workers[0].kill()
    out, _ = driver.communicate(timeout=GIVE_UP_S)
    assert driver.returncode == 0, (tmp_path / "log").read_text()
    assert f"{ROWS} rows in 16 files, 0 with an error" in out and "of them in this run" in out
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert done.items() <= {path: path.stat().st_mtime_ns for path in parts(tmp_path)}.items()
    assert [row["id"] for row in read_answers(tmp_path / "out")] == [f"texts.jsonl:{i}" for i in range(ROWS)]
    assert len(list((tmp_path / "out").iterdir())) == 17  # the record, and nothing half written


@pytest.mark.skipif(not os.environ.get("EXAMPLES"), reason="a cluster takes a minute more: ./test.sh --examples")
def test_the_same_command_runs_on_a_cluster(python, start, tmp_path):  # noqa: F811
    (port,) = free_ports(1)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_TMPDIR": f"/tmp/ray-{port}"} | bulk_run.LOOPBACK
    command = [python.replace("python", "ray"), "start", "--head", "--block", "--port", port, "--num-cpus", 2]
    command += ["--object-store-memory", 100_000_000, "--include-dashboard", "false"]
    with open(tmp_path / "cluster.log", "wb") as log:
        head = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=os.environ | given, start_new_session=True
        )
    try:
        ends = time.monotonic() + GIVE_UP_S
        while "--block" not in (tmp_path / "cluster.log").read_text() and time.monotonic() < ends:
            time.sleep(0.2)
        driver = start(RAY_ADDRESS=f"127.0.0.1:{port}", **given)
        out, _ = driver.communicate(timeout=GIVE_UP_S)
        assert driver.returncode == 0, (tmp_path / "log").read_text()
        assert f"{ROWS} rows in 16 files, 0 with an error" in out
    finally:
        processes.end(processes.Server(head, {}, tmp_path / "cluster.log", 0))
        shutil.rmtree(given["RAY_TMPDIR"], ignore_errors=True)
