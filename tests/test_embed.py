"""The parts of embed.py that need no package of its own: rows of files, blocks, errors, tries."""

import csv
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_here
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

import embed
from core import files, runner
from core.repository import tokenizer_path
from core.tokens import load_tokenizer
from serving import bulk_answers, bulk_input, bulk_rows, bulk_worker, retry

COLUMNS = {"id": None, "texts": ["text"]}


def system_of(content):
    """As much of pyarrow's file system as text files need."""
    return SimpleNamespace(open_input_file=lambda path: io.BytesIO(content))


def rows_in_pieces(name, content, columns, piece_rows):
    system = system_of(content)
    pieces, _, _ = bulk_input.plan(system, {name: ("", len(content))}, columns, piece_rows)
    return [list(bulk_rows.read_rows(system, piece, columns)) for piece in pieces]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=30), st.integers(1, 4))
def test_a_csv_file_in_pieces_has_the_same_rows(texts, blocks):
    table = io.StringIO()
    csv.writer(table).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk_input, "BLOCK", 2)
        found = rows_in_pieces("a.csv", table.getvalue().encode(), {"id": "id", "texts": ["text"]}, 2 * blocks)
    assert all(len(piece) == 2 * blocks for piece in found[:-1])
    assert [(row["id"], row["texts"][0]) for piece in found for row in piece] == [
        (str(i), text) for i, text in enumerate(texts)
    ]


def test_a_row_that_cannot_be_read_says_why_and_the_next_one_is_read():
    lines = [b'{"text": "a"}', b'{"text": 5}', b"no JSON", b"", b'["a"]', b'{"text": null}', b'{"text": "\xff"}', b'{"text": "b"}']  # fmt: skip
    (rows,) = rows_in_pieces("a.jsonl", b"\n".join(lines), COLUMNS, 1024)
    assert [row["id"] for row in rows] == [f"a.jsonl:{i}" for i in range(len(lines))]
    assert [row.get("texts") for row in rows] == [("a",), *[None] * 6, ("b",)]
    words = ["found int 5", "expected JSON", "expected JSON", "expected a JSON object", "found none", "utf-8"]
    for number, (row, word) in enumerate(zip(rows[1:], words, strict=False), 1):
        assert row["error"].startswith(f"a.jsonl:{number}: ") and word in row["error"]
    (rows,) = rows_in_pieces("a.csv", b'text,id\na,1\n\xe9,2\nonly one\n"two\nlines",4\n', COLUMNS, 1024)
    assert [row.get("texts") for row in rows] == [("a",), None, None, ("two\nlines",)]
    assert "expected UTF-8" in rows[1]["error"] and "expected 2 fields, found 1" in rows[2]["error"]


def test_ids_are_checked_without_keeping_them():
    def check(*ids):
        content = "".join(json.dumps({"id": i, "text": "a"}) + "\n" for i in ids).encode()
        system, columns = system_of(content), {"id": "id", "texts": ["text"]}
        bulk_input.check_ids(system, bulk_input.plan(system, {"a.jsonl": ("", 1)}, columns)[0], "id")

    check(*range(3000), "a")
    with pytest.raises(SystemExit, match=r"a.jsonl:2: expected an id of its own in id, found '1' of a.jsonl:0 again"):
        check(1, 2, "1")
    with pytest.raises(SystemExit, match="a.jsonl:1: expected an id in id, found none"):
        check(1, None)


def test_blocks_are_bounded_by_rows_and_by_characters():
    rows = [{"texts": ("x" * 1000,)}] * 3000 + [{"texts": ("x" * 300_000,)}] * 2 + [{"error": ""}] * 2000
    blocks = list(bulk_worker.blocks_of(rows))
    assert [row for block in blocks for row in block] == rows and max(map(len, blocks)) == bulk_rows.BLOCK
    assert all(sum(len(r["texts"][0]) for r in b if "texts" in r) < bulk_worker.CHARACTERS + 300_000 for b in blocks)


def test_padding_is_below_a_tenth_of_the_positions(tiny):
    tokenizer = load_tokenizer(tokenizer_path(tiny.repository))
    tokenizer.no_padding()
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(files.read_texts(files.TEXTS))]
    padded = sum(len(b) * max(lengths[i] for i in b) for b in runner.padded_batches(lengths, 1))
    assert sum(lengths) > 0.9 * padded


def test_a_bad_row_fails_alone():
    asked = []

    def ask(rows):
        asked.append(len(rows))
        if "bad" in rows:
            raise ValueError("told\nto fail")
        return {"TEXT": rows}

    rows = ["good"] * 700 + ["bad"] + ["good"] * 300
    found = bulk_answers.split_errors(ask, rows)
    assert [each if isinstance(each, str) else each["TEXT"] for each in found] == [
        "told to fail" if row == "bad" else row for row in rows
    ]
    assert len(asked) < 30 and bulk_answers.split_errors(ask, []) == []


@pytest.mark.parametrize(
    ("error", "late", "tries"),
    [
        (ConnectionRefusedError(), False, 5),
        (InferenceServerException("gone", "StatusCode.UNAVAILABLE"), False, 5),
        (InferenceServerException("no server", "503"), False, 5),
        (InferenceServerException("late", "StatusCode.DEADLINE_EXCEEDED"), False, 1),
        (InferenceServerException("late", "StatusCode.DEADLINE_EXCEEDED"), True, 5),
        (TimeoutError(), False, 1),
        (InferenceServerException("bad", "StatusCode.INVALID_ARGUMENT"), True, 1),
        (InferenceServerException("bad", "400"), True, 1),
        (ValueError(), True, 1),
    ],
)
def test_only_what_may_pass_is_tried_again_and_not_for_ever(error, late, tries):
    calls, waits = [], []

    def call():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry.retry(call, late=late, sleep=waits.append)
    assert len(calls) == tries == len(waits) + 1
    assert all(0 < wait <= retry.LONGEST_WAIT_S for wait in waits) and sorted(waits) == waits


def test_the_try_that_succeeds_is_the_last():
    outcomes = iter([ConnectionResetError(), "answer", "never asked for"])

    def call():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retry.retry(call, sleep=lambda seconds: None) == "answer"


def test_a_job_that_does_not_move_any_more_gives_up():
    code = "import time; from serving.bulk_run import watch; watch([time.monotonic()], 0.5); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "expected a row within 0.5 s (--stall-s), found none" in done.stderr


def test_packages_that_are_missing_are_named_with_their_command(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    done = run_here(embed, "--input", tmp_path, "--output", tmp_path / "o", "--repository", tiny.repository)
    assert done.returncode == 1 and "pip install -r serving/requirements-embed.txt" in done.stderr


def test_the_job_for_kubernetes_gives_options_that_there_are(monkeypatch):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "deploy" / "embed.yaml").read_text())
    script, *options = job["spec"]["entrypoint"].split()
    monkeypatch.setattr(sys, "argv", [script, *options])
    args = embed.parse_args()
    assert script.endswith("/embed.py") and args.output != args.input[0]
    pinned = (ROOT / embed.REQUIREMENTS).read_text()
    assert f"ray[data]=={job['spec']['rayClusterSpec']['rayVersion']} " in pinned
    assert f"rayproject/ray:{job['spec']['rayClusterSpec']['rayVersion']}-" in (ROOT / "deploy/embed.md").read_text()
