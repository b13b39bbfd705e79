"""Graph surgery for INT8: which MatMuls have weights, smoothing, Q/DQ.

A *recipe* says how the MatMuls that read one tensor are computed in INT8: {"offsets",
"factors": float32 [in], "scale": step of the activations, "weights": {node name: (int8
[in, out], float32 steps [out])}, "outliers": channels that stay in floating point, "rows": {node name: their
weights, float32 [outliers, out]}, "mean_errors": {node name: float32 [out]}}. Weights in FP8
instead of INT8 make a graph in FP8. Activations are
(x - offsets) / factors, weights are multiplied by the factors: both then have small ranges
(SmoothQuant, Outlier Suppression+). What the offsets and the rounding change in the mean of
an output, `mean_errors`, is taken off its bias.
"""

import numpy as np
from onnx import helper

from core.repository import transposed, weight_matmuls
from precision.surgery import GraphIndex, Surgeon

KEEPS_ORDER = ("Reshape", "Transpose")  # between a Linear and the MatMul that reads its channels


# --- which MatMuls -------------------------------------------------------------------


def matmul_groups(graph):
    """{tensor: [names of the weight MatMuls that read it]}: they share range and factors."""
    names, groups = weight_matmuls(graph), {}
    for node in graph.graph.node:
        if node.name in names:
            groups.setdefault(node.input[0], []).append(node.name)
    return groups


def matmul_weights(graph):
    """{node name: float32 [in, out]} of the weight MatMuls."""
    index, names = GraphIndex(graph), weight_matmuls(graph)
    nodes = (n for n in index.nodes if n.name in names)
    return {n.name: index.array(n.input[1]).T if transposed(n) else index.array(n.input[1]) for n in nodes}


def last_hidden_state(graph):
    """Name of the tensor that the output layer reads: the encoder's last hidden state."""
    index = GraphIndex(graph)
    node = index.producer[graph.graph.output[0].name]
    while node.op_type not in ("MatMul", "Gemm"):
        node = next(index.producer[name] for name in node.input if name in index.producer)
    return node.input[0]


def flops_share(names, shapes, outliers=None):
    """Share of the weight-MatMul FLOPs that is in `names`: every token costs 2·in·out.

    outliers: {name: channels that stay in floating point}; theirs do not count.
    """
    left = outliers or {}
    return sum((shapes[n][0] - left.get(n, 0)) * shapes[n][1] for n in names) / sum(k * n for k, n in shapes.values())


def outlier_counts(recipes):
    """{name of a MatMul: channels of its input that stay in floating point}."""
    return {name: len(recipe["outliers"]) for recipe in (recipes or {}).values() for name in recipe["weights"]}


# --- where the factors go ------------------------------------------------------------


def linear_before(index, tensor, features):
    """(MatMul, bias Add or None) whose output channels `tensor` holds in their order, else None.

    Between them may stand reshapes, and the product with the attention's probabilities,
    which mixes tokens and leaves channels apart: a factor passes through it exactly. A
    tensor that anything else reads may not change.
    """
    node = index.producer.get(tensor)
    products = 0
    while node is not None:
        inner = node.input[0]
        if node.op_type == "MatMul" and node.input[1] in index.constants:
            fits = index.constants[node.input[1]].dims[1] == features
            return (node, None) if fits else None
        if node.op_type == "Add" and node.input[1] in index.constants:
            before = index.producer.get(inner)
            plain = before is not None and before.op_type == "MatMul" and before.input[1] in index.constants
            fits = plain and index.array(node.input[1]).shape == (features,)
            return (before, node) if fits and index.only_reader(inner) else None
        if node.op_type == "MatMul" and products == 0:
            products, inner = 1, node.input[1]
        elif node.op_type not in KEEPS_ORDER:
            return None
        if not index.only_reader(inner):
            return None
        node = index.producer.get(inner)
    return None


def smoothing_place(index, tensor, recipe, keep, others):
    """Where offsets and factors go: "linear", "layernorm", "mul" (nodes of their own), "none".

    keep: a tensor whose value must stay, the last hidden state. others: nodes that read
    `tensor` and expect its true value.
    """
    offsets, factors = recipe["offsets"], recipe["factors"]
    if not offsets.any() and (factors == 1).all():
        return "none"
    found = None if others or tensor in index.outputs else linear_before(index, tensor, len(factors))
    if found and (found[1] is not None or not offsets.any()):
        return "linear"
    node = index.producer.get(tensor)
    plain = node is not None and node.op_type == "LayerNormalization" and len(node.input) == 3
    constant = plain and all(name in index.constants for name in node.input[1:])
    return "layernorm" if constant and tensor not in (keep, *index.outputs) else "mul"


# --- the surgery ---------------------------------------------------------------------


def smooth_linear(surgeon, found, offsets, factors):
    """Take offsets off a Linear's output channels and divide them by the factors."""
    matmul, add = found
    surgeon.replace_constant(matmul, 1, surgeon.array(matmul.input[1]) / factors)
    if add is not None:
        surgeon.replace_constant(add, 1, (surgeon.array(add.input[1]) - offsets) / factors)


def smooth_layernorm(surgeon, tensor, offsets, factors):
    """The same with a LayerNorm's scale and bias. Returns its node and those that undo it for other readers."""
    node = surgeon.index.producer[tensor]
    surgeon.replace_constant(node, 1, surgeon.array(node.input[1]) / factors)
    surgeon.replace_constant(node, 2, (surgeon.array(node.input[2]) - offsets) / factors)
    node.output[0] = f"{tensor}_smooth"
    return node.output[0], affine_nodes(surgeon, tensor, node.output[0], tensor, factors, offsets, "unsmooth")


def affine_nodes(surgeon, tensor, source, target, factors, offsets, name):
    """Nodes for target = source * factors + offsets; without an Add where the offsets are zero."""
    factors = surgeon.constant(f"{tensor}/{name}_factors", factors.astype(np.float32))
    if not offsets.any():
        return [helper.make_node("Mul", [source, factors], [target], name=f"{tensor}/{name}/Mul")]
    offsets = surgeon.constant(f"{tensor}/{name}_offsets", offsets.astype(np.float32))
    middle = f"{tensor}/{name}_product"
    return [
        helper.make_node("Mul", [source, factors], [middle], name=f"{tensor}/{name}/Mul"),
        helper.make_node("Add", [middle, offsets], [target], name=f"{tensor}/{name}/Add"),
    ]


def quantize_activation(surgeon, tensor, source, scale, dtype):
    """Q/DQ of one tensor to the type of its weights; returns the two nodes and the name of their output."""
    scale = surgeon.constant(f"{tensor}_scale", np.float32(scale))
    zero = surgeon.constant(f"{dtype.name}_zero", np.zeros((), dtype))
    quantized, dequantized = f"{tensor}_{dtype.name}", f"{tensor}_dequantized"
    names = [f"{tensor}/QuantizeLinear", f"{tensor}/DequantizeLinear"]
    nodes = [
        helper.make_node("QuantizeLinear", [source, scale, zero], [quantized], name=names[0]),
        helper.make_node("DequantizeLinear", [quantized, scale, zero], [dequantized], name=names[1]),
    ]
    return nodes, dequantized


def gather_outliers(surgeon, tensor, source, channels):
    """Node that reads some channels of a tensor, in floating point."""
    indices = surgeon.constant(f"{tensor}/outlier_channels", channels.astype(np.int64))
    return helper.make_node("Gather", [source, indices], [f"{tensor}_outliers"], name=f"{tensor}/Gather", axis=-1)


def add_outliers(surgeon, node, tensor, rows):
    """Add to a MatMul's output what the channels in floating point bring."""
    name, output = node.name, node.output[0]
    weight = surgeon.constant(f"{name}/outlier_rows", rows.astype(np.float32))
    int8, product = f"{name}/int8_product", f"{name}/outlier_product"
    node.output[0] = int8
    surgeon.after[name] = [
        helper.make_node("MatMul", [f"{tensor}_outliers", weight], [product], name=f"{name}/outliers/MatMul"),
        helper.make_node("Add", [int8, product], [output], name=f"{name}/outliers/Add"),
    ]


def insert_int8(reference, recipes, chosen):
    """Reference graph -> graph whose MatMuls in `chosen` are computed in INT8, the rest as before.

    recipes: {tensor: recipe}, of which only those with a chosen MatMul are used.
    """
    surgeon, keep = Surgeon(reference), last_hidden_state(reference)
    index, divided = surgeon.index, {}
    used = {t: [n for n in recipe["weights"] if n in chosen] for t, recipe in recipes.items()}
    used = {t: names for t, names in used.items() if names}
    for tensor, names in used.items():
        offsets, factors = recipes[tensor]["offsets"], recipes[tensor]["factors"]
        readers = index.readers[tensor]
        others = [node for node in readers if node.name not in names]
        place, source, nodes = smoothing_place(index, tensor, recipes[tensor], keep, others), tensor, []
        if place == "linear":
            found = linear_before(index, tensor, len(factors))
            smooth_linear(surgeon, found, offsets, factors)
            divided[found[0].name] = (offsets, factors)
        elif place == "layernorm":
            source, undo = smooth_layernorm(surgeon, tensor, offsets, factors)
            nodes = undo if others else []
        elif place == "mul":
            source = f"{tensor}_smooth"
            nodes = affine_nodes(surgeon, tensor, tensor, source, 1 / factors, -offsets / factors, "smooth")
        dtype = recipes[tensor]["weights"][names[0]][0].dtype
        pair, dequantized = quantize_activation(surgeon, tensor, source, recipes[tensor]["scale"], dtype)
        if len(recipes[tensor]["outliers"]):
            pair.append(gather_outliers(surgeon, tensor, source, recipes[tensor]["outliers"]))
        first = next(node for node in index.nodes if node in readers)
        surgeon.before.setdefault(first.name, []).extend(nodes + pair)
        for node in readers:
            if node.name in names:
                node.input[0] = dequantized
    for tensor, names in used.items():
        for name in names:
            insert_weight(surgeon, name, tensor, recipes[tensor], divided.get(name))
    return surgeon.finish()


def insert_weight(surgeon, name, tensor, recipe, divided):
    """An INT8 weight with a step per output channel, its rows in floating point, the bias without the mean error.

    divided: (offsets, factors) of the output channels where the next MatMul's smoothing was
    put into this Linear: its steps are divided, its INT8 values stay.
    """
    node = next(n for n in surgeon.index.nodes if n.name == name)
    weight, scale = recipe["weights"][name]
    axis, factors = 0 if transposed(node) else 1, 1 if divided is None else divided[1]
    tensors = [
        surgeon.constant(f"{name}/weight_{weight.dtype.name}", weight.T if axis == 0 else weight),
        surgeon.constant(f"{name}/weight_scale", (scale / factors).astype(np.float32)),
        surgeon.constant(f"{name}/weight_zero", np.zeros(len(scale), dtype=weight.dtype)),
    ]
    output = f"{name}/weight_dequantized"
    dequantize = helper.make_node("DequantizeLinear", tensors, [output], name=f"{name}/weight/Dequantize", axis=axis)
    surgeon.before.setdefault(name, []).append(dequantize)
    node.input[1] = output
    if len(recipe["outliers"]):
        add_outliers(surgeon, node, tensor, recipe["rows"][name] / factors)
    add = surgeon.biases[name]
    if add is not None:
        surgeon.replace_constant(add, 1, surgeon.array(add.input[1]) - recipe["mean_errors"][name] / factors)
