#!/usr/bin/env python3
"""Compile every graph with TensorRT's own parser and builder, without a GPU.

Reads:  model_repository/model_ONNX and model_TRT_*/1/model.onnx.
Writes: results/<model>/compile.json.
Run:    ./compile_check.py
Prints: one line per graph and GPU architecture: compiled or refused, seconds.

TensorRT for RTX builds for a named architecture on any machine. It is strongly typed, as
TensorRT 11 is: mixed types, UINT8 and asymmetric Q/DQ are refused. Its engines do not
load in Triton; this checks the graphs, build_trt.sh makes the plans.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from core.files import ASSETS, REPOSITORY, RESULTS, read_json, sha256, write_json
from core.record import environment_record
from core.tables import EMBEDDERS, MAX_BATCH_SIZE
from serving.classifier_repository import is_classifier

ARCHITECTURES = ("SM80", "SM86", "SM89", "SM120")  # A100; A10, RTX 30; L4, RTX 40; RTX 50
OPT_BATCH = 4  # as build_trt.sh
LENGTHS = (1, 128, 512)  # tokens; a classifier's card says its limit


def load_tensorrt():
    """The module, or an exit that says what to install."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise SystemExit(
            f"tensorrt_rtx: expected the package, found: {error}; pip install -r requirements.txt"
        ) from None
    return tensorrt_rtx


def quiet_logger(trt, messages):
    """A logger that keeps errors in a list instead of printing them."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    return Logger()


def compile_graph(trt, path, architecture, lengths=LENGTHS):
    """Parse and build one graph for one architecture. Returns None, or the error's text.

    lengths: smallest, optimal and largest, for a graph whose sequence length is dynamic.
    """
    messages = []
    logger = quiet_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "not parsed"
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        shapes = zip((1, OPT_BATCH, MAX_BATCH_SIZE), lengths, strict=True)
        profile.set_shape(tensor.name, *((b, *(n if d == -1 else d for d in rest)) for b, n in shapes))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    if builder.build_serialized_network(network, config) is None:
        return "; ".join(messages) or "not built"
    return None


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path, nargs="*", help="other ONNX files; their result is printed only")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, help="default: assets/; a classifier's repository is its own")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.assets = args.assets or (args.repository if is_classifier(args.repository) else ASSETS)
    return args


def main():
    args = parse_args()
    trt = load_tensorrt()
    graphs = {str(path): path for path in args.graphs} or {
        suffix: args.repository / model / "1" / "model.onnx" for suffix, model in EMBEDDERS.items()
    }
    missing = [str(path) for path in graphs.values() if not path.is_file()]
    if missing:
        raise SystemExit(f"{missing[0]}: expected an ONNX graph, found none; run torch2onnx.py, then quantize.py")
    limit = LENGTHS[-1]
    if not args.graphs:
        limit = read_json(args.assets / "model.json", "run torch2onnx.py")["max_length"]
    lengths = tuple(min(n, limit) for n in LENGTHS)
    rows = []
    pairs = [(name, path, a) for name, path in graphs.items() for a in args.architectures]
    for name, path, architecture in tqdm(pairs, desc="compile", unit="graph", mininterval=1, file=sys.stderr):
        started = time.perf_counter()
        error = compile_graph(trt, path, architecture, lengths)
        seconds = round(time.perf_counter() - started, 2)
        rows.append({"graph": name, "architecture": architecture, "error": error, "seconds": seconds})
        tqdm.write(
            f"{name:9} {architecture:6} {'refused: ' + error if error else 'compiled'}, {seconds:.1f} s",
            file=sys.stdout,
        )
    if not args.graphs:
        card = read_json(args.assets / "model.json", "run torch2onnx.py")
        digests = {name: sha256(path) for name, path in graphs.items()}
        path = args.results / card["slug"] / "compile.json"
        record = {"model": card, "environment": environment_record(), "tensorrt_rtx": trt.__version__}
        write_json(path, record | {"graph_sha256": digests, "rows": rows})
        print(path)
    refused = [f"{row['graph']} for {row['architecture']}" for row in rows if row["error"]]
    if refused:
        raise SystemExit(
            f"expected {len(rows)} compilations, found {len(refused)} refused: {', '.join(refused)}; see the lines above"
        )


if __name__ == "__main__":
    main()
