#!/usr/bin/env python3
"""Make one typed ONNX graph per precision: the file that fixes what TensorRT computes.

Reads:  model_repository/model_ONNX/1/model.onnx, assets/tokenizer/, assets/texts.txt.
Writes: model_repository/model_TRT_{FP32,FP16,INT8,BEST}/1/model.onnx.
Run:    ./quantize.py
Prints: one line per graph: precision, size, share of the weight-MatMul FLOPs in INT8.

FP32 is the reference graph. FP16 is converted by ModelOpt AutoCast. INT8 has Q/DQ pairs
around weight MatMuls, rest FP32; BEST has the same pairs, rest FP16. Ranges come from
calibration on real texts, packed so that no padding gets into the statistics.
"""

import argparse
import contextlib
import hashlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import numpy_helper

from classifier_repository import is_classifier, refresh
from common import (
    ASSETS,
    ATTENTION_MASK,
    EMBEDDERS,
    INPUT_IDS,
    PRECISIONS,
    REFERENCE,
    REPOSITORY,
    TEXTS,
    read_texts,
    replace_when_done,
    sha256,
    split_texts,
)
from repository import describe, graph_tensors, read_graph

MIN_CALIBRATION_ROWS = 4
DYNAMIC_ROW = 128  # tokens of a calibration row where the graph takes any length
MIN_QUANTIZED_SHARE = 0.95  # of the FLOPs that were asked for
ACTIVATIONS = ("Erf", "Tanh", "Gelu", "Relu", "Sigmoid")
ELEMENTWISE = ("Add", "Mul", "Div", "Pow")  # what the exporter writes GELU with


def load_modelopt():
    """ModelOpt's two converters; imported late because they take seconds."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # it tells every step and warns about packages that are not needed here
    from modelopt.onnx.autocast import convert_to_mixed_precision
    from modelopt.onnx.quantization import quantize

    return convert_to_mixed_precision, quantize


# --- calibration data ----------------------------------------------------------------


def pack_texts(assets, texts, length):
    """Tokens of all texts, end to end, cut into full rows: int64 [rows, length] twice.

    A padded position has activations that no answer depends on; with rows that are full,
    ranges are those of real tokens. Exits when there is too little text.
    """
    path = assets / "tokenizer" / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise SystemExit(f"{path}: expected a tokenizer, found: {error}; run torch2onnx.py") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    stream = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
    rows = len(stream) // length
    if rows < MIN_CALIBRATION_ROWS:
        raise SystemExit(
            f"--calibration-texts: expected at least {MIN_CALIBRATION_ROWS} rows of {length} tokens, "
            f"found {len(stream)} tokens; give more text"
        )
    ids = np.array(stream[: rows * length], dtype=np.int64).reshape(rows, length)
    return {INPUT_IDS: ids, ATTENTION_MASK: np.ones_like(ids)}


def complete_inputs(calibration, graph):
    """The calibration rows with what else the graph wants: a classifier may take token types, all of the first."""
    others = {i.name for i in graph.graph.input} - set(calibration)
    return calibration | {name: np.zeros_like(calibration[INPUT_IDS]) for name in others}


# --- which MatMuls -------------------------------------------------------------------


def weight_matmuls(graph):
    """{node name: (in features, out features)} of MatMul and Gemm with a constant operand."""
    weights = {i.name: tuple(i.dims) for i in graph.graph.initializer if len(i.dims) == 2}
    found = {}
    for node in graph.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            shape = weights[node.input[1]]
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            found[node.name] = shape[::-1] if transposed else shape
    return found


def after_activation(graph):
    """Names of MatMuls whose input is an activation function's output: the second FFN MatMul.

    GELU's output has outliers that one INT8 range cannot hold; this MatMul costs more
    quality than all others together.
    """
    producer = {output: node for node in graph.graph.node for output in node.output}

    def reaches_activation(tensor):
        node = producer.get(tensor)
        if node is None or node.op_type in ACTIVATIONS:
            return node is not None
        return node.op_type in ELEMENTWISE and any(map(reaches_activation, node.input))

    nodes = (n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm"))
    return {node.name for node in nodes if reaches_activation(node.input[0])}


def quantized_matmuls(graph):
    """Names of MatMul and Gemm nodes whose both operands come from DequantizeLinear."""
    producer = {output: node for node in graph.graph.node for output in node.output}

    def dequantized(name):
        node = producer.get(name)
        while node is not None and node.op_type in ("Transpose", "Cast"):
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    nodes = (n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm"))
    return {n.name for n in nodes if dequantized(n.input[0]) and dequantized(n.input[1])}


def check_quantization(path, graph, allowed):
    """Exit unless Q/DQ is what TensorRT takes: signed, symmetric, on the allowed MatMuls only.

    allowed: {name: (in, out)} of the MatMuls that were asked for; ModelOpt may leave out
    small ones, such as a head of two outputs. Returns the names of the MatMuls in INT8.
    """
    constants = {i.name: i for i in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = constants.get(node.input[2])
            if zero is None or zero.data_type != onnx.TensorProto.INT8 or numpy_helper.to_array(zero).any():
                raise SystemExit(
                    f"{path}: expected signed INT8 with zero point 0 at {node.name}, found another; TensorRT refuses it"
                )
    found = quantized_matmuls(graph)
    if not found <= set(allowed):
        raise SystemExit(
            f"{path}: expected INT8 on weight MatMuls asked for, found it on {sorted(found - set(allowed))[0]}"
        )
    share = flops_share(found, allowed)
    if share < MIN_QUANTIZED_SHARE:
        raise SystemExit(
            f"{path}: expected at least {MIN_QUANTIZED_SHARE:.0%} of the FLOPs asked for in INT8, found {share:.0%}; "
            "report it with the model's name"
        )
    return found


# --- the four graphs -----------------------------------------------------------------


def convert(precision, reference, calibration, exclude):
    """Reference graph path -> typed ModelProto of FP16, INT8 or BEST."""
    convert_to_mixed_precision, quantize = load_modelopt()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source = Path(folder) / "model.onnx"  # ModelOpt writes beside its input
        shutil.copyfile(reference, source)
        if precision == "FP16":
            np.savez(Path(folder) / "calibration.npz", **{k: v[:8] for k, v in calibration.items()})
            return convert_to_mixed_precision(
                str(source),
                low_precision_type="fp16",
                keep_io_types=True,  # EMBEDDING stays float32
                calibration_data=str(Path(folder) / "calibration.npz"),
            )
        target = Path(folder) / "quantized.onnx"
        quantize(
            str(source),
            quantize_mode="int8",
            calibration_data=calibration,
            calibration_method="max",
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=sorted(exclude),
            high_precision_dtype="fp16" if precision == "BEST" else "fp32",
            output_path=str(target),
            log_level="ERROR",
        )
        return onnx.load(target)


def write_graph(graph, path, reference, properties):
    """Check the typed graph, note where it comes from, and move it into place."""
    if graph_tensors(graph) != graph_tensors(reference):
        raise SystemExit(
            f"{path}: expected the reference's tensors, {describe(graph_tensors(reference))}; found {describe(graph_tensors(graph))}"
        )
    onnx.helper.set_model_props(graph, properties)
    with replace_when_done(path) as temporary:
        onnx.save(graph, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)


def link_reference(reference, path):
    """FP32 is the reference graph itself: a hard link, or a copy where there are none."""
    with replace_when_done(path) as temporary:
        try:
            os.link(reference, temporary)
        except OSError:
            shutil.copyfile(reference, temporary)


def flops_share(names, shapes):
    """Share of the weight-MatMul FLOPs that is in `names`: every token costs 2·in·out."""
    flops = {name: k * n for name, (k, n) in shapes.items()}
    return sum(flops[name] for name in names) / sum(flops.values())


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calibration-texts",
        type=Path,
        help="default: every second line of assets/texts.txt, the others measure quality",
    )
    parser.add_argument("--only", choices=PRECISIONS, help="make one graph")
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, help="default: assets/; a classifier's repository is its own")
    args = parser.parse_args()
    args.classifier = is_classifier(args.repository)
    args.assets = args.assets or (args.repository if args.classifier else ASSETS)
    return args


def main():
    args = parse_args()
    reference_path = args.repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    reference = read_graph(reference_path)
    length = reference.graph.input[0].type.tensor_type.shape.dim[1].dim_value or DYNAMIC_ROW
    texts = read_texts(args.calibration_texts) if args.calibration_texts else split_texts(read_texts(TEXTS))[0]
    calibration = complete_inputs(pack_texts(args.assets, texts, length), reference)
    shapes = weight_matmuls(reference)
    behind_activation = after_activation(reference)
    quantizable = {name: shape for name, shape in shapes.items() if name not in behind_activation}
    others = {n.name for n in reference.graph.node if n.op_type in ("MatMul", "Gemm")} - set(quantizable)
    print(
        f"calibration: {len(calibration[INPUT_IDS])} rows of {length} tokens from {len(texts)} texts", file=sys.stderr
    )
    for precision in [args.only] if args.only else PRECISIONS:
        path = args.repository / EMBEDDERS[f"TRT_{precision}"] / "1" / "model.onnx"
        if precision == "FP32":
            link_reference(reference_path, path)
            share = 0.0
        else:
            graph = convert(precision, reference_path, calibration, others)
            int8 = set() if precision == "FP16" else check_quantization(path, graph, quantizable)
            share = flops_share(int8, shapes)
            properties = {
                "calibration_sha256": hashlib.sha256(calibration[INPUT_IDS].tobytes()).hexdigest(),
                "reference_sha256": sha256(reference_path),
                "precision": precision,
                "int8_flops_share": f"{share:.4f}",
            }
            write_graph(graph, path, reference, properties)
        print(
            f"{precision:4} {path.stat().st_size / 1e6:7.1f} MB, {share:4.0%} of the weight-MatMul FLOPs in INT8, {path}",
            flush=True,
        )
    if args.classifier:
        refresh(args.repository)


if __name__ == "__main__":
    main()
