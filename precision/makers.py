"""The makers of PRECISIONS, each found by its row's `maker`: reference graph -> graph of that precision.

Each takes the reference as a ModelProto, and Learnt: what texts told of it. TF32's graph shows on any machine what a
GPU makes of FP32; the others are what TensorRT compiles.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from core.tables import PRECISIONS
from precision.int8_attention import find_product_steps, insert_product_pairs
from precision.int8_graph import insert_int8 as insert_pairs
from precision.surgery import Surgeon, rebuild

# calibration: encoded texts; recipes: of int8_recipes.py; chosen: names of the weight MatMuls in INT8; products: of
# int8_attention.py, None where attention's own products are not in INT8
Learnt = namedtuple("Learnt", "calibration recipes chosen products", defaults=(None, None, frozenset(), None))
RANGE_TEXTS = 8  # of the calibration texts, that show which values leave FP16's range
TF32_SPLIT = np.float32(2**13 + 1)  # FP32 has 23 mantissa bits, TF32 10: 13 are rounded away


def make_graph(precision, reference, learnt=None):
    """Reference graph -> ModelProto of a precision, its tensors named and typed as the reference's."""
    return MAKERS[PRECISIONS[precision].maker](reference, learnt)


def link_reference(reference, learnt):
    """FP32: the reference itself."""
    return reference


# --- FP16, BF16 ----------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_modelopt():
    """Yield ModelOpt's autocast, silent but for errors: it tells each step, and warns of what is meant to be so."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from modelopt.onnx import autocast  # here, because it takes seconds

            logging.getLogger("modelopt.onnx").handlers.clear()  # they hold this stdout; errors go to stderr then
            yield autocast
        finally:
            logging.disable(logging.NOTSET)


def convert_fp16(reference, learnt):
    """FP16, but for what leaves its range on real texts."""
    return lower(reference, first_texts(learnt), "fp16")


def convert_bf16(reference, learnt):
    """BF16, whose range is FP32's."""
    return lower(reference, first_texts(learnt), "bf16")


def first_texts(learnt):
    return [{name: values[:RANGE_TEXTS] for name, values in learnt.calibration.items()}]


def lower(reference, samples, low_precision):
    """FP16 or BF16, but for what leaves its range on the samples, each a dict of the graph's inputs."""
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source, texts = folder / "model.onnx", folder / "calibration"  # ModelOpt reads files
            onnx.save(reference, source)
            texts.mkdir()
            for number, sample in enumerate(samples):
                np.savez(texts / f"{number}.npz", **sample)
        except OSError as error:
            raise SystemExit(
                "the folder of temporary files: expected room for a copy of the graph, "
                f"found: {error.strerror}; free some, or set TMPDIR"
            ) from None
        autocast = stack.enter_context(quiet_modelopt())
        graph = autocast.convert_to_mixed_precision(
            str(source),
            low_precision_type=low_precision,
            keep_io_types=True,  # what the graph returns stays float32
            calibration_data=str(texts),
        )
    return without_shapes(graph)


def without_shapes(graph):
    """A graph without ModelOpt's notes of the shapes between its nodes: ONNX Runtime trusts them, and some are wrong.

    Half of a head is noted with the shape of the whole, and all dimensions that are not known have one name.
    """
    del graph.graph.value_info[:]
    return graph


# --- INT8 ----------------------------------------------------------------------------


def insert_int8(reference, learnt):
    """INT8: Q/DQ at the chosen MatMuls, FP32 around them; FP8 where the recipes are in FP8."""
    graph = insert_pairs(reference, learnt.recipes, learnt.chosen)
    return insert_product_pairs(graph, learnt.products) if learnt.products else graph


def learn_products(reference, learnt, parts):
    """Learnt with the steps of attention's products, which are calibrated in the graph with all else in INT8."""
    steps = find_product_steps(insert_int8(reference, learnt), parts["calibration"], parts["held_out"])
    return learnt._replace(products=steps)


def insert_int8_fp16(reference, learnt):
    """BEST: the same Q/DQ, FP16 around them."""
    with quiet_modelopt() as autocast:
        graph = autocast.convert.convert_to_f16(insert_int8(reference, learnt), keep_io_types=True)
    return rebuild(without_shapes(graph), graph.graph.node, graph.graph.initializer)


def insert_fp8_fp16(reference, learnt):
    """FP8: the same with recipes in FP8."""
    return insert_int8_fp16(reference, learnt)


# --- TF32 ----------------------------------------------------------------------------


def round_to_tf32(values):
    """float32 rounded to nearest with 10 mantissa bits, by Dekker's and Veltkamp's splitting: what the nodes compute."""
    product = values * TF32_SPLIT
    return product - (product - values)


def emulate_tf32(reference, learnt=None):
    """FP32 as a GPU's tensor cores multiply it: both operands of every MatMul and Gemm are rounded, sums stay FP32.

    A constant operand is rounded here, any other by three nodes, which ONNX Runtime executes as they are.
    """
    surgeon = Surgeon(reference)
    split, rounded = surgeon.constant("tf32_split", TF32_SPLIT), {}
    for node in surgeon.index.nodes:
        for position in (0, 1) if node.op_type in ("MatMul", "Gemm") else ():
            name = node.input[position]
            if name in surgeon.index.constants:
                surgeon.replace_constant(node, position, round_to_tf32(surgeon.index.array(name)))
                continue
            if name not in rounded:
                product, rest, rounded[name] = (f"{name}/tf32_{part}" for part in ("product", "rest", "rounded"))
                surgeon.before.setdefault(node.name, []).extend(
                    [
                        helper.make_node("Mul", [name, split], [product]),
                        helper.make_node("Sub", [product, name], [rest]),
                        helper.make_node("Sub", [product, rest], [rounded[name]]),
                    ]
                )
            node.input[position] = rounded[name]
    return surgeon.finish()


MAKERS = {
    maker.__name__: maker
    for maker in (
        link_reference,
        emulate_tf32,
        convert_fp16,
        convert_bf16,
        insert_int8,
        insert_int8_fp16,
        insert_fp8_fp16,
    )
}
