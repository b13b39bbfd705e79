#!/usr/bin/env python3
"""Measure how far each plan's embeddings are from the ONNX reference, through the server.

Reads:  a running server (./serve.sh start) of the task's own embedders, assets/texts.txt.
Writes: results/<model>/<machine>/quality.json (averages, engines) and quality.csv (every text).
Run:    ./client.py
Prints: a table of average deviations per plan, over real tokens only. --check fails if one is beyond the gate of its
        precision (core/tables.py). One row is emulated: what the FP32 plan answers where a GPU multiplies in TF32.
"""

import csv
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.arguments import make_parser
from core.files import REPOSITORY, RESULTS, TEXTS, read_texts, replace_when_done, split_texts, spread, write_json
from core.metrics import deviations
from core.onnx_runtime import open_session
from core.record import environment_record, results_folder
from core.repository import graph_path, is_own, read_card, read_graph, tokenizer_path
from core.tables import ATTENTION_MASK, EMBEDDERS, EMBEDDING, PRECISIONS, REFERENCE
from core.tokens import encode, load_tokenizer
from precision.makers import emulate_tf32
from serving.check import check_served
from serving.retry import TRIES
from serving.server import HTTP_URL, SERVER_ERRORS, default_url, infer, read_server, text_tensor

PLANS = [key for key in EMBEDDERS if key != REFERENCE]
MODELS = {"tokenizer": "tokenizer", **EMBEDDERS, "ensemble": "ensemble"}  # that the server must have
HELD_OUT = "texts.txt, the half that did not calibrate"
METRICS = ("max_abs_error", "mean_abs_error", "relative_l2_error", "mean_cosine", "argmax_flip_share")


# --- one text ------------------------------------------------------------------------


def call_triton(input_text, url=HTTP_URL, protocol="http"):
    """The five embeddings of a text: {"ONNX": float32 [1, length, outputs], "TRT_FP32": …}.

    Raises tritonclient's InferenceServerException if the server refuses the request, and
    OSError if it cannot be reached.
    """
    outputs = {key: f"{EMBEDDING}_{key}" for key in EMBEDDERS}
    answer = infer("ensemble", text_tensor([input_text]), outputs.values(), url, protocol, tries=TRIES)
    return {key: answer[output] for key, output in outputs.items()}


def compare(reference, candidate, mask):
    """Deviations of one plan for one text, or {"error": "…"} where its values are NaN or infinite."""
    try:
        return deviations(reference, candidate, mask)
    except ValueError as error:
        return {"error": str(error)}


def check_quality(input_text, url=HTTP_URL, protocol="http"):
    """Each plan's deviations from ONNX for one text: {"TRT_FP32": {"max_abs_error": …}, …}.

    Only real tokens count; the tokenizer model says which they are. A plan whose values
    are NaN or infinite gets {"error": "…"}.
    """
    embeddings = call_triton(input_text, url, protocol)
    mask = infer("tokenizer", text_tensor([input_text]), [ATTENTION_MASK], url, protocol)[ATTENTION_MASK]
    return {plan: compare(embeddings[REFERENCE], embeddings[plan], mask) for plan in PLANS}


def emulated_quality(repository, inputs, texts):
    """[deviations of FP32 as TF32 from FP32] per text, both executed in this process."""
    reference = read_graph(graph_path(repository, REFERENCE))
    sessions = [open_session(graph) for graph in (reference, emulate_tf32(reference))]
    tokenizer, rows = load_tokenizer(tokenizer_path(repository)), []
    for text in tqdm(texts, desc="FP32 as TF32", unit="text", mininterval=1):
        feeds = encode(tokenizer, [text], inputs)
        rows.append(compare(*(session.run([EMBEDDING], feeds)[0] for session in sessions), feeds[ATTENTION_MASK]))
    return rows


# --- all texts -----------------------------------------------------------------------


def average(rows):
    """Means over texts of one plan's deviations, the maximum of max_abs_error, and the worst text; or the error."""
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        return {"error": f"{len(errors)} of {len(rows)} texts: {errors[0]}"}
    result = {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
    result["max_abs_error"] = max(row["max_abs_error"] for row in rows)
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
    """One CSV line per text and plan: the deviations, or the error in the last column; texts: what to show of them."""
    with replace_when_done(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "plan", *METRICS, "tokens", "error"])
        writer.writeheader()
        for text, row in zip(texts, per_text, strict=True):
            for plan, values in row.items():
                numbers = {k: f"{v:.6g}" for k, v in values.items() if k != "error"}
                writer.writerow({"text": text, "plan": plan, "error": values.get("error")} | numbers)


def print_table(averages, engines, texts):
    """The averages as a table on stdout."""
    print(f"average over {texts} texts, real tokens only; reference: {REFERENCE} ({engines[REFERENCE]})")
    print(f"{'plan':13}{'max abs':>11}{'mean abs':>12}{'relative L2':>13}{'cosine':>11}{'flips':>9}  executed by")
    for plan, row in averages.items():
        if "error" in row:
            print(f"{plan:13} {row['error']}")
            continue
        values = f"{row['max_abs_error']:11.3e}{row['mean_abs_error']:12.3e}{row['relative_l2_error']:13.3e}"
        print(f"{plan:13}{values}{row['mean_cosine']:11.6f}{row['argmax_flip_share']:9.2%}  {engines[plan]}")
    print("max abs is the largest of all texts")


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--url", help=f"default: {default_url('http')} (http), {default_url('grpc')} (grpc)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument(
        "--texts", type=Path, help="one text a line; default: the lines of assets/texts.txt that did not calibrate"
    )
    parser.add_argument("--max-texts", type=int, help="use this many, evenly spread")
    parser.add_argument("--no-texts", action="store_true", help="only the texts' numbers in the results, no words")
    parser.add_argument("--check", action="store_true", help="fail if a plan is beyond the gate of its precision")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="what the server serves")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.url = args.url or default_url(args.protocol)
    if args.max_texts is not None and args.max_texts < 1:
        parser.error("--max-texts: expected at least 1")
    return args


def read_evaluation_texts(args):
    """The texts that measure: by default those that neither calibrate nor select in quantize.py."""
    return spread(read_texts(args.texts) if args.texts else split_texts(read_texts(TEXTS))[1], args.max_texts)


def measure(args, card, texts):
    """([{plan: deviations}] of each text, [those of FP32 as TF32])."""
    try:
        per_text = [
            check_quality(t, args.url, args.protocol) for t in tqdm(texts, desc="quality", unit="text", mininterval=1)
        ]
    except SERVER_ERRORS as error:
        raise SystemExit(f"{args.url}: expected an answer, found: {error}; ./serve.sh status, then its log") from None
    return per_text, emulated_quality(args.repository, card["inputs"], texts)


def main():
    args = parse_args()
    card = read_card(args.repository)
    if not is_own(args.repository):
        raise SystemExit(
            f"{args.repository}: expected the task's own five embedders, found a service of one task; measure it "
            "with verdicts.py"
        )
    texts = read_evaluation_texts(args)
    server = read_server(args.url, args.protocol, MODELS)
    check_served(args.repository, card, server, args.url, args.protocol)
    per_text, tf32 = measure(args, card, texts)
    averages = {plan: average([row[plan] for row in per_text]) for plan in PLANS}
    emulated = {"TF32": average(tf32)}
    record = {"model": card, "environment": environment_record(), "server": server}
    record |= {"texts": {"file": args.texts.name if args.texts else HELD_OUT, "count": len(texts)}}
    record |= {"averages": averages, "emulated": emulated}
    folder = results_folder(args.results, card)
    shown = [str(number) if args.no_texts else text[:40] for number, text in enumerate(texts, 1)]
    write_per_text(folder / "quality.csv", shown, per_text)
    write_json(folder / "quality.json", record)
    rows = {"FP32 as TF32": emulated["TF32"]}
    print_table(averages | rows, server["engines"] | dict.fromkeys(rows, "emulated on this CPU"), len(texts))
    print(folder / "quality.json")
    broken = [f"{plan}: {row['error']}" for plan, row in averages.items() if "error" in row]
    if broken:
        raise SystemExit("expected finite embeddings, found " + "; ".join(broken) + "; look at that model's graph")
    if args.check and (failed := failed_gates(averages)):
        raise SystemExit("; ".join(failed) + "; run quantize.py, or look at that plan")


if __name__ == "__main__":
    main()
