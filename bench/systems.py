"""The table of systems: how each is started, asked and read. A further peer is a row here and a file of requirements.

In a command and in its environment {…} stands for what the measurement fills in: python and bin of the peer's own
environment, model (folder of the checkpoint), repository, graph, tokenizer and service of the project's export, the
ports http, grpc and metrics, work (a folder to write into), threads (cores of this machine), servers and root.
"""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

SERVERS = Path(__file__).parent / "servers"
PROJECT, PUBLISHED, BY_HAND, NAMED = "project", "published", "by hand", "named by the user"
BATCH = 32  # the most texts that a peer joins: as many as ask at once


@dataclass(frozen=True)
class Ask:
    """How a server is asked over HTTP, and where label and score stand in its answer."""

    path: str
    body: object  # text -> what is sent as JSON
    read: object  # the answer, parsed -> (label, score)


def read_triton(answer):
    outputs = {output["name"]: output["data"][0] for output in answer["outputs"]}
    return outputs["LABEL"], outputs["SCORE"]


def read_mlserver(answer):
    """MLServer hands each answer on as JSON text inside its JSON."""
    return read_plain(json.loads(answer["outputs"][0]["data"][0]))


def read_plain(answer):
    return answer["label"], answer["score"]


def triton_body(text):
    wanted = [{"name": "LABEL"}, {"name": "SCORE"}]
    given = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    return {"inputs": [given], "outputs": wanted}


def mlserver_body(text):
    # under the name "args" of its documentation adaptive batching fails: every text becomes an argument of its own
    return {"inputs": [{"name": "inputs", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}


def any_body(given):
    """given: {input: text}."""
    inputs = [{"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [text]} for name, text in given.items()]
    return {"inputs": inputs}


def refused_body(text):
    """What a service refuses before it reads the text: a parameter that it does not have."""
    return triton_body(text) | {"parameters": {"no_such_parameter": 1}}


ANSWERED = ("answered", 0.0)  # of a service whose answers are not read

ASKS = {
    "any": Ask("/v2/models/{service}/infer", any_body, lambda answer: ANSWERED),
    "triton": Ask("/v2/models/{service}/infer", triton_body, read_triton),
    "refused": Ask("/v2/models/{service}/infer", refused_body, lambda answer: ANSWERED),
    "mlserver": Ask("/v2/models/classifier/infer", mlserver_body, read_mlserver),
    "infinity": Ask(
        "/classify",
        lambda text: {"model": "classifier", "input": [text]},
        lambda answer: read_plain(max(answer["data"][0], key=lambda row: row["score"])),
    ),
    "plain": Ask("/classify", lambda text: {"text": text}, read_plain),
    "list": Ask("/classify", lambda text: {"texts": [text]}, lambda answer: read_plain(answer[0])),
}


@dataclass(frozen=True)
class System:
    """One row. Systems of one command share a server."""

    name: str
    kind: str
    command: str
    ask: str = "plain"  # key of ASKS
    protocol: str = "http"
    requirements: str | None = None  # name of a file in bench/requirements/; None: the project's own packages
    settings: str = ""  # what was set, in words
    environment: dict = field(default_factory=dict)


SERVE = "{root}/serve.sh run --device cpu --http-port {http} --grpc-port {grpc} --metrics-port {metrics} --model-repository "
OWN = SERVE + "{repository} --engine onnxruntime --precision ONNX"
TORCH = {"OMP_NUM_THREADS": "{threads}", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
INFINITY = (
    "v2 --model-id %s --served-model-name classifier --host 127.0.0.1 --port {http} --device cpu --batch-size 32 "
)
INFINITY_ENV = TORCH | {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"}
UVICORN = (
    "{python} {servers}/%s --model {model} --graph {graph} --tokenizer {tokenizer} --port {http} --threads {threads}"
)

SYSTEMS = (
    System("project", PROJECT, OWN, "triton", settings="FP32, whatever the repository's choice"),
    System("project, gRPC", PROJECT, OWN, "triton", "grpc", settings="the same server"),
    System(
        "infinity, torch", PUBLISHED, "{bin}/infinity_emb " + INFINITY % "{model}" + "--engine torch --no-bettertransformer --no-compile",
        "infinity", requirements="infinity", environment=INFINITY_ENV,
        settings="batch 32, a torch thread per core, neither BetterTransformer nor compile",
    ),
    System(
        "infinity, ONNX", PUBLISHED, "{python} {servers}/infinity_onnx.py {model} {work}/model " + INFINITY % "{work}/model" + "--engine optimum --no-model-warmup",
        "infinity", requirements="infinity", environment=INFINITY_ENV,
        settings="batch 32, its own fusing optimizer, on the graph that optimum exports; its loader mended; no warm-up of its own, whose text is longer than the model",
    ),
    System(
        "LitServe", PUBLISHED, UVICORN % "litserve_api.py", requirements="litserve", environment=TORCH,
        settings="torch, 1 worker, batch 32, 2 ms, fast queue",
    ),
    System(
        "BentoML", PUBLISHED, "{bin}/bentoml serve bentoml_service:Classifier --working-dir {servers} --host 127.0.0.1 --port {http}",
        "list", requirements="bentoml", settings="torch, 1 worker, batch 32, adaptive within 1 s",
        environment=TORCH | {"CHECKPOINT": "{model}", "BENTOML_HOME": "{work}", "BENTOML_DO_NOT_TRACK": "True"},
    ),
    System(
        "MLServer", PUBLISHED, "{bin}/mlserver start {servers}/mlserver", "mlserver", requirements="mlserver",
        settings="its Hugging Face runtime in torch, batch 32, 2 ms, no parallel workers",
        environment=TORCH | {
            "MLSERVER_HOST": "127.0.0.1", "MLSERVER_HTTP_PORT": "{http}", "MLSERVER_GRPC_PORT": "{grpc}",
            "MLSERVER_METRICS_PORT": "{metrics}", "MLSERVER_MODEL_HUGGINGFACE_TASK": "text-classification",
            "MLSERVER_MODEL_HUGGINGFACE_PRETRAINED_MODEL": "{model}",
        },
    ),
    System(
        "FastAPI + pipeline", PUBLISHED, UVICORN % "fastapi_pipeline.py", requirements="fastapi", environment=TORCH,
        settings="transformers' pipeline in a synchronous endpoint, a torch thread per core, no batching",
    ),
    System(
        "FastAPI + ONNX Runtime", BY_HAND, UVICORN % "fastapi_onnx.py", requirements="fastapi",
        settings="the project's graph; whatever waits is the next batch, at most 32; a thread per core, no spinning",
    ),
)  # fmt: skip


def hide_paths(text):
    """A text with only the names of absolute paths: where they lay is nobody's business."""
    return re.sub(r"(?<![\w.])(?:/[^/\s'\":,;=]+)+/([^/\s'\":,;=]+)", r"…/\1", text)


def named_system(text):
    """A row of --system NAME=REPOSITORY [options of serve.sh] or NAME=COMMAND; raises ValueError for another text.

    The command is that of a Triton server in the foreground, with {http}, {grpc} and {metrics} for its ports.
    """
    name, _, value = text.partition("=")
    words = shlex.split(value)
    if not name.strip() or not words:
        raise ValueError(text)
    folder = Path(words[0])
    command = value
    if folder.is_dir():
        command = SERVE + shlex.join([str(folder.resolve()), *words[1:]])
    elif "{http}" not in command:
        raise ValueError(text)
    return System(name.strip(), NAMED, command, "triton", settings=hide_paths(value))
