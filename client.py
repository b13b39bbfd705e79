#!/usr/bin/env python3
"""Measure how far each plan's embeddings are from the ONNX reference, through the server.

Reads:  a running server (./serve.sh start), assets/texts.txt, assets/model.json.
Writes: results/<model>/quality.json (averages, engines) and quality.csv (every text).
Run:    ./client.py
Prints: a table of average deviations per plan, over real tokens only. --check fails if one
        is beyond the bounds of its precision (GATES in common.py).
"""

import argparse
import csv
import functools
from http.client import HTTPException
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tqdm import tqdm
from tritonclient.utils import InferenceServerException

from core.files import (
    ASSETS,
    REPOSITORY,
    RESULTS,
    TEXTS,
    read_json,
    read_texts,
    replace_when_done,
    split_texts,
    spread,
    write_json,
)
from core.metrics import deviations
from core.onnx_runtime import open_session
from core.record import environment_record
from core.tables import ATTENTION_MASK, EMBEDDERS, EMBEDDING, INPUT_IDS, PRECISIONS, REFERENCE, TEXT
from serving.repository import check_served_plans

HTTP_URL, GRPC_URL = "127.0.0.1:8000", "127.0.0.1:8001"
PLANS = [suffix for suffix in EMBEDDERS if suffix != REFERENCE]
SAME_MODEL_L2 = 0.05  # TF32 on a GPU stays far below, another model far above
HELD_OUT = "texts.txt, the half that did not calibrate"
METRICS = ("max_abs_error", "mean_abs_error", "relative_l2_error", "mean_cosine", "argmax_flip_share")


# what tritonclient raises where the server is gone, refuses, or the url is no host:port
SERVER_ERRORS = (OSError, HTTPException, InferenceServerException)


# --- the server ----------------------------------------------------------------------


@functools.cache
def connect(url, protocol):
    """(client, its module) for host:port; protocol is http or grpc. Connects once."""
    module = tritonclient.http if protocol == "http" else tritonclient.grpc
    return module.InferenceServerClient(url), module


def infer(model, input_text, outputs, url, protocol):
    """Send one text to `model`; returns {output: array [1, …]}."""
    client, module = connect(url, protocol)
    tensor = module.InferInput(TEXT, [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[input_text.encode()]], dtype=object))
    response = client.infer(model, [tensor], outputs=[module.InferRequestedOutput(name) for name in outputs])
    return {name: response.as_numpy(name) for name in outputs}


def call_triton(input_text, url=HTTP_URL, protocol="http"):
    """The five embeddings of a text: {"ONNX": float32 [1, length, outputs], "TRT_FP32": …}.

    Raises tritonclient's InferenceServerException if the server refuses the request, and
    OSError if it cannot be reached.
    """
    answer = infer("ensemble", input_text, [f"{EMBEDDING}_{suffix}" for suffix in EMBEDDERS], url, protocol)
    return {suffix: answer[f"{EMBEDDING}_{suffix}"] for suffix in EMBEDDERS}


def check_quality(input_text, url=HTTP_URL, protocol="http"):
    """Each plan's deviations from ONNX for one text: {"TRT_FP32": {"max_abs_error": …}, …}.

    Only real tokens count; the tokenizer model says which they are. A plan whose values
    are NaN or infinite gets {"error": "…"}.
    """
    embeddings = call_triton(input_text, url, protocol)
    mask = infer("tokenizer", input_text, [ATTENTION_MASK], url, protocol)[ATTENTION_MASK]
    result = {}
    for plan in PLANS:
        try:
            result[plan] = deviations(embeddings[REFERENCE], embeddings[plan], mask)
        except ValueError as error:
            result[plan] = {"error": str(error)}
    return result


def read_engines(url, protocol):
    """{suffix: what executed it}, read back from the server's model configs."""
    client, _ = connect(url, protocol)
    engines = {}
    for suffix, model in EMBEDDERS.items():
        config = (
            client.get_model_config(model)
            if protocol == "http"
            else client.get_model_config(model, as_json=True)["config"]
        )
        if config.get("runtime") == "model.py":  # our Python-based backends
            engines[suffix] = "ONNX Runtime, CPU"
        else:
            kind = config["instance_group"][0].get("kind", "KIND_CPU").removeprefix("KIND_")
            engines[suffix] = f"{'TensorRT' if config['platform'] == 'tensorrt_plan' else 'ONNX Runtime'}, {kind}"
    return engines


def read_server(url, protocol):
    """Name, version and engines of the server; exits if it or a model is not ready."""
    if "/" in url or ":" not in url:
        raise SystemExit(f"--url: expected HOST:PORT, found {url}; leave scheme and path out")
    try:
        client, _ = connect(url, protocol)
        for model in ("tokenizer", *EMBEDDERS.values(), "ensemble"):
            if not client.is_model_ready(model):
                raise SystemExit(
                    f"{url}: expected model {model} ready, found it is not; ./serve.sh status, then its log"
                )
        metadata = client.get_server_metadata() if protocol == "http" else client.get_server_metadata(as_json=True)
        record = {key: metadata[key] for key in ("name", "version")}
        return record | {"protocol": protocol, "engines": read_engines(url, protocol)}
    except SERVER_ERRORS as error:
        raise SystemExit(f"{url}: expected a Triton server ({protocol}), found: {error}; ./serve.sh start") from None


def check_served_model(repository, url, protocol):
    """Exit if the server's reference answers otherwise than the graph in the repository.

    A server that was started before another export would be measured under its name.
    """
    path = repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    if not path.is_file():
        raise SystemExit(f"{path}: expected the graph that is served, found none; run torch2onnx.py")
    text = "Is the model behind the server the one in the repository?"
    try:
        served = call_triton(text, url, protocol)[REFERENCE]
        feeds = infer("tokenizer", text, [INPUT_IDS, ATTENTION_MASK], url, protocol)
        own = open_session(path).run([EMBEDDING], feeds)[0]
        error = deviations(own, served, feeds[ATTENTION_MASK])["relative_l2_error"]
    except SERVER_ERRORS as error:
        raise SystemExit(f"{url}: expected an answer, found: {error}; ./serve.sh status, then its log") from None
    except Exception as found:  # ONNX Runtime on ids that the other model's tokenizer made; ValueError on shapes
        error = str(found)
    if isinstance(error, str) or error > SAME_MODEL_L2:
        raise SystemExit(
            f"{url}: expected the model in {path}, found another (relative L2 error {error}); ./serve.sh stop, then start"
        )


# --- the averages --------------------------------------------------------------------


def average(per_text, plan):
    """Mean over texts of each deviation of `plan`, and the worst text; or the error."""
    rows = [row[plan] for row in per_text]
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        return {"error": f"{len(errors)} of {len(rows)} texts: {errors[0]}"}
    result = {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
    result["worst_relative_l2_error"] = max(row["relative_l2_error"] for row in rows)
    result["tokens"] = sum(row["tokens"] for row in rows)
    return result


def failed_gates(averages):
    """One line per plan whose averages are beyond the bounds of its precision."""
    failed = []
    for plan, row in averages.items():
        gate = PRECISIONS[plan.removeprefix("TRT_")].gate
        l2, cosine = row.get("relative_l2_error", np.inf), row.get("mean_cosine", -1.0)
        if not (l2 <= gate["relative_l2_error"] and cosine >= gate["mean_cosine"]):
            failed.append(
                f"{plan}: expected relative L2 error at most {gate['relative_l2_error']:g} and mean cosine at least "
                f"{gate['mean_cosine']:g}, found {l2:.3g} and {cosine:.5f}"
            )
    return failed


def write_per_text(path, texts, per_text):
    """One CSV line per text and plan: the deviations, or the error in the last column."""
    with replace_when_done(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "plan", *METRICS, "tokens", "error"])
        writer.writeheader()
        for text, row in zip(texts, per_text, strict=True):
            for plan, values in row.items():
                numbers = {k: f"{v:.6g}" for k, v in values.items() if k != "error"}
                writer.writerow({"text": text[:40], "plan": plan, "error": values.get("error")} | numbers)


def print_table(averages, engines, texts):
    """The averages as a table on stdout."""
    print(f"average over {texts} texts, real tokens only; reference: {REFERENCE} ({engines[REFERENCE]})")
    print(f"{'plan':10}{'max abs':>12}{'mean abs':>12}{'relative L2':>13}{'cosine':>11}{'flips':>9}  executed by")
    for plan, row in averages.items():
        if "error" in row:
            print(f"{plan:10} {row['error']}")
            continue
        values = f"{row['max_abs_error']:12.3e}{row['mean_abs_error']:12.3e}{row['relative_l2_error']:13.3e}"
        print(f"{plan:10}{values}{row['mean_cosine']:11.6f}{row['argmax_flip_share']:9.2%}  {engines[plan]}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help=f"default: {HTTP_URL} (http), {GRPC_URL} (grpc)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument(
        "--texts", type=Path, help="one text a line; default: the lines of assets/texts.txt that did not calibrate"
    )
    parser.add_argument("--max-texts", type=int, help="use this many, evenly spread")
    parser.add_argument("--check", action="store_true", help="fail if a plan is beyond the bounds of its precision")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="where the served plans' manifests lie")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.url = args.url or (HTTP_URL if args.protocol == "http" else GRPC_URL)
    if args.max_texts is not None and args.max_texts < 1:
        parser.error("--max-texts: expected at least 1")
    return args


def main():
    args = parse_args()
    card = read_json(args.assets / "model.json", "run torch2onnx.py")
    texts = read_texts(args.texts) if args.texts else split_texts(read_texts(TEXTS))[1]
    texts = spread(texts, args.max_texts)
    server = read_server(args.url, args.protocol)
    check_served_plans(args.repository, card["reference_sha256"], server)
    check_served_model(args.repository, args.url, args.protocol)
    try:
        per_text = [
            check_quality(t, args.url, args.protocol) for t in tqdm(texts, desc="quality", unit="text", mininterval=1)
        ]
    except SERVER_ERRORS as error:
        raise SystemExit(f"{args.url}: expected an answer, found: {error}; ./serve.sh status, then its log") from None
    averages = {plan: average(per_text, plan) for plan in PLANS}
    folder = args.results / card["slug"]
    record = {
        "model": card,
        "environment": environment_record(),
        "server": server,
        "texts": {"file": args.texts.name if args.texts else HELD_OUT, "count": len(texts)},
        "averages": averages,
    }
    write_per_text(folder / "quality.csv", texts, per_text)
    write_json(folder / "quality.json", record)
    print_table(averages, server["engines"], len(texts))
    print(folder / "quality.json")
    broken = [f"{plan}: {row['error']}" for plan, row in averages.items() if "error" in row]
    if broken:
        raise SystemExit("expected finite embeddings, found " + "; ".join(broken) + "; look at that model's graph")
    if args.check and (failed := failed_gates(averages)):
        raise SystemExit("; ".join(failed) + "; run quantize.py, or look at that plan")


if __name__ == "__main__":
    main()
