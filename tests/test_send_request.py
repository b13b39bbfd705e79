"""send_request.py against the real server: a classifier, and models in Python with every kind of input and answer."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from any_models import serve_any
from conftest import ROOT, free_ports, run, succeed

SCRIPT = [sys.executable, str(ROOT / "send_request.py")]
MIXED_INPUTS = ("-m", "mixed", "-i", "QUESTION:CONTEXT:NUMBERS")


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """{protocol: url} of a server with the tiny classifier and the two of any_models.py."""
    http, grpc = serve_any(tiny.repository, tmp_path_factory.mktemp("send") / "models")
    yield {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    succeed("serve.sh", "stop", "--http-port", http)


@pytest.fixture(params=["http", "grpc"])
def server(served, request):
    """Options that reach the server over each protocol."""
    return ("--protocol", request.param, "-u", served[request.param])


def send(server, *options, **others):
    return run("send_request.py", *server, *options, **others)


def answer(server, *options, **others):
    """What it printed, as a list of lines; nothing failed."""
    done = send(server, *options, **others)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


# --- answers ---------------------------------------------------------------------------


def test_a_lone_text_gets_its_answer_in_the_order_that_was_asked_for(server):
    ((label, score),) = (line.split("\t") for line in answer(server, "-m", "tiny", "-o", "LABEL:SCORE", "a film"))
    assert label in ("bad", "good") and 0.5 < float(score) < 1
    assert answer(server, "-m", "tiny", "-i", "TEXT", "-o", "SCORE", "-o", "LABEL", "a film") == [f"{score}\t{label}"]
    assert answer(server, "-m", "tiny", "a film")[0].startswith(f"{label}\t{score}\t")  # all outputs


def test_texts_come_from_arguments_a_file_or_standard_input_and_stand_before_their_answers(server, tmp_path):
    texts = ["a film", "", "ein schöner Film 🙂", "tab\there"]
    (tmp_path / "texts.txt").write_text("\r\n".join(texts) + "\r\n")
    options = ("-m", "tiny", "-o", "LABEL:SCORE")
    lines = answer(server, *options, *texts)
    assert [line.rsplit("\t", 2)[0] for line in lines] == texts
    assert answer(server, *options, "--file", tmp_path / "texts.txt", "--batch-size", 3) == lines
    assert answer(server, *options, "-", input="\n".join(texts)) == lines
    assert answer(server, *options, "-", input="a film\n") == lines[:1]


def test_json_has_the_text_all_digits_and_letters_as_they_are(server):
    (line,) = answer(server, "-m", "tiny", "-o", "LABEL:SCORE", "--parameter", "top_k=2", "--json", "schön")
    found = json.loads(line)
    assert "schön" in line and found["TEXT"] == "schön" and sorted(found["LABEL"]) == ["bad", "good"]
    assert sum(found["SCORE"]) == pytest.approx(1, abs=1e-6) and len(str(found["SCORE"][0])) > 6
    (plain,) = answer(server, "-m", "tiny", "-o", "LABEL:SCORE", "--parameter", "top_k=2", "schön")
    assert plain == ",".join(found["LABEL"]) + "\t" + ",".join(f"{score:.4g}" for score in found["SCORE"])


def test_inputs_of_every_type_and_parameters_arrive_as_they_are_meant(server):
    parameters = {"a": 3, "b": True, "c": 0.5, "d": "text", "e": "3", "f": "[1]", "g": "x=y"}
    given = [f"--parameter={key}={json.dumps(value) if key in 'abce' else value}" for key, value in parameters.items()]
    options = (*MIXED_INPUTS[:3], "QUESTION:CONTEXT:NUMBERS:FLAG:BYTE", "--json", *given)
    found = json.loads(answer(server, *options, "is\tthis is\t[1, 2.5, 3]\ttrue\t255")[0])
    assert found["CONTEXT"] == "this is" and found["SUM"] == 6 and found["INSIDE"] is True
    assert found["HALF"] == [[0.33333334, 0.8333333, 1.0], [None] * 3]  # JSON has no infinity
    seen = {"NUMBERS": [1, 2.5, 3], "FLAG": [True], "BYTE": [255], "parameters": parameters}
    assert json.loads(found["SEEN"]) == seen
    assert answer(server, *MIXED_INPUTS, "-o", "SUM:INSIDE", "--stream", "no\tthis\t[1,2,3]") == ["6\tfalse"]


# --- streams ----------------------------------------------------------------------------


def test_a_stream_prints_each_piece_when_it_comes(server):
    command = [*SCRIPT, *server, "-m", "words", "-o", "PIECE", "--stream", "eins wait zwei"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 100)  # what there is, while the model waits
        rest = process.stdout.read()
    assert first == b"eins " and rest == b"wait zwei \n" and process.returncode == 0
    lines = answer(server, "-m", "words", "-o", "PIECE", "--stream", "eins zwei", "drei")
    assert lines == ["eins zwei\teins zwei ", "drei\tdrei "]


def test_a_stream_of_several_outputs_has_a_line_for_each_piece(server):
    options = ("-m", "words", "-i", "TEXT:WEIGHTS", "--stream", "--parameter", "limit=2", "eins zwei drei\t[0.5, 0.5]")
    assert answer(server, *options) == ["eins \t0.3333", "zwei \t0.3333"]
    lines = [json.loads(line) for line in answer(server, *options, "--json", "-o", "SHARE")]
    assert lines == [{"TEXT": "eins zwei drei", "WEIGHTS": "[0.5, 0.5]", "SHARE": 0.33333334}] * 2


def test_without_stream_the_pieces_are_one_answer(server):
    assert answer(server, "-m", "words", "eins zwei") == ["eins zwei \t0.3333,0.3333"]
    (line,) = answer(server, "-m", "words", "--json", "")
    assert json.loads(line) == {"TEXT": "", "PIECE": "", "SHARE": []}  # no piece at all
    (line,) = answer(server, "-m", "words", "--json", "eins")
    assert json.loads(line) == {"TEXT": "eins", "PIECE": "eins ", "SHARE": 0.33333334}


# --- around them -------------------------------------------------------------------------


def test_statistics_count_this_command_s_requests_of_the_model_and_its_steps(server):
    done = send(server, "-m", "tiny", "-o", "LABEL", "--batch-size", 2, "--statistics", "a", "b", "c")
    heading, titles, *rows = (line.split() for line in done.stderr.splitlines())
    assert done.returncode == 0 and titles[:4] == ["model", "requests", "failed", "executions"]
    assert [row[0] for row in rows] == ["tiny", "model_ONNX", "postprocess", "tokenizer"]
    for _, requests, failed, executions, batch, *times in rows:
        assert (requests, failed, executions, batch) == ("2", "0", "2", "1.50")
        assert len(times) == 4 and all(float(time) >= 0 for time in times)
    assert float(rows[1][7]) > 0  # the graph computed
    done = send(server, "-m", "words", "--statistics", "eins fail", "eins")
    assert done.stderr.splitlines()[-1].split()[:3] == ["words", "2", "0"], done.stderr


def test_progress_is_shown_on_a_terminal(served, tmp_path):
    (tmp_path / "texts.txt").write_text("a film\n" * 40)
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [*SCRIPT, "-u", served["http"], "-m", "tiny", "--file", tmp_path / "texts.txt", "--batch-size", "8"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=its_end, check=True, timeout=60)
    assert b"40/40" in os.read(terminal, 10000)
    for end in (terminal, its_end):
        os.close(end)


def test_a_reader_that_has_enough_ends_it_quietly(server, tmp_path):
    (tmp_path / "texts.txt").write_text("a film\n" * 3000)
    command = [*SCRIPT, *server, "-m", "tiny", "--file", tmp_path / "texts.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 0 and process.stderr.read() == b""


@pytest.mark.parametrize(
    "options",
    [
        ("-m", "words", "--stream", "eins", "wait"),
        ("-m", "words", "eins", "wait"),
        (*MIXED_INPUTS, "a\tb\t[1,2,3]", "wait\tb\t[1,2,3]"),
        ("-m", "tiny", "-"),
    ],
    ids=["stream", "joined stream", "request", "standard input"],
)
def test_control_c_ends_it_without_a_traceback(server, options):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*SCRIPT, *server, *options], **pipes) as process:
        process.stdin.write(b"a film\n")
        process.stdin.flush()
        assert process.stdout.readline()  # the first text is answered, it waits for the second
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b""


# --- errors -------------------------------------------------------------------------------


def test_texts_that_fail_are_named_and_the_others_are_answered(server, tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"one\n\xff broken\nthree\n")
    done = send(server, "-m", "tiny", "-o", "LABEL", "--batch-size", 3, "--file", tmp_path / "texts.txt")
    assert done.returncode == 1 and [line.split("\t")[0] for line in done.stdout.splitlines()] == ["one", "three"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("text 2: ") and "expected UTF-8" in line

    done = send(server, *MIXED_INPUTS, "-o", "SUM", "\tb\t[1,2,3]", "a\tb\t[1,2,3]", "a\tb", "a\tb\t[1,2]")
    assert done.returncode == 1 and done.stdout == "a\tb\t[1,2,3]\t6\n"
    assert done.stderr.splitlines() == [
        "text 1: expected a question, found none",  # the server's words, in one line
        "text 3: expected 3 values with a TAB between (QUESTION, CONTEXT, NUMBERS), found 2",
        "text 4: NUMBERS: expected FP32 [3], found '[1,2]'",
    ]
    for stream, shown in ((("--stream",), ["eins fail\teins ", "zwei\tzwei "]), ((), ["zwei\tzwei "])):
        done = send(server, "-m", "words", "-o", "PIECE", *stream, "eins fail", "fail", "zwei")
        assert done.returncode == 1 and done.stdout.splitlines() == shown
        assert done.stderr == "text 1: told to fail\ntext 2: told to fail\n"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("FLAG", ["1", '"true"', "yes", "[true, false]"]),
        ("BYTE", ["256", "-1", "1.5", "true", "1e40", "9" * 30]),
        ("NUMBERS", ["1", '["1", 2, 3]', "[1, [2], 3]", "[1, 2, 1e39]", "[[1, 2, 3]]", "[1, 2, NaN]", "{}"]),
    ],
)  # fmt: skip
def test_a_value_that_its_input_cannot_hold_is_refused(served, name, values):
    inputs = f"QUESTION:CONTEXT:NUMBERS:{name}" if name != "NUMBERS" else "QUESTION:CONTEXT:NUMBERS"
    start = "a\tb\t[1,2,3]\t" if name != "NUMBERS" else "a\tb\t"
    done = send(("-u", served["http"]), "-m", "mixed", "-i", inputs, *(start + value for value in values))
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == len(values)
    for number, (line, value) in enumerate(zip(lines, values, strict=True), 1):
        assert line.startswith(f"text {number}: {name}: expected ") and line.endswith(f"found {value!r}")


def test_no_answer_in_time_is_said(server):
    for options in (("-m", "words", "wait"), (*MIXED_INPUTS, "wait\tb\t[1,2,3]")):
        done = send(server, *options, "--timeout-s", 0.5)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr == "text 1: expected an answer within 0.5 s (--timeout-s), found none\n"


ALL = "mixed, model_ONNX, postprocess, tiny, tokenizer, words"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "other", "x"), f"--model: expected one of the server's {ALL}; found other"),
        (("-m", "tiny", "-i", "TEXTS", "x"), "--input: expected names of TEXT BYTES [1]; found TEXTS"),
        (("-m", "words", "-o", "PIECE:NO", "x"), "--output: expected names of PIECE BYTES [1], SHARE FP32 [1]; found NO"),
        (("-m", "words", "-o", "PIECE:PIECE", "x"), "--output: expected each name once, found PIECE:PIECE"),
        (("-m", "mixed", "x"), "NUMBERS FP32 [3], FLAG BOOL [1], BYTE UINT8 [1] (these may be left out: FLAG, BYTE); found none; e.g. -i QUESTION:CONTEXT:NUMBERS"),
        (("-m", "mixed", "-i", "QUESTION:FLAG", "x"), "found QUESTION:FLAG; e.g. -i QUESTION:CONTEXT:NUMBERS"),
        (("-m", "tiny", "--batch-size", 9, "x"), "--batch-size: expected at most 8 (tiny, max_batch_size 8), found 9"),
        (("-m", "mixed", "-i", "QUESTION:CONTEXT:NUMBERS", "--batch-size", 2, "x"), "expected at most 1 (mixed, max_batch_size 0), found 2"),
        (("-m", "words", "--batch-size", 2, "x"), "expected at most 1 (words, which answers in pieces), found 2"),
        (("-m", "tiny", "--file", "/no/file"), "--file /no/file: expected a text file, found No such file or directory"),
    ],
)  # fmt: skip
def test_a_name_or_number_that_does_not_fit_is_refused_with_what_there_is(server, options, message):
    done = send(server, *options)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_where_no_server_answers_one_line_says_so(served, protocol):
    other = served["grpc" if protocol == "http" else "http"]  # the port of the other protocol
    for url in (f"127.0.0.1:{free_ports(1)[0]}", other):
        done = send(("--protocol", protocol, "-u", url), "-m", "tiny", "x")
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and f"--url {url}: expected a Triton server ({protocol}), found: " in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", ":8000"])
def test_a_url_is_host_and_port(url):
    done = run("send_request.py", "-u", url, "-m", "tiny", "x")
    assert done.returncode == 1 and done.stderr.startswith(f"--url: expected HOST:PORT, found {url};")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected either texts, --file or -"),
        (("x", "--file", "texts.txt"), "expected either texts, --file or -"),
        (("x", "--parameter", "top_k"), "--parameter: expected KEY=VALUE, found top_k"),
        (("x", "--parameter", "=3"), "--parameter: expected KEY=VALUE, found =3"),
        (("x", "--parameter", "priority=3"), "found priority; reserved: sequence_id, "),
        (("x", "--parameter", f"a={2**63}"), f"expected an integer of 64 bits, found {2**63}"),
        (("x", "--batch-size", "0"), "--batch-size: expected more than 0, found 0"),
        (("x", "--timeout-s", "nan"), "--timeout-s: expected more than 0, found nan"),
    ],
)
def test_bad_usage_is_refused_before_anything_is_asked(options, message):
    done = run("send_request.py", "-m", "tiny", *options)
    assert done.returncode == 2 and message in done.stderr
