"""The client's side of a running server: connecting, asking, and reading back what executes each model."""

import atexit
import functools
from http.client import HTTPException

import numpy as np
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from core.tables import ENGINES, HINT_BF16, MODELS, NAMES, PRECISION_HINT, PRECISIONS, TEXT, TORCH
from serving.graph_configs import script_names
from serving.retry import retry

HTTP_URL, GRPC_URL = "127.0.0.1:8000", "127.0.0.1:8001"
# what tritonclient raises where the server is gone, refuses, or the url is no host:port
SERVER_ERRORS = (OSError, HTTPException, InferenceServerException)
TIMEOUT_S = 600.0  # a request of many texts may take that long on a CPU


@functools.cache
def connect(url, protocol, timeout_s=TIMEOUT_S):
    """(client, its module) for host:port; protocol is http or grpc. Connects once per url, until the process ends.

    timeout_s bounds every call over HTTP; over gRPC each call takes its own.
    """
    if protocol == "http":
        import tritonclient.http  # slow to import: a start of a server needs none of it

        return tritonclient.http.InferenceServerClient(url, network_timeout=timeout_s), tritonclient.http
    import tritonclient.grpc

    client = tritonclient.grpc.InferenceServerClient(url)
    atexit.register(client.close)  # a channel that is left to the interpreter's end can keep the process from ending
    return client, tritonclient.grpc


def default_url(protocol):
    """Where serve.sh starts by default."""
    return HTTP_URL if protocol == "http" else GRPC_URL


def make_inputs(module, tensors):
    """Arrays by name as tritonclient's inputs; strings are an object array of bytes, other types the array's own."""
    inputs = []
    for name, values in tensors.items():
        inputs.append(module.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype)))
        inputs[-1].set_data_from_numpy(values)
    return inputs


def infer(model, tensors, outputs, url, protocol="http", parameters=None, timeout_s=TIMEOUT_S, **tries):
    """Send arrays by name to a model, with the request's parameters; returns {output: array}.

    timeout_s: for each try. tries: what serving.retry takes; one try where nothing is said, since a measurement must see
    what is lost. Raises one of SERVER_ERRORS.
    """
    client, module = connect(url, protocol, timeout_s)
    requested = [module.InferRequestedOutput(name) for name in outputs]
    deadline = {} if protocol == "http" else {"client_timeout": timeout_s}
    options = {"outputs": requested, "parameters": parameters} | deadline
    response = retry(lambda: client.infer(model, make_inputs(module, tensors), **options), **({"tries": 1} | tries))
    return {name: response.as_numpy(name) for name in outputs}


def infer_graph(key, card, feeds, output, url):
    """A graph's output for token tensors by name; key: one of NAMES."""
    names = script_names(card) if key == TORCH else {}
    wanted = names.get(output, output)
    return infer(NAMES[key], {names.get(name, name): v for name, v in feeds.items()}, [wanted], url)[wanted]


def text_tensor(texts, names=(TEXT,)):
    """{TEXT: [texts, 1]} as infer takes it; texts are tuples where a task takes several strings."""
    columns = [texts] if len(names) == 1 else zip(*texts, strict=True)
    return {
        name: np.array([[text.encode()] for text in column], dtype=object)
        for name, column in zip(names, columns, strict=True)
    }


def read_config(model, url, protocol):
    """A model's config as the server has it, as a dict."""
    client, _ = connect(url, protocol)
    return (
        client.get_model_config(model) if protocol == "http" else client.get_model_config(model, as_json=True)["config"]
    )


def one_pass(service, url, protocol):
    """{"one_pass": what executes it, "reference_sha256"} of a service that executes its graph itself, else {}.

    Exits where the server cannot be asked.
    """
    check_url(url)
    try:
        parameters = read_config(service, url, protocol).get("parameters", {})
    except SERVER_ERRORS as error:
        raise SystemExit(
            f"{url}: expected {service} on a Triton server ({protocol}), found: {error}; ./serve.sh start"
        ) from None
    return {name: value["string_value"] for name, value in parameters.items()} if "one_pass" in parameters else {}


def key_of_engine(config):
    """Key of ENGINES of a model, from its config as the server shows it; None of a Python model or an ensemble."""
    shown = config.get("backend"), config.get("platform")
    return next((key for key, e in ENGINES.items() if key in shown or (e.platform and e.platform in shown)), None)


def computed_in(config, ours):
    """What OpenVINO makes of FP32: "" where it is forced, else how it is told, since by default it takes BF16."""
    parameters = {name: value.get("string_value") for name, value in config.get("parameters", {}).items()}
    if HINT_BF16 in parameters or parameters.get(PRECISION_HINT) == "bf16":
        return ", BF16"
    forced = ours and parameters.get(PRECISION_HINT) == "f32"  # the compiled backend reads no such parameter
    return "" if forced else ", BF16 where the CPU has it"


def executed_by(config):
    """What executes a model, from its config as the server shows it: "TensorRT, GPU", "ONNX Runtime, CPU"."""
    key = key_of_engine(config)
    if key is None:
        return config.get("backend") or config.get("platform") or "unknown"
    engine, ours = ENGINES[key], config.get("runtime") == "model.py"  # a Python-based backend of ours
    if key == "openvino":
        return f"{engine.stand_in}{computed_in(config, ours)}"
    if ours:
        emulated = [model.name for model in MODELS.values() if not PRECISIONS[model.precision].on_cpu]
        return f"{engine.stand_in}, emulated" if config.get("name") in emulated else engine.stand_in
    kinds = {group.get("kind", "KIND_AUTO").removeprefix("KIND_") for group in config.get("instance_group", [{}])}
    return f"{engine.title}, {'/'.join(sorted(kinds))}"


def check_url(url):
    """Exit unless the url is HOST:PORT."""
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SystemExit(f"--url: expected HOST:PORT, found {url}; leave scheme and path out")


def read_server(url, protocol, models):
    """{"name", "version", "protocol", "engines": {model's key: what executes it}}; exits unless all are ready.

    models: {key: name in the repository}, of which those without an engine (the tokenizer, an ensemble) are only
    asked whether they are ready.
    """
    check_url(url)
    try:
        client, _ = connect(url, protocol)
        for model in models.values():
            if not client.is_model_ready(model):
                raise SystemExit(
                    f"{url}: expected model {model} ready, found it is not; serve this repository, a service with ./serve.sh start --path ensemble"
                )
        metadata = client.get_server_metadata() if protocol == "http" else client.get_server_metadata(as_json=True)
        configs = {key: read_config(model, url, protocol) for key, model in models.items()}
    except SERVER_ERRORS as error:
        raise SystemExit(f"{url}: expected a Triton server ({protocol}), found: {error}; ./serve.sh start") from None
    engines = {key: executed_by(config) for key, config in configs.items() if key_of_engine(config)}
    return {key: metadata[key] for key in ("name", "version")} | {"protocol": protocol, "engines": engines}
