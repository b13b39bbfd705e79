"""Requests to any model of any Triton server: texts to tensors by its config, its answer to plain values."""

import contextlib
import json
import queue
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import namedtuple
from http.client import HTTPException

import numpy as np
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from serving.retry import TRIES
from serving.server import connect, infer, make_inputs

Server = namedtuple("Server", "url protocol timeout_s")
Tensor = namedtuple("Tensor", "type dims optional")
Model = namedtuple("Model", "name inputs outputs max_batch_size decoupled")  # inputs, outputs: {name: Tensor}
# kinds of a JSON array's numbers that a tensor of each kind takes; V is bfloat16
KINDS = {"O": "U", "b": "b", "i": "iu", "u": "iu", "f": "iuf", "V": "iuf"}


class FailedError(Exception):
    """Why one request has no answer; another one may have."""


def call_options(server):
    """What every call of a client takes: over HTTP the deadline is the connection's, and answers are dicts anyway."""
    return {} if server.protocol == "http" else {"client_timeout": server.timeout_s}


def json_options(server):
    """call_options of a call that answers with a message."""
    return call_options(server) | ({} if server.protocol == "http" else {"as_json": True})


@contextlib.contextmanager
def named_errors(server):
    """Raise FailedError in place of what the clients raise; exit where the server is not reached."""
    try:
        yield
    except TimeoutError:
        raise FailedError(f"expected an answer within {server.timeout_s:g} s (--timeout-s), found none") from None
    except InferenceServerException as error:
        if error.status() == "StatusCode.DEADLINE_EXCEEDED":
            raise FailedError(f"expected an answer within {server.timeout_s:g} s (--timeout-s), found none") from None
        if error.status() == "StatusCode.UNAVAILABLE" and not is_live(server):  # a full queue is unavailable too
            exit_unreached(server, error.message())
        raise FailedError(" ".join(error.message().split())) from None
    except (OSError, HTTPException, ValueError) as error:
        exit_unreached(server, error)


def is_live(server):
    """Whether the server answers at all."""
    with contextlib.suppress(InferenceServerException):
        return connect(*server)[0].is_server_live(**call_options(server))
    return False


def exit_unreached(server, error):
    """Exit: nothing that answers as Triton does is there."""
    found = " ".join(str(error).split()) or type(error).__name__
    raise SystemExit(
        f"--url {server.url}: expected a Triton server ({server.protocol}), found: {found}; start one, e.g. with "
        "./serve.sh start, or name its port of this --protocol"
    ) from None


# --- the model ------------------------------------------------------------------------


def read_model(server, name):
    """The Model of a name; exits with the names that there are unless the server has it ready."""
    client, _ = connect(*server)
    with named_errors(server):
        if not client.is_server_live(**call_options(server)):
            exit_unreached(server, "a server that does not say it is live")
        if not client.is_model_ready(name, **call_options(server)):
            raise SystemExit(f"--model: expected one of the server's {', '.join(ready_models(server))}; found {name}")
        config = client.get_model_config(name, **json_options(server))
    config = config.get("config", config)
    return Model(
        name,
        *({t["name"]: read_tensor(t) for t in config.get(part, [])} for part in ("input", "output")),
        int(config.get("max_batch_size", 0)),
        bool(config.get("model_transaction_policy", {}).get("decoupled")),
    )


def ready_models(server):
    """Names of all models that answer."""
    index = connect(*server)[0].get_model_repository_index(**json_options(server))
    models = index if isinstance(index, list) else index.get("models", [])
    return sorted({model["name"] for model in models if model.get("state") == "READY"})


def read_tensor(config):
    """The Tensor of an input or output of a config: its type as requests name it."""
    kind = config["data_type"].removeprefix("TYPE_")
    dims = tuple(map(int, config["dims"]))  # strings in JSON that comes from protobuf
    return Tensor("BYTES" if kind == "STRING" else kind, dims, bool(config.get("optional")))


def describe(tensors):
    """TEXT BYTES [1], … in the order of the config."""
    return ", ".join(f"{name} {tensor.type} {list(tensor.dims)}" for name, tensor in tensors.items())


# --- values -----------------------------------------------------------------------------


def make_row(value, name, tensor):
    """An input's value as an array of its dims, without the batch. Raises FailedError where it does not fit.

    A text goes as it is into a tensor of one string; everything else is read as JSON: a number, true, or an array.
    """
    if tensor.type == "BYTES" and not any(dim > 1 for dim in tensor.dims):
        # bytes that are no UTF-8 go as they came, and the server says what it thinks of them
        return np.full([1] * len(tensor.dims), value.encode(errors="surrogateescape"), dtype=object)
    with contextlib.suppress(ValueError, OverflowError):  # no JSON, rows of unequal length, an integer too large
        found = np.array(json.loads(value))
        found = found.reshape([1] * len(tensor.dims)) if found.ndim == 0 else found
        shapes = zip(tensor.dims, found.shape, strict=True)
        if all(dim in (-1, length) for dim, length in shapes) and (row := convert(found, tensor.type)) is not None:
            return row
    raise FailedError(f"{name}: expected {tensor.type} {list(tensor.dims)}, found {value!r}")


def convert(array, kind):
    """An array of JSON's values as Triton's type, or None where that would change them: 1.5 to an integer, 300 to 8 bits."""
    dtype = np.dtype(triton_to_np_dtype(kind))
    if array.dtype.kind not in KINDS[dtype.kind]:
        return None
    if kind == "BYTES":
        return np.array([text.encode() for text in array.flat], dtype=object).reshape(array.shape)
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    same = np.array_equal(converted, array) if dtype.kind in "iu" else np.isfinite(converted.astype(float)).all()
    return converted if same else None


def make_rows(values, model, names):
    """{input: array} of one text's values, one for each name. Raises FailedError where one does not fit."""
    if len(values) != len(names):
        raise FailedError(f"expected {len(names)} values with a TAB between ({', '.join(names)}), found {len(values)}")
    return {name: make_row(value, name, model.inputs[name]) for name, value in zip(names, values, strict=True)}


def plain(array):
    """A tensor as JSON has it: one string, number or bool, or lists of them. NaN and infinity, which it lacks: None."""
    if array is None or array.size == 1:
        return None if array is None else plain_value(array.reshape(-1)[0])
    return [plain_value(value) for value in array] if array.ndim == 1 else [plain(part) for part in array]


def plain_value(value):
    """One element; a float has the digits of its own type, not those that come with 64 bits."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    return float(str(value)) if np.isfinite(value) else None


# --- answers -----------------------------------------------------------------------------


def ask(server, model, rows, outputs, parameters):
    """[{output: value}] of [{input: array}], sent as one request. Raises FailedError."""
    try:
        tensors = {name: np.stack([row[name] for row in rows]) for name in rows[0]} if model.max_batch_size else rows[0]
    except ValueError:
        raise FailedError("expected arrays of one shape in a request; --batch-size 1") from None
    with named_errors(server):
        given = (model.name, tensors, outputs, server.url, server.protocol, parameters, server.timeout_s)
        found = infer(*given, tries=TRIES)
    if not model.max_batch_size:
        return [{name: plain(array) for name, array in found.items()}]
    if missing := [name for name, array in found.items() if array is None or len(array) != len(rows)]:
        raise FailedError(
            f"expected {len(rows)} rows of each output, found the server gave others of {', '.join(missing)}"
        )
    return [{name: plain(array[i]) for name, array in found.items()} for i in range(len(rows))]


def ask_each(server, model, rows, outputs, parameters):
    """ask, with a FailedError in the place of each answer that there is not: one bad text fails alone."""
    try:
        return ask(server, model, rows, outputs, parameters) if rows else []
    except FailedError as error:
        if len(rows) == 1:
            return [error]
    return [answer for row in rows for answer in ask_each(server, model, [row], outputs, parameters)]


def stream(server, model, row, outputs, parameters):
    """Yield {output: value} of each response of a decoupled model. Raises FailedError, also after some."""
    pieces = stream_http if server.protocol == "http" else stream_grpc
    yield from pieces(server, model, row, outputs, parameters)


def stream_http(server, model, row, outputs, parameters):
    """stream by server-sent events, of which each has all outputs."""
    url = f"http://{server.url}/v2/models/{urllib.parse.quote(model.name, safe='')}/generate_stream"
    body = {name: plain(array) for name, array in row.items()} | {"parameters": parameters}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as tritonclient, which knows no proxy
    deadline = time.monotonic() + server.timeout_s
    with named_errors(server):
        try:
            response = opener.open(urllib.request.Request(url, json.dumps(body).encode()), timeout=server.timeout_s)
        except urllib.error.HTTPError as error:
            # an event where the model refused, before any piece
            found = json.loads(error.read().removeprefix(b"data:"))["error"]
            raise FailedError(" ".join(found.split())) from None
    with response:
        while line := read_line(server, response, deadline):
            event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if "error" in event and "error" not in model.outputs:
                raise FailedError(" ".join(event["error"].split()))
            if event:
                yield {name: read_event(event.get(name), model.outputs[name]) for name in outputs}


def read_line(server, response, deadline):
    """The next line of a stream; the socket's own deadline is for each read."""
    with named_errors(server):
        line = response.readline()
        if time.monotonic() > deadline:
            raise TimeoutError
        return line


def read_event(value, tensor):
    """An output of an event, whose floats have the digits of 64 bits."""
    return value if value is None or tensor.type == "BYTES" else plain(np.array(value, triton_to_np_dtype(tensor.type)))


def stream_grpc(server, model, row, outputs, parameters):
    """stream by gRPC; where the reader leaves early, the server is told."""
    client, module = connect(*server)
    tensors = {name: array[None] for name, array in row.items()} if model.max_batch_size else row
    requested, responses = [module.InferRequestedOutput(name) for name in outputs], queue.SimpleQueue()
    options = {"outputs": requested, "parameters": parameters, "enable_empty_final_response": True}
    finished = False
    try:
        with named_errors(server):
            client.start_stream(lambda result, error: responses.put((result, error)), server.timeout_s)
            client.async_stream_infer(model.name, make_inputs(module, tensors), **options)
        while True:
            with named_errors(server):
                try:
                    result, error = responses.get(timeout=server.timeout_s)
                except queue.Empty:
                    raise TimeoutError from None
                if error:
                    raise error
            if result.get_response().outputs:
                yield {name: plain(result.as_numpy(name)) for name in outputs}
            if result.get_response().parameters["triton_final_response"].bool_param:
                finished = True
                return
    finally:
        client.stop_stream(cancel_requests=not finished)


def join(pieces, outputs, model):
    """One answer of a stream's pieces [{output: value}]: texts joined, all else one list."""
    joined = {}
    for name in outputs:
        values = [piece[name] for piece in pieces if piece[name] is not None]
        if model.outputs[name].type == "BYTES" and all(isinstance(value, str) for value in values):
            joined[name] = "".join(values)
        else:
            parts = [value if isinstance(value, list) else [value] for value in values]
            joined[name] = values[0] if len(values) == 1 else [part for value in parts for part in value]
    return joined
