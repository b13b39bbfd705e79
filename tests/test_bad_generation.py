"""Bad input over HTTP and gRPC to the services that generate: the expected refusal, and a server that goes on as before."""

import json
import math
import queue
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc
from conftest import ROOT, post, run, start_server, succeed
from test_bad_input import Server, strings
from tiny_generators import MAX_LENGTH, MAX_NEW_TOKENS, TASKS
from tritonclient.utils import InferenceServerException

from serving.server import make_inputs

GOOD = {"TEXT": ["word5 word6"]}
FEW = {"max_new_tokens": 3}
INPUTS = {"llama": ("TEXT", "MESSAGES"), "t5": ("TEXT",)}
GROWTH_MIB = 200  # what the server may hold more after all of the file


# --- the table: (name, service, inputs, parameters, words of the answer) ----------------
# inputs: lists of texts, or what only gRPC can send: bytes that are no text, and arrays of another shape


def texts():
    """What is wrong with a request's strings."""
    largest = 512 * MAX_LENGTH
    for service in INPUTS:
        for name in INPUTS[service]:
            for label, value, words in (
                ("not UTF-8", b"\xff\xfe", "expected UTF-8"),
                ("half a character", "é".encode()[:1], "expected UTF-8"),
                ("too large", "x" * (largest + 1), f"{name}: expected at most {largest} bytes"),
            ):
                yield f"{name} {label}", service, {name: [value]}, {}, words
        for label, inputs, words in (
            ("no text", {"TEXT": [""]}, f"TEXT: expected 1 to {MAX_LENGTH} tokens"),
            ("spaces", {"TEXT": [" \n"]}, f"TEXT: expected 1 to {MAX_LENGTH} tokens"),
            ("a long prompt", {"TEXT": ["word1 " * (MAX_LENGTH + 1)]}, f"found {MAX_LENGTH + 1}"),
            ("nine texts", {"TEXT": ["word1"] * 9}, "batch-size must be <= 8"),
            ("a bad text beside a good one", {"TEXT": ["word1", ""]}, "TEXT: expected 1 to"),
            ("a large request", {"TEXT": ["x" * largest] * 8}, "bytes in a request"),
            ("one dimension", {"TEXT": strings(["a"], (1,))}, "shape"),
            ("two columns", {"TEXT": strings(["a", "b"], (1, 2))}, "shape"),
            ("numbers", {"TEXT": np.ones((1, 1), dtype=np.int64)}, "data-type"),
            ("another name", {"TXT": strings(["a"])}, "TXT"),
            ("nothing", {}, ""),
        ):
            yield label, service, inputs, {}, words
        yield "a stream of two texts", service, {"TEXT": ["a", "b"]}, {"stream": True}, "stream: expected one text"
    yield "a chat", "t5", {"MESSAGES": ["[]"]}, {}, "for model 't5'"
    yield "a text and a chat", "llama", {"TEXT": ["a"], "MESSAGES": ["[]"]}, {}, "expected TEXT or MESSAGES"


def parameters():
    """Parameters that a service does not take, or not so."""
    count = f"max_new_tokens: expected a whole number from 1 to {MAX_NEW_TOKENS}, found "
    for given, words in (
        *(({"max_new_tokens": v}, f"{count}{v!r}") for v in (0, -1, MAX_NEW_TOKENS + 1, 2.5, 2**63 - 1, "many", "", "0")),
        ({"max_new_tokens": True}, count),
        ({"max_new_tokens": math.inf}, count),
        ({"max_new_tokens": math.nan}, count),
        ({"temperature": -1}, "temperature: expected a number from 0, found -1"),
        ({"temperature": "hot"}, "temperature: expected a number from 0, found 'hot'"),
        ({"temperature": 1, "top_p": 0}, "top_p: expected above 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p: expected a number from 0 to 1"),
        ({"top_p": 0.5}, "top_p: expected a temperature above 0"),
        ({"seed": -1}, "seed: expected"),
        ({"stream": "perhaps"}, "stream: expected true or false"),
        ({"top_k": 5}, "top_k: expected one of the parameters max_new_tokens"),
        ({"aggregation": "first"}, "aggregation: expected one of the parameters max_new_tokens"),
    ):  # fmt: skip
        for service in INPUTS:
            yield str(given), service, GOOD, given, words


def chats():
    """MESSAGES that are no chat."""
    for label, text, words in (
        ("no JSON", "hello", "MESSAGES: expected JSON"),
        ("an empty string", "", "MESSAGES: expected JSON"),
        ("half of it", '[{"role": "user", "content": "a', "MESSAGES: expected JSON"),
        ("single quotes", "[{'role': 'user', 'content': 'a'}]", "MESSAGES: expected JSON"),
        ("a long integer", "1" * 5000, "MESSAGES: expected JSON"),
        ("deep lists", "[" * 5000, "MESSAGES: expected JSON"),
        ("deep objects", '{"a":' * 3000, "MESSAGES: expected JSON"),
        ("an object", '{"role": "user", "content": "a"}', "expected a list with a message"),
        ("an empty list", "[]", "expected a list with a message"),
        ("a list of texts", '["hello"]', "expected role and content in message 0"),
        ("no content", '[{"role": "user"}]', "expected role and content in message 0"),
        ("a third key", '[{"role": "user", "content": "a", "name": "b"}]', "expected role and content in message 0"),
        ("an unknown role", '[{"role": "robot", "content": "a"}]', "system, user, assistant in message 0, found 'robot'"),
        ("a number as content", '[{"role": "user", "content": 1}]', "expected a text as content of message 0"),
        ("half a surrogate pair", '[{"role": "user", "content": "\\ud83d"}]', "expected a text as content of message 0"),
        ("a long chat", json.dumps([{"role": "user", "content": "word1 " * MAX_LENGTH}]), f"found {MAX_LENGTH + 3}"),
    ):  # fmt: skip
        yield f"MESSAGES {label}", "llama", {"MESSAGES": [text]}, {}, words


def over_http(inputs, given):
    """Whether JSON can say it."""
    plain = all(isinstance(values, list) and all(isinstance(v, str) for v in values) for values in inputs.values())
    return plain and not any(isinstance(value, float) and not math.isfinite(value) for value in given.values())


TABLE = [
    (protocol, *row)
    for row in (*texts(), *parameters(), *chats())
    for protocol in ("http", "grpc")
    if protocol == "grpc" or over_http(*row[2:4])
]


# --- the server ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(generators):
    """Both services in one server, with what they answer at first."""
    done, ports = start_server(*(generators / service for service in TASKS))
    assert done.returncode == 0, done.stderr
    found = Server(ports)
    found.first = {service: ask(found, service, 5)[1] for service in TASKS}
    found.before = found.memory_mib()
    yield found
    succeed("serve.sh", "stop", "--http-port", ports[0])


def ask(served, service, number, **given):
    """(status, answer) of a small good request, one of many."""
    return post(served, f"{service}/generate", {"TEXT": f"word{number} word{number + 1}"} | FEW | given)


def ask_stream(served, service, inputs, given):
    """The first answer of a stream over gRPC; raises what the server says instead."""
    arrays = {name: strings(values) if isinstance(values, list) else values for name, values in inputs.items()}
    answers, client = queue.SimpleQueue(), tritonclient.grpc.InferenceServerClient(served.grpc)
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        client.async_stream_infer(service, make_inputs(tritonclient.grpc, arrays), parameters=given or None)
        result, error = answers.get(timeout=60)
    finally:
        client.stop_stream(cancel_requests=True)
    if error:
        raise error
    return result


@pytest.mark.parametrize(
    ("protocol", "service", "inputs", "given", "words"),
    [(protocol, *row) for protocol, _, *row in TABLE],
    ids=[f"{service}: {name}-{protocol}" for protocol, name, service, *_ in TABLE],
)
def test_bad_input_is_refused_and_the_next_request_is_answered(served, protocol, service, inputs, given, words):
    if protocol == "http":
        body = {name: values[0] if len(values) == 1 else values for name, values in inputs.items()}
        status, answer = post(served, f"{service}/generate", body | {"parameters": given})
        assert status == 400, answer
        said = answer["error"]
    else:
        with pytest.raises(InferenceServerException) as refused:
            ask_stream(served, service, inputs, given)
        said = str(refused.value)
    assert words in said and not any(place in said for place in (".py", str(ROOT))), said
    assert served.clients["http"].is_server_ready()
    assert ask(served, service, 5) == (200, served.first[service])


# --- many at once ------------------------------------------------------------------------


def chat(content):
    """A body with one message."""
    return {"MESSAGES": json.dumps([{"role": "user", "content": content}])} | FEW


@pytest.mark.parametrize("service", TASKS)
def test_of_32_at_once_the_good_are_answered_and_the_bad_refused(served, service):
    good = [chat(f"word{n}") if service == "llama" else {"TEXT": f"word{n}"} | FEW for n in range(32)]
    bad = [{"max_new_tokens": 0}, chat("\ud83d") if service == "llama" else {"TEXT": ""}]
    alone = [post(served, f"{service}/generate", body) for body in good]
    mixed = [body | bad[n % 2] if n % 8 < 2 else body for n, body in enumerate(good)]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda body: post(served, f"{service}/generate", body), mixed))
    for number, (status, answer) in enumerate(found):
        assert status == 400 if number % 8 < 2 else (status, answer) == alone[number], answer


@pytest.mark.parametrize("service", TASKS)
def test_clients_that_leave_a_stream_take_nothing_from_the_others(served, service):
    wish = {"max_new_tokens": MAX_NEW_TOKENS, "stream": True}

    def leave(number):
        if number % 2:
            return ask_stream(served, service, GOOD, wish)
        body, (host, port) = json.dumps({"TEXT": "word5"} | wish).encode(), served.http.split(":")
        head = f"POST /v2/models/{service}/generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        return None

    with ThreadPoolExecutor(32) as pool:
        for _ in range(4):
            found = list(pool.map(lambda n: ask(served, service, 5) if n % 4 == 3 else leave(n), range(32)))
            assert found[3::4] == [(200, served.first[service])] * 8
    assert served.memory_mib() < served.before + GROWTH_MIB


# --- what cannot be served at all --------------------------------------------------------


def test_two_that_generate_graph_by_graph_are_refused(generators):
    """A service asks for its graphs by their names, which both have."""
    options = [option for service in TASKS for option in ("--repository", generators / service)]
    done = run("serving.check", *options)
    assert done.returncode == 1 and "expected one service that generates" in done.stderr
