"""Logits of a classifier's models for texts: the original in torch, graphs in process or through a server."""

import sys
import time
from argparse import Namespace
from collections import namedtuple

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm

from core.files import sha256, spread
from core.onnx_runtime import open_session
from core.repository import engine_of, graph_path, present, script_path, tokenizer_path
from core.tables import ENGINES, LOGITS, MODELS, NAMES, PRECISIONS, REFERENCE, TORCH
from core.tokens import encode, load_tokenizer
from serving.server import SERVER_ERRORS, infer, infer_graph, read_config, read_server, text_tensor
from tasks import heads

SAME_MODEL_ERROR = 0.05  # of a logit; FP32 arithmetic stays far below, another model far above
SAME_GRAPH_ERROR = 1e-4  # of a logit; the same graph, tokens, batch and runtime give next to the same numbers
OWN_ENGINE = ENGINES["onnxruntime"].stand_in  # what executes the graphs in process too
SPEED_TEXTS = 64  # one request each, the models in turn

# what answers: tokenize(texts) -> {input: int64 [texts, length]}; logits(key, feeds) -> float32 [texts, classes];
# {key: what executes it}; the server's record, or None in process; the most texts in one request, or None
Source = namedtuple("Source", "tokenize logits engines record max_batch_size")


def models_to_judge(repository, card):
    """Keys of the graphs to compare. FP32's is the reference itself, unless it has a plan."""
    reference = graph_path(repository, REFERENCE)
    if not reference.is_file():
        raise SystemExit(
            f"{reference}: expected the graph that the others are compared with, found none; "
            "name the repository that torch2onnx.py wrote, not a package"
        )
    digest = sha256(reference)

    def is_twin(key):
        return engine_of(repository, card, key) != "tensorrt" and sha256(graph_path(repository, key)) == digest

    return [key for key in present(repository) if key == REFERENCE or not is_twin(key)]


def gather(texts, size, name, answer):
    """answer(batch of texts) -> {key: rows}, for all texts: {key: array in the order of the texts}.

    Texts of like length share a batch, which takes little padding.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    columns = {}
    for start in tqdm(range(0, len(order), size), desc=name, unit="batch", mininterval=1, file=sys.stderr):
        batch = order[start : start + size]
        for key, rows in answer([texts[i] for i in batch]).items():
            column = columns.setdefault(key, np.empty((len(texts), *rows.shape[1:]), rows.dtype))
            column[batch] = rows
    return columns


def torch_logits(args, card, texts):
    """float32 [texts, classes] of the original checkpoint, with its own tokenizer."""
    length = card["max_length"]
    options = {"task": card["task"], "max_length": length, "labels": card["labels"], "hidden_state": False}
    options |= {"random_weights": False, "packaged_if_offline": False}
    module, tokenizer, found = heads.load(Namespace(**vars(args) | options))
    for what, key, show in (("classes", "labels", len), ("weights", "weights_sha256", lambda digest: digest[:12])):
        if card.get(key) and show(found.get(key, card[key])) != show(card[key]):
            raise SystemExit(
                f"--model: expected the checkpoint behind {args.repository}, with {what} {show(card[key])}; "
                f"found one with {show(found[key])}; name the one that was exported"
            )

    def answer(batch):
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            return {"torch": module(*(tokens[name.lower()] for name in card["inputs"])).numpy()}

    return gather(texts, args.batch_size, "torch", answer)["torch"]


# --- the graphs ----------------------------------------------------------------------


def open_here(repository, card, keys):
    """Source of the repository's graphs, executed in this process."""
    onnxruntime.set_default_logger_severity(3)  # it warns of constants that a graph does not need
    tokenizer = load_tokenizer(tokenizer_path(repository))
    sessions = {key: open_session(graph_path(repository, key)) for key in keys}
    return Source(
        lambda texts: encode(tokenizer, texts, card["inputs"]),
        lambda key, feeds: sessions[key].run([LOGITS], feeds)[0],
        {k: f"{OWN_ENGINE}, in process" + ", emulated" * (not PRECISIONS[MODELS[k].precision].on_cpu) for k in keys},
        None,
        None,
    )


def open_server(url, card, keys):
    """Source of the same models behind a Triton server, whose own tokenizer makes the tokens."""
    models = {key: NAMES[key] for key in keys}
    record = read_server(url, "http", models | {"tokenizer": "tokenizer"})

    def ask(model, question, *arguments):
        try:
            return question(*arguments, url)
        except SERVER_ERRORS as error:
            raise SystemExit(
                f"{url}: expected an answer of {model}, found: {error}; ./serve.sh status, then its log"
            ) from None

    return Source(
        lambda texts: ask("tokenizer", infer, "tokenizer", text_tensor(texts), card["inputs"]),
        lambda key, feeds: ask(models[key], infer_graph, key, card, feeds, LOGITS),
        record.pop("engines"),
        record,
        read_config("tokenizer", url, "http")["max_batch_size"],
    )


def check_served_models(served, args, card, texts):
    """Exit if the server answers otherwise than the graphs in the repository; a plan is not compared."""
    compared = [key for key, engine in served.engines.items() if engine == OWN_ENGINE or key == REFERENCE]
    own = open_here(args.repository, card, compared)
    texts = spread(texts, min(8, served.max_batch_size))
    feeds = served.tokenize(texts)
    expected, found = own.logits(REFERENCE, own.tokenize(texts)), served.logits(REFERENCE, feeds)
    if found.shape != expected.shape or not np.abs(found - expected).max() <= SAME_MODEL_ERROR:
        raise SystemExit(
            f"{args.url}: expected the model of the repository, found another (its logits differ); "
            "./serve.sh stop, then start it with --model-repository"
        )
    # the same batch and padding on both sides: others change the order of sums, and with it what INT8 rounds to
    for key in compared:
        bound = SAME_GRAPH_ERROR if served.engines[key] == OWN_ENGINE else SAME_MODEL_ERROR
        found, expected = served.logits(key, feeds), own.logits(key, feeds)
        # NaN on both sides is the graph's own fault, and named later
        if not np.allclose(found, expected, rtol=0, atol=bound, equal_nan=True):
            raise SystemExit(
                f"{args.url}: expected the graph {graph_path(args.repository, key)}, found another in "
                f"the server (logits differ by {np.abs(found - expected).max():.3g}); ./serve.sh stop, then start it again"
            )


def served_torch(source, args, card, texts):
    """Logits of the original checkpoint through the server, which has it as a TorchScript; exits if it is another."""

    def ask(texts, size):
        return gather(texts, size, "torch", lambda batch: {TORCH: source.logits(TORCH, source.tokenize(batch))})[TORCH]

    few = spread(texts, 8)
    expected, found = torch_logits(args, card, few), ask(few, 1)
    if not np.abs(found - expected).max() <= SAME_GRAPH_ERROR:
        raise SystemExit(
            f"{args.url}: expected {NAMES[TORCH]} to be --model, found another (its logits differ by "
            f"{np.abs(found - expected).max():.3g}); name the one that was exported"
        )
    return ask(texts, min(args.batch_size, source.max_batch_size))


def collect(args, card, texts, keys):
    """(source of the graphs' answers, {model: float32 [texts, classes]} of torch and of every graph).

    torch is asked through the server too where its repository has the checkpoint as a TorchScript.
    """
    if args.url:
        script = [TORCH] if script_path(args.repository).is_file() else []
        source = open_server(args.url, card, [*keys, *script])
        check_served_models(source, args, card, texts)
    else:
        source = open_here(args.repository, card, keys)
    served = TORCH in source.engines
    reference = served_torch(source, args, card, texts) if served else torch_logits(args, card, texts)

    def answer(batch):
        feeds = source.tokenize(batch)  # every model gets the same tokens
        return {key: source.logits(key, feeds) for key in keys}

    logits = gather(texts, min(args.batch_size, source.max_batch_size or args.batch_size), "graphs", answer)
    error = float(np.abs(logits[REFERENCE] - reference).max())
    if not error <= SAME_MODEL_ERROR:
        raise SystemExit(
            f"--model: expected the checkpoint behind {args.repository}, found another (logits differ by {error:.3g}); "
            "name the one that was exported"
        )
    for key, values in logits.items():
        if not np.isfinite(values).all():
            raise SystemExit(f"{NAMES[key]}: expected finite logits, found NaN or infinity; run quantize.py again")
    return source, {"torch": reference, **logits}


def measure_latency(source, keys, texts):
    """{key: p50 in ms} of one text a request, after a warm-up; the models in turn, so that all see the same machine."""
    texts = spread(texts, SPEED_TEXTS)
    times = {key: [] for key in keys}
    for round_, text in enumerate([texts[0], *texts]):
        feeds = source.tokenize([text])
        for key in keys:
            started = time.perf_counter()
            source.logits(key, feeds)
            if round_:
                times[key].append((time.perf_counter() - started) * 1e3)
    return {key: float(np.median(values)) for key, values in times.items()}
