"""The layers of an encoder in closed form, and three counts of its FLOPs that must agree.

list_layers reads modules and config; count_fvcore and count_torch execute the model. The closed form knows
Linear, LayerNorm, Embedding, activations and attention; a module it does not know is named, and so is one
whose matmuls the counters see and the closed form does not: a total would be too small.
"""

import logging
import re
import warnings

import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from roofline.model import cost, is_matmul

# the last part of a Linear's path -> its kind; the first that fits. Families: BERT, RoBERTa, ELECTRA; DistilBERT;
# ALBERT; MPNet
LINEAR_KINDS = {
    "Q": r"\.(query|q_lin|q_proj|q)$",
    "K": r"\.(key|k_lin|k_proj|k)$",
    "V": r"\.(value|v_lin|v_proj|v)$",
    "output projection": r"attention\.output\.dense$|\.(out_lin|out_proj|attn\.o|attention\.dense)$",
    "FFN 1": r"\.(intermediate\.dense|lin1|ffn)$",
    "FFN 2": r"\.(output\.dense|lin2|ffn_output)$",
    "head": r"^linear$",
    "other Linear": r".",
}
ACTIVATIONS = {"GELU": 8, "GELUActivation": 8, "NewGELUActivation": 8, "FastGELUActivation": 8, "ReLU": 1, "Tanh": 8}
TRANSPARENT = (torch.nn.Dropout, torch.nn.Identity, torch.nn.Flatten)
# operators that multiply matrices: none of them may stay uncounted
MATMULS = ("matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "einsum", "tensordot")
MATMULS += ("scaled_dot_product_attention", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
# what a plain function may compute as well as a module: operator -> the kinds of layers that it belongs to
ELEMENTWISE = {"softmax": ("softmax",), "gelu": ("GELU",), "relu": ("ReLU",), "tanh": ("Tanh", "GELU")}
ELEMENTWISE |= dict.fromkeys(("silu", "sigmoid", "elu", "leaky_relu", "mish", "hardswish", "glu", "log_softmax"), ())


class UnknownLayer(Exception):
    """A layer that the closed form does not know; the message names it."""


def sample_input(length):
    """One text without padding: int64 [1, length] ids and mask. Padded tokens would cost as much."""
    return torch.full((1, length), 5, dtype=torch.int64), torch.ones((1, length), dtype=torch.int64)


def record_calls(embedder, length):
    """{path: (module, calls, shape of its output)} of every leaf module that one forward at batch 1 calls."""
    found, hooks = {}, []

    def hook(path):
        def note(module, inputs, output):
            calls = found[path][1] if path in found else 0
            found[path] = (module, calls + 1, tuple(getattr(output, "shape", ())))

        return note

    for path, module in embedder.named_modules():
        if not any(module.children()):
            hooks.append(module.register_forward_hook(hook(path)))
    try:
        with torch.inference_mode():
            embedder(*sample_input(length))
    finally:
        for h in hooks:
            h.remove()
    return found


def list_layers(embedder, length):
    """Closed form of every layer, in the order of execution.

    Returns [{"name", "kind", "op", "shape", "calls"}]; roofline.cost gives a layer's FLOPs and elements at any
    batch and length. Raises UnknownLayer for a module it cannot describe.
    """
    layers = []
    config = embedder.transformer.config

    def add(name, kind, op, calls, **shape):
        layers.append({"name": name, "kind": kind, "op": op, "shape": shape, "calls": calls})

    tables = 0
    for path, (module, calls, out) in record_calls(embedder, length).items():
        name = type(module).__name__
        if isinstance(module, torch.nn.Linear):
            kind = linear_kind(path)
            per_token(path, name, out, length)
            add(path, kind, "linear", calls, inputs=module.in_features, outputs=module.out_features)
            if kind == "V":
                width, heads = module.out_features, config.num_attention_heads
                block = path.rsplit(".", 1)[0]
                add(f"{block}/QKᵀ", "QKᵀ", "scores", calls, width=width, heads=heads)
                add(f"{block}/softmax", "softmax", "softmax", calls, heads=heads)
                add(f"{block}/AV", "AV", "context", calls, width=width, heads=heads)
            if kind in ("output projection", "FFN 2"):
                add(f"{path}/add", "residual add", "add", calls, width=module.out_features)
        elif isinstance(module, torch.nn.LayerNorm):
            kind = "embedding LayerNorm" if "embedding" in path else "LayerNorm"
            parameters = sum(p.numel() for p in module.parameters())
            add(path, kind, "norm", calls, width=per_token(path, name, out, length), parameters=parameters)
        elif isinstance(module, torch.nn.Embedding) and out == (length, length, config.num_attention_heads):
            # MPNet: one table of biases for all layers, gathered once, added to every layer's scores
            heads, blocks = config.num_attention_heads, config.num_hidden_layers
            add(path, "position bias gather", "bias gather", calls, heads=heads)
            add(f"{path}/add", "position bias add", "bias add", blocks, heads=heads)
        elif type(module) is torch.nn.Embedding:  # a subclass may hold positions that are rotated, not added
            width = per_token(path, name, out, length)
            tables += 1
            add(path, "embedding gather", "gather", calls, width=width)
            if tables > 1:
                add(f"{path}/add", "embedding add", "add", calls, width=width)
        elif name in ACTIVATIONS:
            kind = "GELU" if "GELU" in name else name
            width = per_token(path, name, out, length)
            add(path, kind, "activation", calls, width=width, flops_per_element=ACTIVATIONS[name])
        elif not isinstance(module, TRANSPARENT):
            raise UnknownLayer(f"{path} ({name})")
    return layers


def linear_kind(path):
    """Kind of a Linear by its path."""
    return next(kind for kind, pattern in LINEAR_KINDS.items() if re.search(pattern, path))


def per_token(path, name, shape, length):
    """Width of an output [.., length, width]; raises UnknownLayer for another shape, which does not grow with tokens."""
    if len(shape) < 2 or shape[-2] != length or torch.Size(shape[:-2]).numel() != 1:
        raise UnknownLayer(f"{path} ({name} with output {list(shape)}, expected [1, {length}, width])")
    return shape[-1]


def by_kind(layers):
    """Layers of the same kind and shape as one, their calls added up."""
    merged = {}
    for layer in layers:
        key = (layer["kind"], layer["op"], *sorted(layer["shape"].items()))
        if key in merged:
            merged[key]["calls"] += layer["calls"]
        else:
            merged[key] = {k: v for k, v in layer.items() if k != "name"} | {"example": layer["name"]}
    return list(merged.values())


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
    counter = FlopCounterMode(display=False, depth=None)
    with torch.inference_mode(), counter:
        embedder(*sample_input(length))
    root = type(embedder).__name__
    found = {}
    for path, ops in counter.get_flop_counts().items():
        if path.startswith(f"{root}."):
            found[path.removeprefix(f"{root}.")] = int(sum(ops.values()))
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
