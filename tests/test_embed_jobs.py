"""Jobs of embed.py without Ray: every task's answers are its server's, bad input ends in one line, a job goes on."""

import errno
import json
import re
import time

import numpy as np
import pytest
from conftest import free_ports, link_copy, run_here, start_server, succeed
from embed_packages import python  # noqa: F401

import embed
from core.files import TEXTS, read_json, read_texts
from serving import bulk_run, bulk_worker
from serving.repository import write_repository
from tasks.examples import examples
from tasks.table import TASKS


def write_rows(path, rows, columns=("text",)):
    """JSONL of tuples."""
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


def read_answers(folder):
    """Rows of all files, in their order."""
    from pyarrow import parquet

    return parquet.read_table(folder).to_pylist()


def write_parquet(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=1000)
    return path


@pytest.fixture
def here(python, monkeypatch):  # noqa: F811
    """embed.py in this process: a worker without Ray takes the pieces one by one."""

    def work(job, left, workers, address, stall_s):
        job["graph"] = job["graph"] and job["graph"] | {"cores": 1}
        worker = bulk_worker.Worker(job)
        for report in (report for number in left for report in worker({"piece": [number]})):
            if report["failure"][0]:
                raise SystemExit(report["failure"][0])

    monkeypatch.setattr(bulk_run, "run", work)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return lambda *options: run_here(embed, *options)


# --- answers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services(repositories, tiny):
    """{task: repository}, and the server of all of them."""
    found = repositories | {"classification": tiny.repository}
    done, (http, grpc) = start_server(*found.values())
    assert done.returncode == 0, done.stderr
    yield found, f"127.0.0.1:{grpc}"
    succeed("serve.sh", "stop", "--http-port", http)


def alike(one, other):
    """Whether two values are the same but for rounding."""
    if isinstance(one, float | list):
        return np.allclose(one, other, atol=1e-4)
    if isinstance(one, str) and one.startswith("[{"):  # entities
        one, other = ([(e["label"], e["text"]) for e in json.loads(found)] for found in (one, other))
    return one == other


def test_every_task_answers_as_its_server(services, here, tmp_path):
    repositories, url = services
    for task, repository in repositories.items():
        card = read_json(repository / "model.json", "")
        columns = [name.lower() for name in TASKS[task].takes]
        texts = [t if isinstance(t, tuple) else (t,) for t in examples(card, read_texts(TEXTS)[:60])]
        bad = ("x" * 600_000,) * len(columns)
        source = write_rows(tmp_path / f"{task}.jsonl", [*texts, bad, *texts[:3]], columns)
        found = []
        for name, options in (("own", ()), ("served", ("--url", url))):
            output = tmp_path / f"{task}-{name}"
            done = here("--input", source, "--output", output, "--repository", repository, *options)
            assert done.returncode == 0 and "64 rows in 1 files, " in done.stdout, done.stderr
            found.append(read_answers(output))
        own, served = found
        assert [row["id"] for row in own] == [f"{task}.jsonl:{i}" for i in range(64)]
        assert list(own[0]) == ["id", *bulk_worker.outputs_of(card), "error"]
        answers = [{name: row[name] for name in row if name not in ("id", "error")} for row in (*own, *served)]
        for one, other in [
            *zip(answers[:64], answers[64:], strict=True),
            *zip(answers[61:64], answers[:3], strict=True),
        ]:
            assert all(alike(one[name], other[name]) for name in one), (task, one, other)
        for rows in found:
            assert "expected at most" in rows[60]["error"]
            failed = [i for i, row in enumerate(rows) if row["error"]]
            assert failed == [i for i, answer in enumerate(answers[:64]) if not any(answer.values())]


def test_ids_of_every_kind_and_pieces_that_cross_row_groups(here, tiny, tmp_path):
    texts = read_texts(TEXTS) * 10
    ids = {"numbers": list(range(len(texts))), "strings": [f"n{i}" for i in range(len(texts))]}
    for kind, values in ids.items():
        write_parquet(tmp_path / kind / "a.parquet", id=values[:1500], text=texts[:1500])
        write_parquet(tmp_path / kind / "b.parquet", text=texts[1500:], id=values[1500:])
        (tmp_path / kind / "_SUCCESS").touch()
        options = ("--output", tmp_path / f"{kind}-out", "--repository", tiny.repository)
        done = here("--input", tmp_path / kind, *options, "--id-column", "id")
        assert done.returncode == 0 and f"{len(texts)} rows in 4 files, 0 with" in done.stdout, done.stderr
        assert 0 < float(re.search(r"padding ([\d.]+)% of the positions", done.stdout)[1]) < 10
        rows = read_answers(tmp_path / f"{kind}-out")
        assert [row["id"] for row in rows] == values
        assert rows[0]["LOGITS"] == pytest.approx(rows[-len(read_texts(TEXTS))]["LOGITS"], abs=1e-5)
    record = read_json(tmp_path / "numbers-out" / "_embed.json", "")
    assert record["settings"]["weights_sha256"] and record["environment"]["bulk_packages"]["ray"]


# --- going on -----------------------------------------------------------------------------


@pytest.fixture
def job(here, tiny, tmp_path):
    """(function that runs a job of four pieces with further options, its output)."""
    source = write_rows(tmp_path / "texts.jsonl", [(text,) for text in read_texts(TEXTS) * 16])
    options = ("--input", source, "--output", tmp_path / "out")
    return lambda *more: here(*options, *(more or ("--repository", tiny.repository))), tmp_path / "out"


def test_the_same_command_goes_on_where_the_disk_was_full(job, tmp_path, monkeypatch):
    from pyarrow.parquet import ParquetWriter

    run, output = job
    written, write = [], ParquetWriter.write_table

    def fill_up(self, table):
        written.append(1)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(ParquetWriter, "write_table", fill_up)
        done = run()
    assert done.returncode == 1 and "texts.jsonl: [Errno 28] No space left on device" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == [
        "_embed.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    (output / ".part-000003.parquet.killed.tmp").touch()
    before = (output / "part-000001.parquet").stat().st_mtime_ns
    done = run()
    assert done.returncode == 0 and "2048 of them in this run" in done.stdout, done.stderr
    assert (output / "part-000001.parquet").stat().st_mtime_ns == before and len(list(output.iterdir())) == 5
    assert [row["id"] for row in read_answers(output)] == [f"texts.jsonl:{i}" for i in range(4096)]
    assert "done before" in run().stdout


def test_another_job_is_refused_in_the_same_folder(job, tiny, tmp_path):
    run, output = job
    assert run().returncode == 0
    other = link_copy(tiny.repository, tmp_path / "other")
    card = read_json(other / "model.json", "")
    (other / "model.json").write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    done = run("--repository", other)
    assert done.returncode == 1 and "expected a job whose weights_sha256 is 0000" in done.stderr
    write_repository(other, threshold={"label": "good", "value": 0.5})
    (other / "model.json").write_text((other / "model.json").read_text().replace("0" * 64, card["weights_sha256"]))
    assert "expected a job whose threshold is" in run("--repository", other).stderr
    done = run("--repository", tiny.repository, "--text-column", "words")
    assert "expected a job whose text_columns is ['words'], found one with ['text']" in done.stderr
    with open(tmp_path / "texts.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert "expected a job whose input_bytes is" in run().stderr
    (output / "_embed.json").write_text("[]")
    assert "expected the record of a job" in run().stderr


# --- bad input ----------------------------------------------------------------------------


def make_inputs(folder):
    """Files that no job can read, by name."""
    write_parquet(folder / "good.parquet", id=[1, 2], text=["a", "b"])
    write_parquet(folder / "twice" / "a.parquet", id=[1, 2], text=["a", "b"])
    write_parquet(folder / "twice" / "b.parquet", id=[3, 2], text=["a", "b"])
    write_parquet(folder / "types" / "a.parquet", id=[1], text=["a"])
    write_parquet(folder / "types" / "b.parquet", id=["1"], text=["a"])
    write_parquet(folder / "numbers.parquet", text=[1, 2])
    write_parquet(folder / "holes.parquet", id=[1, None], text=["a", "b"])
    (folder / "broken.parquet").write_bytes((folder / "good.parquet").read_bytes()[:-20])
    (folder / "empty.csv").touch()
    (folder / "header.csv").write_text("text,id\n")
    (folder / "other.csv").write_text("sentence,id\na,1\n")
    (folder / "other.jsonl").write_text('{"sentence": "a"}\n')
    (folder / "mixed").mkdir()
    for name in ("a.csv", "b.jsonl"):
        (folder / "mixed" / name).write_text("text\n")
    inside = write_parquet(folder / "inside.parquet", text=[f"{i} {hash(str(i))}" for i in range(9000)])
    content = bytearray(inside.read_bytes())
    content[100_000:100_400] = bytes(255 - byte for byte in content[100_000:100_400])
    inside.write_bytes(content)


BAD = {
    "twice --id-column id": "b.parquet:1: expected an id of its own in id, found 2 of a.parquet:1 again",
    "types --id-column id": "b.parquet: expected id of type int64 as in a.parquet, found string",
    "numbers.parquet": "numbers.parquet: expected texts in text, found int64",
    "holes.parquet --id-column id": "holes.parquet:1: expected an id in id, found none",
    "broken.parquet": "broken.parquet: expected a Parquet file, found: ",
    "inside.parquet": "inside.parquet: ",
    "empty.csv": "empty.csv: expected rows, found an empty file",
    "header.csv": "--input: expected at least one row, found none in 1 files",
    "other.csv": "other.csv: expected a column text, found sentence, id",
    "other.jsonl": "other.jsonl: expected a column text, found sentence",
    "mixed": "expected files of one of .parquet, .csv, .jsonl, found .csv, .jsonl",
    "nowhere": "expected a folder or files, found none",
    "good.parquet --id-column key": "good.parquet: expected a column key, found id, text",
    "good.parquet --output /dev/null/out": "--output /dev/null/out: expected a folder to write to, found: ",
    "good.parquet --output .": "expected an empty folder, found ",
    "good.parquet --url 127.0.0.1:9": "127.0.0.1:9: expected tiny on a Triton server (grpc), found",
    "types --output types/out": "--output types/out: expected a folder outside of --input, found one in it",
}


def test_what_makes_a_job_impossible_is_said_in_one_line(here, tiny, tmp_path, monkeypatch):
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for number, (options, message) in enumerate(BAD.items()):
        given = ["--repository", tiny.repository, "--output", f"out-{number}", "--input", *options.split()]
        done = here(*given)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("reading ")]
        assert done.returncode == 1 and len(lines) == 1 and message in lines[0], (options, done)
        assert not list(tmp_path.glob(f"out-{number}/.part*")), options


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_not_reached_is_said_within_seconds(python, tiny, tmp_path, monkeypatch, address):  # noqa: F811
    write_rows(tmp_path / "a.jsonl", [("a",)])
    monkeypatch.setenv("RAY_ADDRESS", address.format(*free_ports(1)))
    began = time.monotonic()
    done = run_here(embed, "--input", tmp_path, "--output", tmp_path / "o", "--repository", tiny.repository)
    assert done.returncode == 1 and "expected a Ray cluster, found: [Errno 111] Connection refused" in done.stderr
    assert time.monotonic() - began < 10 and not (tmp_path / "o").exists()
