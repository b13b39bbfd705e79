"""Logits of a classifier's models for texts: the original in torch, graphs in process or through a server."""

import sys
import time

import numpy as np
import onnxruntime
import torch
import tritonclient.http
from tqdm import tqdm

from client import SERVER_ERRORS
from core.checkpoint import load_tokenizer
from core.files import sha256, spread
from core.onnx_runtime import open_session
from core.sources import find_folders
from core.tables import EMBEDDERS, LOGITS, REFERENCE, TEXT
from core.tokens import encode, load_served_tokenizer
from serving.classifier_repository import engine_of, present
from tasks.classifier import Classifier, load_model

SAME_MODEL_ERROR = 0.05  # of a logit; FP32 arithmetic stays far below, another model far above
SAME_GRAPH_ERROR = 1e-4  # of a logit; the same graph, tokens, batch and runtime give next to the same numbers
SERVED_ENGINE = "ONNX Runtime, CPU"  # what executes the graphs in process too
SPEED_TEXTS = 64  # one request each, the models in turn


def progress(items, name):
    """tqdm on stderr."""
    return tqdm(items, desc=name, unit="batch", mininterval=1, file=sys.stderr)


def models_to_judge(repository):
    """Suffixes of the graphs to compare. FP32's is the reference itself, unless it has a plan."""
    reference = repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    if not reference.is_file():
        raise SystemExit(
            f"{reference}: expected the graph that the others are compared with, found none; "
            "name the repository that torch2onnx.py wrote, not a package"
        )
    suffixes = []
    for suffix in present(repository):
        path = repository / EMBEDDERS[suffix] / "1" / "model.onnx"
        twin = suffix != REFERENCE and sha256(path) == sha256(reference)
        if not twin or engine_of(repository, suffix) == "plan":
            suffixes.append(suffix)
    return suffixes


def by_length(texts, size):
    """Batches of indices, texts of like length together: little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def gather(texts, size, name, answer):
    """answer(batch of texts) -> {key: rows}, for all texts: {key: array in the order of the texts}."""
    columns = {}
    for batch in progress(by_length(texts, size), name):
        for key, rows in answer([texts[i] for i in batch]).items():
            column = columns.setdefault(key, np.empty((len(texts), *rows.shape[1:]), rows.dtype))
            column[batch] = rows
    return columns


# --- the original --------------------------------------------------------------------


def torch_logits(args, card, texts):
    """float32 [texts, classes] of the original checkpoint, with its own tokenizer."""
    folder, tokenizer_folder, _ = find_folders(args)
    model = load_model(folder)
    if model.config.num_labels != len(card["labels"]):
        raise SystemExit(
            f"--model: expected the checkpoint behind {args.repository}, with {len(card['labels'])} classes; "
            f"found one with {model.config.num_labels}"
        )
    tokenizer = load_tokenizer(tokenizer_folder, card["max_length"])
    classifier = Classifier(model, card["inputs"]).eval()

    def answer(batch):
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=card["max_length"], return_tensors="pt")
        with torch.inference_mode():
            return {"torch": classifier(*(tokens[name] for name in classifier.names)).numpy()}

    return gather(texts, args.batch_size, "torch", answer)["torch"]


# --- in process ----------------------------------------------------------------------


class InProcess:
    """The repository's graphs, executed here."""

    def __init__(self, repository, card, suffixes):
        onnxruntime.set_default_logger_severity(3)  # it warns of constants that a graph does not need
        self.tokenizer = load_served_tokenizer(repository / "tokenizer" / "tokenizer.json")
        self.inputs = card["inputs"]
        self.sessions = {s: open_session(repository / EMBEDDERS[s] / "1" / "model.onnx") for s in suffixes}
        self.engines = dict.fromkeys(suffixes, "ONNX Runtime, CPU, in process")
        self.record = None

    def tokenize(self, texts):
        """{input: int64 [texts, length]}"""
        return encode(self.tokenizer, texts, self.inputs)

    def logits(self, suffix, feeds):
        """float32 [texts, classes]"""
        return self.sessions[suffix].run([LOGITS], feeds)[0]


# --- through the server --------------------------------------------------------------


class Served:
    """The same models behind a Triton server; the service's own tokenizer makes the tokens."""

    def __init__(self, url, card, suffixes):
        if "/" in url or ":" not in url:
            raise SystemExit(f"--url: expected HOST:PORT, found {url}; leave scheme and path out")
        self.url, self.inputs = url, card["inputs"]
        self.client = tritonclient.http.InferenceServerClient(url, network_timeout=600.0)
        self.engines = {}
        try:
            metadata = self.client.get_server_metadata()
            for model in ("tokenizer", *(EMBEDDERS[s] for s in suffixes)):
                if not self.client.is_model_ready(model):
                    raise SystemExit(
                        f"{url}: expected model {model} ready, found it is not; serve this repository: ./serve.sh start --model-repository …"
                    )
            for suffix in suffixes:
                self.engines[suffix] = self.read_engine(EMBEDDERS[suffix])
            config = self.client.get_model_config("tokenizer")
        except SERVER_ERRORS as error:
            raise SystemExit(f"{url}: expected a Triton server (http), found: {error}; ./serve.sh start") from None
        self.max_batch_size = config["max_batch_size"]
        self.record = {key: metadata[key] for key in ("name", "version")}

    def read_engine(self, model):
        """What executes a model, read back from the server's config."""
        config = self.client.get_model_config(model)
        if config.get("runtime") == "model.py":  # our Python-based backends
            return SERVED_ENGINE
        kind = config["instance_group"][0].get("kind", "KIND_CPU").removeprefix("KIND_")
        return f"{'TensorRT' if config['platform'] == 'tensorrt_plan' else 'ONNX Runtime'}, {kind}"

    def infer(self, model, tensors, outputs):
        """Arrays by name from arrays by name."""
        inputs = []
        for name, values in tensors.items():
            kind = "BYTES" if values.dtype == object else "INT64"
            tensor = tritonclient.http.InferInput(name, list(values.shape), kind)
            tensor.set_data_from_numpy(values)
            inputs.append(tensor)
        wanted = [tritonclient.http.InferRequestedOutput(name) for name in outputs]
        try:
            response = self.client.infer(model, inputs, outputs=wanted)
        except SERVER_ERRORS as error:
            raise SystemExit(
                f"{self.url}: expected an answer of {model}, found: {error}; ./serve.sh status, then its log"
            ) from None
        return {name: response.as_numpy(name) for name in outputs}

    def tokenize(self, texts):
        """{input: int64 [texts, length]}"""
        values = np.array([[text.encode()] for text in texts], dtype=object)
        return self.infer("tokenizer", {TEXT: values}, self.inputs)

    def logits(self, suffix, feeds):
        """float32 [texts, classes]"""
        return self.infer(EMBEDDERS[suffix], feeds, [LOGITS])[LOGITS]


def comparable(engines):
    """Suffixes of the models that a server executes as this process does, and of the reference."""
    return [s for s, engine in engines.items() if engine == SERVED_ENGINE or s == REFERENCE]


def check_served_models(served, own, repository, texts):
    """Exit if the server answers otherwise than the graphs in the repository; a plan is not compared."""
    texts = spread(texts, min(8, served.max_batch_size))
    feeds = served.tokenize(texts)
    expected, found = own.logits(REFERENCE, own.tokenize(texts)), served.logits(REFERENCE, feeds)
    error = float(np.abs(found - expected).max()) if found.shape == expected.shape else f"shapes {found.shape}"
    if isinstance(error, str) or not error <= SAME_MODEL_ERROR:
        raise SystemExit(
            f"{served.url}: expected the model of the repository, found another (logits differ by {error}); "
            "./serve.sh stop, then start it with --model-repository"
        )
    # the same batch and padding on both sides: others change the order of sums, and with it what INT8 rounds to
    for suffix in comparable(served.engines):
        bound = SAME_GRAPH_ERROR if served.engines[suffix] == SERVED_ENGINE else SAME_MODEL_ERROR
        found, expected = served.logits(suffix, feeds), own.logits(suffix, feeds)
        # NaN on both sides is the graph's own fault, and named later
        if not np.allclose(found, expected, rtol=0, atol=bound, equal_nan=True):
            raise SystemExit(
                f"{served.url}: expected the graph {repository / EMBEDDERS[suffix] / '1' / 'model.onnx'}, found another in "
                f"the server (logits differ by {np.abs(found - expected).max():.3g}); ./serve.sh stop, then start it again"
            )


# --- all of them ---------------------------------------------------------------------


def model_logits(source, suffixes, texts, batch_size):
    """{suffix: float32 [texts, classes]}; every model gets the same tokens."""

    def answer(batch):
        feeds = source.tokenize(batch)
        return {suffix: source.logits(suffix, feeds) for suffix in suffixes}

    return gather(texts, batch_size, "graphs", answer)


def measure_latency(source, suffixes, texts):
    """{suffix: p50 in ms} of one text a request, after a warm-up; the models in turn, so that all see the same machine."""
    texts = spread(texts, SPEED_TEXTS)
    times = {suffix: [] for suffix in suffixes}
    for round_, text in enumerate([texts[0], *texts]):
        feeds = source.tokenize([text])
        for suffix in suffixes:
            started = time.perf_counter()
            source.logits(suffix, feeds)
            if round_:
                times[suffix].append((time.perf_counter() - started) * 1e3)
    return {suffix: float(np.median(values)) for suffix, values in times.items()}
