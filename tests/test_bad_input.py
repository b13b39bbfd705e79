"""Bad input over HTTP and gRPC to every kind of service: the expected refusal, and a server that goes on as before."""

import json
import socket
import subprocess
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import ROOT, start_server, succeed
from tritonclient.utils import InferenceServerException

PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
REFUSED = {"http": ("400",), "grpc": ("StatusCode.INVALID_ARGUMENT",)}
GROWTH_MIB = 400  # what all processes together may hold more after the table than before it

# service -> a good request; the task's own model by model besides
TEXT = {"TEXT": ["a good text"]}
GOOD = {
    "tiny": TEXT,
    "token-classification": TEXT,
    "question-answering": {"QUESTION": ["who?"], "CONTEXT": ["It was she who did it."]},
    "fill-mask": {"TEXT": ["a [MASK] text"]},
    "sentence-embedding": TEXT,
    "ensemble": TEXT,
    "tokenizer": TEXT,
}
LARGEST_TEXT = {
    "ensemble": 65_536,
    "tokenizer": 65_536,
    "question-answering": 32_768,
    "sentence-embedding": 131_072,
}  # bytes, by the model's length
EMBEDDERS = ("model_ONNX", "model_TRT_FP32", "model_TRT_FP16", "model_TRT_INT8", "model_TRT_BEST")


def strings(values, shape=None):
    """bytes [texts, 1]."""
    array = np.empty(len(values), dtype=object)
    array[:] = [value if isinstance(value, bytes) else value.encode() for value in values]
    return array.reshape(shape or (-1, 1))


def changed(service, **inputs):
    """A good request's arrays with some of them replaced."""
    return {name: strings(values) for name, values in GOOD[service].items()} | inputs


def good(model):
    """A request that the model answers."""
    ones = np.ones((1, 128), dtype=np.int64)
    return changed(model) if model in GOOD else {"INPUT_IDS": ones, "ATTENTION_MASK": ones}


# --- the table: (name, model, inputs, parameters, words of the answer) ----------------


def rows_of(service):
    """What is wrong with strings, for each string that a service takes, and with its parameters."""
    first = next(iter(GOOD[service]))
    for name in GOOD[service]:
        for label, value, words in (
            ("not UTF-8", b"\xff\xfe", "expected UTF-8"),
            ("half a character", "é".encode()[:1], "expected UTF-8"),
            ("a surrogate", b"\xed\xa0\x80", "expected UTF-8"),
            ("too large", b"x" * 300_000, "expected at most"),
        ):
            yield f"{name} {label}", service, changed(service, **{name: strings([value])}), {}, words
    many = {n: strings(v * 9) for n, v in GOOD[service].items()}
    large = {n: strings([b"a " * (LARGEST_TEXT.get(service, 262_144) // 3)] * 8) for n in GOOD[service]}
    yield "nine texts", service, many, {}, "batch-size must be <= 8"
    yield "a large request", service, large, {}, "bytes in a request"
    yield "one dimension", service, changed(service, **{first: strings(["a"], (1,))}), {}, "shape"
    yield "three dimensions", service, changed(service, **{first: strings(["a"], (1, 1, 1))}), {}, "shape"
    yield "two columns", service, changed(service, **{first: strings(["a", "b"], (1, 2))}), {}, "shape"
    yield "numbers", service, changed(service, **{first: np.ones((1, 1), dtype=np.int64)}), {}, "data-type"
    yield "another name", service, {"TXT": strings(["a"])} | dict(list(changed(service).items())[1:]), {}, "TXT"
    yield "one too many", service, changed(service, MORE=strings(["a"])), {}, "MORE"
    yield "nothing", service, {}, {}, ""


def parameters():
    """Parameters that a service does not take, or not so."""
    for service in ("tiny", "fill-mask", "question-answering"):
        for value in (0, -1, 10**9, "many", "", 1.5, float("inf"), float("nan"), True):
            yield f"top_k={value!r}", service, changed(service), {"top_k": value}, "top_k"
    for value in ("worst", "", 3):
        yield (
            f"aggregation={value!r}",
            "token-classification",
            changed("token-classification"),
            {"aggregation": value},
            "aggregation",
        )
    for name, value in (("max_answer_tokens", 0), ("max_answer_tokens", "x"), ("no_answer", "perhaps"), ("logits", 7)):
        yield f"{name}={value!r}", "question-answering", changed("question-answering"), {name: value}, name
    for service in ("tiny", "token-classification", "question-answering", "fill-mask"):
        yield "an unknown parameter", service, changed(service), {"temperature": 1}, "temperature"


def contents():
    """Texts that a task cannot answer."""
    for label, text in (("no mask", "a text"), ("two masks", "[MASK] and [MASK]"), ("empty", "")):
        yield label, "fill-mask", {"TEXT": strings([text])}, {}, "MASK"
    for name in ("QUESTION", "CONTEXT"):
        for text in ("", "  ", "\n", "\u200b\u00ad\x01"):  # of the last ones BERT's tokenizer makes nothing
            yield (
                f"{name} {text!r}",
                "question-answering",
                changed("question-answering", **{name: strings([text])}),
                {},
                name,
            )
    long = changed("question-answering", QUESTION=strings(["who " * 200]))
    yield "a question longer than the model", "question-answering", long, {}, "QUESTION"


def tokens():
    """Token tensors that no tokenizer makes."""
    ones = np.ones((1, 128), dtype=np.int64)
    for model in EMBEDDERS:
        for label, ids, mask, words in (
            ("an id of -1", -ones, ones, "INPUT_IDS"),
            ("an id beyond the vocabulary", ones * 99_999, ones, "INPUT_IDS"),
            ("an id of 2^62", ones * 2**62, ones, "INPUT_IDS"),
            ("a mask of 2", ones, ones * 2, "ATTENTION_MASK"),
            ("a mask of -1", ones, -ones, "ATTENTION_MASK"),
            ("a mask of zeros", ones, ones * 0, "ATTENTION_MASK"),
            ("another length", ones[:, :64], ones[:, :64], "shape"),
            ("no batch", ones[0], ones[0], None),
        ):
            yield label, model, {"INPUT_IDS": ids, "ATTENTION_MASK": mask}, {}, words
        yield "no mask tensor", model, {"INPUT_IDS": ones}, {}, "expected 2 inputs"


TABLE = [*(row for service in GOOD for row in rows_of(service)), *parameters(), *contents(), *tokens()]
OWN = {"ensemble", "tokenizer", *EMBEDDERS}

# bodies that are no request, over HTTP alone
BODIES = [
    b"{", b"[]", b"null", b"7", b'"text"', b"{}", b'{"inputs": {}}', b'{"inputs": [7]}', b'{"inputs": [{"name": "TEXT"}]}',
    b'{"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": []}]}',
    b'{"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [7]}]}',
    b'{"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a", "b"]}]}',
    b'{"inputs": [{"name": "TEXT", "shape": [-1, 1], "datatype": "BYTES", "data": ["a"]}]}',
    b'{"inputs": [{"name": "TEXT", "shape": ["1", 1], "datatype": "BYTES", "data": ["a"]}]}',
    b'{"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "TEXTS", "data": ["a"]}]}',
    b"\xff\xfe\x00", b"[" * 5000, b'{"a":' * 5000,
]  # fmt: skip


# --- the servers ---------------------------------------------------------------------


class Server:
    """A running server and how it answers."""

    def __init__(self, ports):
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports)
        self.port = str(ports[0])
        self.clients = {name: module.InferenceServerClient(getattr(self, name)) for name, module in PROTOCOLS.items()}

    def ask(self, protocol, model, inputs, parameters=None):
        """{output: array} or the exception."""
        module, tensors = PROTOCOLS[protocol], []
        for name, array in inputs.items():
            kind = "BYTES" if array.dtype == object else "INT64"
            tensors.append(module.InferInput(name, list(array.shape), kind))
            tensors[-1].set_data_from_numpy(array)
        response = self.clients[protocol].infer(model, tensors, parameters=parameters or None)
        names = [
            output["name"]
            for output in response.get_response(**({"as_json": True} if protocol == "grpc" else {}))["outputs"]
        ]
        return {name: response.as_numpy(name) for name in names}

    def memory_mib(self):
        """Resident memory of the server and all that it started."""
        listing = subprocess.run(["ps", "-wweo", "rss,args"], capture_output=True, text=True).stdout.splitlines()
        return (
            sum(
                int(line.split()[0])
                for line in listing
                if f"triton-{self.port}-" in line or f"http-port={self.port}" in line
            )
            / 1024
        )


@pytest.fixture(scope="module")
def servers(chain, tiny, repositories):
    """The services in one server, and the task's own models in another; with what they answer at first."""
    done, ports = start_server(tiny.repository, *repositories.values())
    assert done.returncode == 0, done.stderr
    found = SimpleNamespace(services=Server(ports), own=Server((chain.http_port, chain.grpc.split(":")[1])))
    found.first = {model: server_of(found, model).ask("grpc", model, good(model)) for model in (*GOOD, *EMBEDDERS)}
    found.before = found.services.memory_mib() + found.own.memory_mib()
    yield found
    succeed("serve.sh", "stop", "--http-port", ports[0])


def server_of(servers, model):
    return servers.own if model in OWN else servers.services


def still_right(servers, model):
    """The server is ready, and its next good answer is the first one again."""
    server = server_of(servers, model)
    assert server.clients["http"].is_server_ready()
    for name, values in server.ask("grpc", model, good(model)).items():
        first = servers.first[model][name]
        assert values.tolist() == first.tolist() if values.dtype == object else np.allclose(values, first, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("row", TABLE, ids=[f"{model}: {name}" for name, model, *_ in TABLE])
def test_bad_input_is_refused_and_the_next_request_is_answered(servers, row, protocol):
    name, model, inputs, given, words = row
    if protocol == "http" and any(value != value or value in (float("inf"),) for value in given.values()):
        pytest.skip("JSON has no such number")
    with pytest.raises(InferenceServerException) as refused:
        server_of(servers, model).ask(protocol, model, inputs, given)
    assert refused.value.status() in REFUSED[protocol], refused.value
    assert words is None or words in str(refused.value), refused.value
    assert not any(place in str(refused.value) for place in ("site-packages", str(ROOT)))
    still_right(servers, model)


@pytest.mark.parametrize("body", BODIES, ids=[repr(body[:60]) for body in BODIES])
def test_a_body_that_is_no_request_is_refused(servers, body):
    request = urllib.request.Request(f"http://{servers.services.http}/v2/models/tiny/infer", body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert 400 <= refused.value.code <= 500 and json.loads(refused.value.read())["error"]
    still_right(servers, "tiny")


def test_good_and_bad_texts_in_one_batch_do_not_mix(servers):
    """Requests that wait together are tokenised in one call."""
    from concurrent.futures import ThreadPoolExecutor

    body = lambda value: {"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [value]}]}  # noqa: E731

    def ask(value):
        request = urllib.request.Request(
            f"http://{servers.services.http}/v2/models/tiny/infer", json.dumps(body(value)).encode()
        )
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    texts = ["a good text"] * 24 + ["x" * 300_000] * 8
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, texts)) == [200] * 24 + [400] * 8


def test_memory_stays_bounded(servers):
    """After all of the table, since tests run in the order of the file."""
    assert servers.services.memory_mib() + servers.own.memory_mib() < servers.before + GROWTH_MIB


@pytest.mark.parametrize("word", [b"[", b'{"a":'], ids=["lists", "objects"])
def test_deep_json_is_refused_and_survived(servers, word):
    """It needs more stack than a thread usually has, and ends Triton 2.51 then."""
    request = urllib.request.Request(f"http://{servers.services.http}/v2/models/tiny/infer", word * 10**6)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=60)
    still_right(servers, "tiny")


def test_a_million_chunks_are_survived(servers):
    host, port = servers.services.http.split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"1\r\na\r\n" * 10**4)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 ")
    still_right(servers, "tiny")
