"""Attention's own products in INT8: queries by keys, probabilities by values. Both operands are computed, none is a weight.

They are found before and behind a Softmax, never by name. Their ranges are those with the least error of the product, in
a graph that has Q/DQ at its weights already.
"""

import numpy as np
import onnx

from core.onnx_runtime import open_session
from core.repository import weight_matmuls
from core.tables import ATTENTION_MASK
from precision.int8_graph import quantize_activation
from precision.int8_recipes import SMALLEST
from precision.int8_rounding import INT8, round_values
from precision.surgery import GraphIndex, Surgeon

ELEMENTWISE = ("Add", "Cast", "Div", "Mul", "Where")  # scale and mask, between a product and its Softmax
CLIPS = (1.0, 1.25, 0.9, 0.8, 0.7, 0.6, 0.5)  # range over the largest calibrated value
MAX_ERROR_TEXTS = 32  # on which they are compared


def makers_of(index, tensor):
    """Nodes that make a tensor, looked for before elementwise ones."""
    node = index.producer.get(tensor)
    if node is None or node.op_type not in ELEMENTWISE:
        return [] if node is None else [node]
    return [maker for name in node.input for maker in makers_of(index, name)]


def attention_products(graph):
    """(nodes of queries by keys, which a Softmax reads; nodes of probabilities by values): MatMuls of two computed tensors."""
    index = GraphIndex(graph)
    read = {m.name for n in index.nodes if n.op_type == "Softmax" for m in makers_of(index, n.input[0])}
    found = [n for n in index.nodes if n.op_type == "MatMul" and all(name in index.producer for name in n.input)]
    probabilities = [n for n in found if any(m.op_type == "Softmax" for m in makers_of(index, n.input[0]))]
    return [n for n in found if n.name in read], probabilities


def product_operands(graph, encoded):
    """Yield (node, its two operands, float32 [heads, rows, columns]) text by text, of real tokens alone."""
    scores, probabilities = attention_products(graph)
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    tensors = sorted({name for node in scores + probabilities for name in node.input})
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    session = open_session(model)
    for i, mask in enumerate(encoded[ATTENTION_MASK].astype(bool)):
        values = session.run(tensors, {name: array[i : i + 1] for name, array in encoded.items()})
        found = {name: v.reshape(-1, *v.shape[-2:]) for name, v in zip(tensors, values, strict=True)}
        for node in scores:
            yield node, (found[node.input[0]][:, mask], found[node.input[1]][..., mask])
        for node in probabilities:
            yield node, (found[node.input[0]][:, mask][..., mask], found[node.input[1]][:, mask])


def find_product_steps(graph, calibration, held_out):
    """{tensor: its step} of the operands of attention's products; exits if there are none.

    calibration, held_out: encoded texts; those that set a range, and those on which CLIPS are compared. Probabilities
    reach from 0 to 1 in any text.
    """
    scores, probabilities = attention_products(graph)
    if not scores or not probabilities:
        raise SystemExit("--attention: expected MatMuls before and behind a Softmax, found none; leave it out")
    fixed = {node.input[0]: np.float32(1 / INT8.largest) for node in probabilities}
    largest, errors = {}, {}
    for node, pair in product_operands(graph, calibration):
        for name, values in zip(node.input, pair, strict=True):
            largest[name] = max(largest.get(name, SMALLEST), float(np.abs(values).max()))
    steps = {name: np.float32(CLIPS) * np.float32(value) / INT8.largest for name, value in largest.items()}
    for node, (left, right) in product_operands(graph, {name: v[:MAX_ERROR_TEXTS] for name, v in held_out.items()}):
        (first, second), exact = node.input, left @ right
        found = {second: [left @ round_values(right, step) - exact for step in steps[second]]}
        if first not in fixed:
            found[first] = [round_values(left, step) @ right - exact for step in steps[first]]
        for name, differences in found.items():
            errors[name] = errors.get(name, 0) + np.array([np.square(d).sum() for d in differences])
    return fixed | {name: steps[name][error.argmin()] for name, error in errors.items()}


def product_share(reference, encoded):
    """Share of attention's products in the MatMul FLOPs of texts without padding."""
    products = sum(left.size * right.shape[-1] for _, (left, right) in product_operands(reference, encoded))
    weights = int(encoded[ATTENTION_MASK].sum()) * sum(k * n for k, n in weight_matmuls(reference).values())
    return products / (products + weights)


def insert_product_pairs(graph, steps):
    """Graph with Q/DQ at its weights -> with Q/DQ at both operands of attention's products too."""
    surgeon, dequantized = Surgeon(graph), {}
    names = {node.name for nodes in attention_products(graph) for node in nodes}
    for node in surgeon.index.nodes:
        for position, tensor in enumerate(node.input) if node.name in names else ():
            if tensor not in dequantized:
                pair, dequantized[tensor] = quantize_activation(surgeon, tensor, tensor, steps[tensor], INT8.dtype)
                surgeon.before.setdefault(node.name, []).extend(pair)
            node.input[position] = dequantized[tensor]
    return surgeon.finish()
