#!/usr/bin/env python3
"""Compile every graph with the parser and builder of TensorRT for RTX, without a GPU.

Reads:  --repository: the record and the graphs that are there.
Writes: results/<model>/<machine>/compile.json.
Run:    ./compile_check.py
Prints: one line per graph and GPU architecture: compiled or refused, seconds.

TensorRT for RTX is a sibling of the TensorRT that serves. It builds for a named architecture on any machine and is
strongly typed, as TensorRT 11 is: it refuses mixed types, UINT8 and asymmetric Q/DQ. It covers the architectures
SM 80 (A100), 86, 89 and 120; it covers neither SM 75 (T4) nor SM 90 (H100). Its engines do not load in Triton, so
this checks the graphs only: build_trt.sh makes the plans, and only the real TensorRT proves that they are built.
"""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from core.arguments import make_parser
from core.files import REPOSITORY, RESULTS, sha256, write_json
from core.record import environment_record, results_folder
from core.repository import EXPORT, graph_path, present, read_card
from core.tables import MAX_BATCH_SIZE, MODELS, OPT_BATCH_SIZE, OPT_LENGTH, PRECISIONS, REFERENCE
from serving.plans import shapes

ARCHITECTURES = ("SM80", "SM86", "SM89", "SM120")  # A100; A10, RTX 30; L4, RTX 40; RTX 50
COVERS = {
    "builder": "TensorRT for RTX, not the TensorRT that serves",
    "architectures": ARCHITECTURES,
    "not_covered": ("SM75", "SM90"),
}
# (batch, length) of graphs without a record
SHAPES = ((1, 1), (OPT_BATCH_SIZE, OPT_LENGTH), (MAX_BATCH_SIZE, 512))


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
        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    return Logger()


def compile_graph(trt, path, architecture, sizes=SHAPES):
    """Parse and build one graph for one architecture. Returns None, or the error's text.

    sizes: (batch, length), the smallest, optimal and largest; the length counts where the graph's is dynamic.
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
        profile.set_shape(tensor.name, *((b, *(n if d == -1 else d for d in rest)) for b, n in sizes))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    if builder.build_serialized_network(network, config) is None:
        return "; ".join(messages) or "not built"
    return None


def has(architecture, graph):
    """Whether an architecture multiplies in the precision of a graph: a key of MODELS, or a file that says for itself."""
    needed = PRECISIONS[MODELS[graph].precision].capability if graph in MODELS else 0
    return int(architecture.removeprefix("SM")) >= 10 * needed


def compile_all(trt, graphs, architectures, sizes):
    """[{"graph", "architecture", "error", "seconds"}] of every graph for every architecture that has its precision.

    Each is printed when done.
    """
    rows, pairs = [], [(name, path, a) for name, path in graphs.items() for a in architectures if has(a, name)]
    for name, path, architecture in tqdm(pairs, desc="compile", unit="graph", mininterval=1, file=sys.stderr):
        started = time.perf_counter()
        error = compile_graph(trt, path, architecture, sizes)
        seconds = round(time.perf_counter() - started, 2)
        rows.append({"graph": name, "architecture": architecture, "error": error, "seconds": seconds})
        said = f"refused: {error}" if error else "compiled"
        tqdm.write(f"{name:9} {architecture:6} {said}, {seconds:.1f} s", file=sys.stdout)
    return rows


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("graphs", type=Path, nargs="*", help="other ONNX files; their result is printed only")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main():
    args = parse_args()
    trt = load_tensorrt()
    if args.graphs:
        graphs, sizes = {str(path): path for path in args.graphs}, SHAPES
    else:
        card = read_card(args.repository)
        graphs = {key: graph_path(args.repository, key) for key in (present(args.repository) or [REFERENCE])}
        sizes = shapes(card)
    missing = [str(path) for path in graphs.values() if not path.is_file()]
    if missing:
        raise SystemExit(f"{missing[0]}: expected an ONNX graph, found none; {EXPORT}, then quantize.py")
    lacking = [f"{name} for {a}" for name in graphs for a in args.architectures if not has(a, name)]
    if lacking:
        print(f"left out, their tensor cores lack the precision: {', '.join(lacking)}", file=sys.stderr)
    rows = compile_all(trt, graphs, args.architectures, sizes)
    if not args.graphs:
        digests = {name: sha256(path) for name, path in graphs.items()}
        path = results_folder(args.results, card) / "compile.json"
        record = {"model": card, "environment": environment_record(), "tensorrt_rtx": trt.__version__, "covers": COVERS}
        write_json(path, record | {"graph_sha256": digests, "rows": rows})
        print(path)
    refused = [f"{row['graph']} for {row['architecture']}" for row in rows if row["error"]]
    if refused:
        raise SystemExit(
            f"expected {len(rows)} compilations, found {len(refused)} refused: {', '.join(refused)}; see the lines above"
        )


if __name__ == "__main__":
    main()
