"""Generated text, from a tiny checkpoint to the answers of the real server, against transformers' generate()."""

import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tritonclient.grpc
from conftest import run, start_server, succeed
from tiny_generators import MAX_NEW_TOKENS, TASKS, TEMPLATE, TEXTS, make_model, make_tokenizer

from core.onnx_runtime import open_session
from core.repository import read_card
from serving.generation_speed import served_answers
from tasks import generation_check, generation_graphs


@pytest.fixture(scope="module", params=TASKS)
def served(request, generators, tmp_path_factory):
    """Each of the two tasks, exported by the script and served graph by graph, as on a GPU."""
    kind = request.param
    found = SimpleNamespace(kind=kind, repository=generators / kind, checkpoint=generators / f"{kind}-checkpoint")
    found.texts, found.results = generators / "texts.txt", tmp_path_factory.mktemp("results")
    found.printed = (generators / f"{kind}.printed").read_text()
    done, (http, grpc) = start_server(found.repository, path="ensemble")
    assert done.returncode == 0, done.stderr
    found.http, found.card = f"127.0.0.1:{http}", read_card(found.repository)
    found.client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}")
    yield found
    succeed("serve.sh", "stop", "--http-port", http)


def post(served, body, path="generate"):
    """POST as curl would; returns (status, answer as text)."""
    url = f"http://{served.http}/v2/models/{served.kind}/{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(served, text, **parameters):
    """The whole answer to one text."""
    status, answer = post(served, {"TEXT": text, "parameters": parameters})
    assert status == 200, answer
    return json.loads(answer)


def ask_pieces(served, text, **parameters):
    """The answers of a stream."""
    status, answer = post(served, {"TEXT": text, "parameters": parameters | {"stream": True}}, "generate_stream")
    assert status == 200, answer
    return [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.startswith("data: ")]


def expected_texts(served, texts, count):
    """(text, tokens) of generate() for each text, all in one batch."""
    prompts = [make_tokenizer().encode(text) for text in texts]
    tokens = generation_check.greedy_tokens(make_model(served.kind), served.card, prompts, count)
    return [(make_tokenizer().decode(row, skip_special_tokens=True), len(row)) for row in tokens]


def executions(served, model="decoder"):
    """How often the server has run a model."""
    with urllib.request.urlopen(f"http://{served.http}/v2/models/{model}/stats", timeout=60) as response:
        return json.loads(response.read())["model_stats"][0]["execution_count"]


# --- the graphs, in process ----------------------------------------------------------


def test_the_check_finds_wrong_graphs(served):
    other = make_model(served.kind, seed=1)
    graphs = generation_graphs.graphs_of(other)
    paths = {graph: served.repository / graph / "1/model.onnx" for graph in graphs}
    sessions = {graph: open_session(path) for graph, path in paths.items()}
    with pytest.raises(SystemExit, match="error to torch"):
        generation_check.check_graphs(graphs, sessions, served.card, max_error=1e-4)
    with pytest.raises(SystemExit, match="expected the tokens of generate"):
        generation_check.check_tokens(other, make_tokenizer(), served.card, sessions, TEXTS)


def test_the_export_prints_its_own_lines_alone(served):
    assert len(served.printed.splitlines()) == 4, served.printed


def test_tied_embeddings_are_stored_once(served):
    model = make_model(served.kind)
    for graph, module in generation_graphs.graphs_of(model).items():
        weights = 4 * sum(p.numel() for p in module.parameters())
        assert (served.repository / graph / "1/model.onnx").stat().st_size < weights + 100_000


# --- the service ---------------------------------------------------------------------


def test_greedy_answers_are_those_of_generate(served):
    total = 0
    for texts, count in ((TEXTS, 40), (TEXTS[:1], 100), (TEXTS[1:3], 30)):
        found = served_answers(served.client, served.kind, count, texts)
        assert found == expected_texts(served, texts, count)
        total += sum(tokens for _, tokens in found)
    assert total >= 160  # 300 and more with both models


def test_in_one_process_the_answers_are_the_same(served):
    done, (http, grpc) = start_server(served.repository)
    try:
        assert done.returncode == 0 and "one pass, ONNX Runtime, FP32" in done.stderr, done.stderr
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}")
        assert served_answers(client, served.kind, 40, TEXTS) == expected_texts(served, TEXTS, 40)
        here = SimpleNamespace(kind=served.kind, http=f"127.0.0.1:{http}")
        assert ask_pieces(here, TEXTS[1], max_new_tokens=9) == ask_pieces(served, TEXTS[1], max_new_tokens=9)
        options = ("--repository", served.repository, "--texts", served.texts, "--results", served.results)
        speed = ("serving.generation_speed", "--url", f"127.0.0.1:{grpc}", "--rounds", 1, "--tokens", 5)
        assert "batch 8: served" in succeed(*speed, "--model", served.checkpoint, *options).stdout
        (path,) = served.results.glob("*/*/generation.json")
        rows = json.loads(path.read_text())["rows"]
        assert [row["equal_answers"] for row in rows] == [{"in process": n, "generate()": n} for n in (1, 8)]
    finally:
        succeed("serve.sh", "stop", "--http-port", http)


def test_curl_gets_the_whole_answer_and_why_it_ended(served):
    answer = ask(served, TEXTS[1], max_new_tokens=7)
    assert (answer["GENERATED"], answer["TOKENS"]) == expected_texts(served, TEXTS[1:2], 7)[0]
    assert answer["FINISH_REASON"] == ("length" if answer["TOKENS"] == 7 else "stop")


def test_pieces_make_up_the_whole_text(served):
    whole, pieces = ask(served, TEXTS[1], max_new_tokens=30), ask_pieces(served, TEXTS[1], max_new_tokens=30)
    assert len(pieces) > 3
    assert "".join(piece["GENERATED"] for piece in pieces) == whole["GENERATED"]
    assert sum(piece["TOKENS"] for piece in pieces) == whole["TOKENS"]
    assert [piece["FINISH_REASON"] for piece in pieces] == [""] * (len(pieces) - 1) + [whole["FINISH_REASON"]]


def test_a_seed_repeats_the_sample(served):
    drawn = [ask(served, TEXTS[1], max_new_tokens=20, temperature=2.0, top_p=0.95, seed=s) for s in (1, 1, 2, 3)]
    texts = [answer["GENERATED"] for answer in drawn]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    assert ask(served, TEXTS[1], max_new_tokens=20, temperature=0, seed=5) == ask(served, TEXTS[1], max_new_tokens=20)


def test_requests_at_once_are_batched_and_all_answered(served):
    before = executions(served)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda i: ask(served, TEXTS[i % 5], max_new_tokens=12), range(32)))
    expected = expected_texts(served, TEXTS, 12)
    assert [(answer["GENERATED"], answer["TOKENS"]) for answer in found] == [expected[i % 5] for i in range(32)]
    assert executions(served) - before < sum(answer["TOKENS"] for answer in found)


def test_the_loop_ends_when_the_client_leaves(served):
    wish = {"TEXT": TEXTS[1], "max_new_tokens": MAX_NEW_TOKENS, "stream": True}
    before, body = executions(served), json.dumps(wish).encode()
    host, port = served.http.split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v2/models/{served.kind}/generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        assert connection.recv(100)
    time.sleep(1)
    stopped = executions(served)
    time.sleep(1)
    assert executions(served) == stopped < before + 1000
    assert len(ask_pieces(served, TEXTS[1], max_new_tokens=1000)) > 900  # the model itself would have gone on


def test_a_chat_goes_through_the_template(served):
    chat = [{"role": "user", "content": "word1 word2"}]
    status, answer = post(served, {"MESSAGES": json.dumps(chat), "parameters": {"max_new_tokens": 9}})
    if served.kind == "t5":
        assert status == 400 and "TEXT" in answer
        return
    ids = make_tokenizer(TEMPLATE).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    (tokens,) = generation_check.greedy_tokens(make_model("llama"), served.card, [ids], 9)
    assert json.loads(answer)["GENERATED"] == make_tokenizer().decode(tokens, skip_special_tokens=True)


def test_fp16_is_made_and_switched_to(served, tmp_path):
    succeed("quantize.py", "--repository", served.repository, "--calibration-texts", served.texts)
    done = succeed("serving.repository", "--repository", served.repository, "--precision", "FP16")
    assert "decoder_FP16" in done.stdout
    alone = tmp_path / "alone"
    succeed("serving.repository", "--repository", served.repository, "--output", alone)
    assert not (alone / "decoder").exists() and (alone / "decoder_FP16/1/model.onnx").is_file()
    done, (http, grpc) = start_server(alone)
    try:
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}")
        found, expected = served_answers(client, served.kind, 12, TEXTS), expected_texts(served, TEXTS, 12)
        assert sum(map(tuple.__eq__, found, expected)) >= 3  # a rounded logit may turn a token, and all after it
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
        succeed("serving.repository", "--repository", served.repository, "--precision", "ONNX")


# --- the checkpoint and the repository -----------------------------------------------


def test_another_head_is_named_with_its_task(served, tmp_path):
    other = {"llama": "text2text-generation", "t5": "text-generation"}[served.kind]
    done = run("torch2onnx.py", "--task", other, "--model", served.checkpoint, "--repository", tmp_path / "a")
    assert done.returncode == 1 and f"use --task {TASKS[served.kind]}" in done.stderr


@pytest.mark.parametrize("option", [("--engine", "openvino"), ("--precision", "INT8")])
def test_in_one_process_what_a_service_cannot_be_is_refused(served, tmp_path, option):
    done = run("serving.one_pass", "--repository", served.repository, "--output", tmp_path, *option)
    assert done.returncode == 1 and f"{option[0]}: expected" in done.stderr and f"found {option[1]}" in done.stderr


def test_a_graph_of_another_export_is_found(served, tmp_path):
    path = served.repository / "decoder/1/model.onnx"
    content = path.read_bytes()
    assert run("serving.check", "--repository", served.repository).returncode == 0
    path.unlink()  # a link to the file that other tests have
    path.write_bytes(content[:-200])
    try:
        done = run("serving.check", "--repository", served.repository)
        assert done.returncode == 1 and "decoder" in done.stderr
    finally:
        path.write_bytes(content)
