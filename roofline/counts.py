"""Three counts of an encoder's matmul FLOPs at batch 1, which must agree in every module, to the last FLOP.

The closed form is that of layers.py; fvcore and torch execute the model. A module whose matmuls the counters see and
the closed form does not is named: a total would be too small.
"""

import logging
import warnings

import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from roofline.layers import UnknownLayer, sample_input
from roofline.model import cost, is_matmul

# operators that multiply matrices: none of them may stay uncounted
MATMULS = ("matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "einsum", "tensordot", "conv1d", "_convolution")
MATMULS += ("scaled_dot_product_attention", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
# what a plain function may compute as well as a module: operator -> the kinds of layers that it belongs to
ELEMENTWISE = {"softmax": ("softmax",), "gelu": ("GELU",), "relu": ("ReLU",), "tanh": ("Tanh", "GELU")}
ELEMENTWISE |= dict.fromkeys(("silu", "sigmoid", "elu", "leaky_relu", "mish", "hardswish", "glu", "log_softmax"), ())


def count_closed_form(layers, length):
    """Matmul FLOPs per module at batch 1: {path of the Linear or of the attention block: FLOPs}."""
    found = {}
    for layer in layers:
        if is_matmul(layer):
            path = layer["name"].split("/")[0]
            found[path] = found.get(path, 0) + layer["calls"] * cost(layer, 1, length).flops
    return found


def count_fvcore(embedder, length):
    """fvcore at batch 1: {"raw", "layer_norm", "macs", "by_module" (multiply-adds), "unsupported_ops"}.

    fvcore counts 1 per multiply-add, but 5 per element of an affine LayerNorm, so its raw total is a mixture: the
    LayerNorms are taken out before it is doubled. What it has no rule for counts 0; raises UnknownLayer if a matmul
    is among that.
    """
    analysis = FlopCountAnalysis(embedder, sample_input(length)).unsupported_ops_warnings(False)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit's, about constants in a trace
        by_operator = {path: dict(ops) for path, ops in analysis.by_module_and_operator().items()}
    unsupported = dict(analysis.unsupported_ops())
    lost = [op for op in unsupported if op.removeprefix("aten::").rstrip("_") in MATMULS]
    if lost:
        raise UnknownLayer(f"{', '.join(lost)}, which multiplies matrices and which fvcore counts as nothing")
    norms = {path: ops.pop("layer_norm", 0) for path, ops in by_operator.items()}
    macs = {path: int(sum(ops.values())) for path, ops in by_operator.items()}
    return {
        "raw": macs[""] + int(norms[""]),
        "layer_norm": int(norms[""]),
        "macs": macs[""],
        "by_module": {path: n for path, n in macs.items() if path and n},
        "unsupported_ops": {op: int(n) for op, n in sorted(unsupported.items())},
    }


def count_torch(embedder, length):
    """torch.utils.flop_counter at batch 1: FLOPs, 2 per multiply-add, per module path."""
    embedder.requires_grad_(False)  # a parameter that is a module's input, as DeBERTa has one, stops the counter else
    counter = FlopCounterMode(display=False, depth=None)
    with torch.inference_mode(), counter:
        embedder(*sample_input(length))
    root = f"{type(embedder).__name__}."
    found = {
        p.removeprefix(root): int(sum(n.values())) for p, n in counter.get_flop_counts().items() if p.startswith(root)
    }
    return {"flops": int(counter.get_total_flops()), "by_module": found}


def compare_elementwise(layers, unsupported):
    """Raise UnknownLayer if the model calls an elementwise operator more often than the closed form has it.

    unsupported: {"aten::gelu": calls, …}, what fvcore met without having a rule.
    """
    for op, found in unsupported.items():
        kinds = ELEMENTWISE.get(op.removeprefix("aten::").rstrip("_"))
        expected = sum(layer["calls"] for layer in layers if kinds and layer["kind"] in kinds)
        if kinds is not None and found > expected:
            raise UnknownLayer(f"{op}, called {found} times; the closed form has it {expected} times")


def compare_counts(closed, fvcore, torch_flops):
    """Raise UnknownLayer unless the three counts of matmul FLOPs are the same in every module and in total.

    closed: {path: FLOPs} of Linears and attention blocks. A parent's count is the sum of what is below it.
    """
    counts = {
        "fvcore (2 per multiply-add)": {p: 2 * macs for p, macs in fvcore["by_module"].items()},
        "torch's FlopCounterMode": torch_flops["by_module"],
    }
    totals = {2 * fvcore["macs"], torch_flops["flops"], sum(closed.values())}
    for counter, by_module in counts.items():
        # the deepest first: the module itself is named and not all that it is in
        for path in sorted(set(closed) | set(by_module), key=lambda p: -p.count(".")):
            expected = sum(flops for p, flops in closed.items() if p == path or p.startswith(f"{path}."))
            if by_module.get(path, 0) != expected:
                raise UnknownLayer(
                    f"{path}: {counter} finds {by_module.get(path, 0):,} matmul FLOPs, the closed form {expected:,}"
                )
    if len(totals) > 1:  # outside every module
        raise UnknownLayer(f"the model itself, whose matmul FLOPs are counted as {sorted(totals)}")
