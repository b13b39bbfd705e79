"""The real server: answers to hard texts, errors for bad requests, starting and stopping."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import transformers
import tritonclient.grpc
import tritonclient.http
from conftest import post
from tritonclient.utils import InferenceServerException

import client
from core import checkpoint, files, onnx_runtime, tables
from serving import server

OUTPUTS = {f"EMBEDDING_{suffix}" for suffix in tables.EMBEDDERS}
HARD_TEXTS = {
    "empty": "",
    "ten thousand words": "word " * 10_000,
    "emoji": "🙂🚀👩‍👩‍👧 🏳️‍🌈",
    "NUL byte": "before\0after",
    "right to left": "مرحبا بالعالم שלום עולם",
    "spaces only": " \t  ",
}


def text_input(*texts):
    return {"inputs": [{"name": "TEXT", "shape": [len(texts), 1], "datatype": "BYTES", "data": list(texts)}]}


def assert_ready(chain):
    assert urllib.request.urlopen(f"http://{chain.http}/v2/health/ready", timeout=10).status == 200


def test_one_text_by_curl_gets_five_embeddings(chain):
    status, answer = post(chain, "ensemble/infer", text_input("hello world"))
    assert status == 200
    assert {o["name"]: o["shape"] for o in answer["outputs"]} == {name: [1, 128, 2] for name in OUTPUTS}


@pytest.mark.parametrize("name", HARD_TEXTS)
def test_hard_text_gets_five_finite_embeddings(chain, name):
    embeddings = client.call_triton(HARD_TEXTS[name], chain.http)
    assert set(embeddings) == set(tables.EMBEDDERS)
    assert all(e.shape == (1, 128, 2) and np.isfinite(e).all() for e in embeddings.values())


def test_tokenizer_model_agrees_with_transformers(chain):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.packaged_folder())
    texts = [*files.read_texts(files.TEXTS)[:40], "", "word " * 300]
    for text in texts:
        found = server.infer("tokenizer", server.text_tensor([text]), ["INPUT_IDS", "ATTENTION_MASK"], chain.http)
        expected = tokenizer([text], padding="max_length", truncation=True, max_length=128)
        np.testing.assert_array_equal(found["INPUT_IDS"], expected["input_ids"])
        np.testing.assert_array_equal(found["ATTENTION_MASK"], expected["attention_mask"])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_served_embeddings_are_those_of_the_graphs(chain, protocol):
    text = "The kettle whistles while the radio plays."
    url = chain.http if protocol == "http" else chain.grpc
    feeds = server.infer("tokenizer", server.text_tensor([text]), ["INPUT_IDS", "ATTENTION_MASK"], url, protocol)
    embeddings = client.call_triton(text, url, protocol)
    for suffix, model in tables.EMBEDDERS.items():
        expected = onnx_runtime.open_session(chain.repository / model / "1/model.onnx").run(None, feeds)[0]
        np.testing.assert_allclose(embeddings[suffix], expected, atol=1e-5, err_msg=suffix)


def send_together(chain, model, payloads, make_input):
    """Send requests at once over gRPC, so that the server batches; answers or exceptions in order."""
    answers = [None] * len(payloads)
    done = threading.Semaphore(0)
    with tritonclient.grpc.InferenceServerClient(chain.grpc) as connection:

        def keep(index):
            def callback(result, error):
                answers[index] = error or result
                done.release()

            return callback

        for index, payload in enumerate(payloads):
            connection.async_infer(model, make_input(payload), keep(index))
        for _ in payloads:
            assert done.acquire(timeout=60)
    return answers


def bytes_input(value):
    tensor = tritonclient.grpc.InferInput("TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[value]], dtype=object))
    return [tensor]


def test_no_request_is_left_lying_in_the_queue(chain):
    body, seconds = json.dumps(text_input("hello world")), []

    def ask_on():
        connection = http.client.HTTPConnection(chain.http)
        for _ in range(1000):
            started = time.monotonic()
            connection.request("POST", "/v2/models/tokenizer/infer", body)
            assert connection.getresponse().read()
            seconds.append(time.monotonic() - started)

    threads = [threading.Thread(target=ask_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds) == 8000
    # a batcher with a queue policy sleeps 0.5 s with a request in its queue, some ten times in these
    assert sum(value > 0.4 for value in seconds) <= 2


def test_requests_answered_in_one_batch_get_their_own_answers(chain):
    texts = files.read_texts(files.TEXTS)[:24]
    together = send_together(chain, "ensemble", [t.encode() for t in texts], bytes_input)
    for text, answer in zip(texts, together, strict=True):
        alone = client.call_triton(text, chain.http)
        # other rows of a batch may change the order of sums, not more
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING_ONNX"), alone["ONNX"], atol=1e-4, err_msg=text)


def test_a_text_that_is_not_utf8_fails_alone(chain):
    payloads = [f"text {i}".encode() for i in range(12)]
    payloads[5] = b"\xff\xfe broken"
    answers = send_together(chain, "tokenizer", payloads, bytes_input)
    for index, answer in enumerate(answers):
        if index == 5:
            assert isinstance(answer, InferenceServerException) and "UTF-8" in answer.message()
        else:
            assert answer.as_numpy("INPUT_IDS").shape == (1, 128)
    assert_ready(chain)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (text_input(*["x"] * 9), ["<= 8"]),
        ({"inputs": [{"name": "TEXT", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"]}]}, ["[-1,1]", "[1,2]"]),
        ({"inputs": [{"name": "TEXTS", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]}, ["TEXTS"]),
        ({"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "INT64", "data": [1]}]}, ["TEXT", "BYTES"]),
    ],
    ids=["batch of 9", "wrong shape", "wrong name", "wrong type"],
)
def test_bad_request_gets_an_error_that_says_which_limit(chain, body, words):
    status, answer = post(chain, "ensemble/infer", body)
    assert status == 400 and all(word in answer["error"] for word in words), answer
    assert_ready(chain)


def test_ids_of_another_length_are_refused(chain):
    ids = {"shape": [1, 64], "datatype": "INT64", "data": [1] * 64}
    status, answer = post(
        chain, "model_TRT_INT8/infer", {"inputs": [{"name": n, **ids} for n in ("INPUT_IDS", "ATTENTION_MASK")]}
    )
    assert status == 400 and "[-1,128]" in answer["error"]


def ids_input(value):
    tensors = []
    for name, number in (("INPUT_IDS", value), ("ATTENTION_MASK", 1)):
        tensors.append(tritonclient.grpc.InferInput(name, [1, 128], "INT64"))
        tensors[-1].set_data_from_numpy(np.full((1, 128), number, dtype=np.int64))
    return tensors


def executions(chain, model):
    stats = server.connect(chain.http, "http")[0].get_inference_statistics(model)["model_stats"][0]
    return stats["execution_count"]


def test_ids_outside_the_vocabulary_fail_alone(chain):
    payloads = [101] * 16
    payloads[9] = 10**6
    before = executions(chain, "model_ONNX")
    answers = send_together(chain, "model_ONNX", payloads, ids_input)
    assert executions(chain, "model_ONNX") - before < len(payloads)  # some were batched
    for index, answer in enumerate(answers):
        if index == 9:
            assert isinstance(answer, InferenceServerException) and "expected ids of the vocabulary" in answer.message()
        else:
            assert answer.as_numpy("EMBEDDING").shape == (1, 128, 2)
    assert_ready(chain)
