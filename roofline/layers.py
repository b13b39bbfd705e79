"""The layers of an encoder in closed form, from its modules, its config and one forward.

The closed form knows Linear, LayerNorm and RMSNorm, Embedding, activations, attention with absolute positions, biases
(MPNet, T5), rotations (ModernBERT) and disentangled positions (DeBERTa-v2). A module that it does not know is named:
a total without it would be too small. A local window is a mask: eager attention and the exported graph multiply all
L x L scores, so all are counted. So is what depends on weights alone and may be folded: DeBERTa's projected positions.
"""

import re

import torch
from transformers.activations import ACT2FN

# the last part of a Linear's path -> its kind; the first that fits. Families: BERT, RoBERTa, ELECTRA; DistilBERT;
# ALBERT; MPNet; T5; ModernBERT; DeBERTa
LINEAR_KINDS = {
    "QKV": r"\.Wqkv$",
    "Q": r"\.(query|q_lin|q_proj|q|query_proj)$",
    "K": r"\.(key|k_lin|k_proj|k|key_proj)$",
    "V": r"\.(value|v_lin|v_proj|v|value_proj)$",
    "position projection": r"\.(pos_key_proj|pos_query_proj)$",
    "output projection": r"attention\.output\.dense$|\.(out_lin|out_proj|attention\.dense)$|(attn|Attention)\.(o|Wo)$",
    "FFN 1": r"\.(intermediate\.dense|lin1|ffn|wi|wi_0|Wi)$",
    "FFN gate": r"\.wi_1$",
    "FFN 2": r"\.(output\.dense|lin2|ffn_output|wo|Wo)$",
    "head": r"^linear$",
    "other Linear": r".",
}
ACTIVATIONS = {"GELU": 8, "GELUActivation": 8, "NewGELUActivation": 8, "FastGELUActivation": 8, "ReLU": 1, "Tanh": 8}
RMS_NORMS = ("RMSNorm", "T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm")
TRANSPARENT = (torch.nn.Dropout, torch.nn.Identity, torch.nn.Flatten)


class UnknownLayer(Exception):
    """A layer that the closed form does not know; the message names it."""


def sample_input(length):
    """One text without padding: int64 [1, length] ids and mask. Padded tokens would cost as much."""
    return torch.full((1, length), 5, dtype=torch.int64), torch.ones((1, length), dtype=torch.int64)


def record_calls(embedder, length):
    """{path: (module, [shape of its output, call by call])} of every leaf module that one forward at batch 1 calls."""
    found = {}

    def hook(path):
        def note(module, inputs, output):
            found.setdefault(path, (module, []))[1].append(tuple(getattr(output, "shape", ())))

        return note

    leaves = [(path, module) for path, module in embedder.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(hook(path)) for path, module in leaves]
    try:
        with torch.inference_mode():
            embedder(*sample_input(length))
    finally:
        for h in hooks:
            h.remove()
    return found


def list_layers(embedder, length):
    """Closed form of every layer, in the order of execution.

    Returns [{"name", "kind", "op", "shape", "calls"}]; model.cost gives a layer's FLOPs and elements at any batch and
    length. Raises UnknownLayer for a module it cannot describe.
    """
    layers, config, calls = [], embedder.transformer.config, record_calls(embedder, length)
    biases = (length, length, config.num_attention_heads)
    tables = sum(shapes[0] == biases for _, shapes in calls.values())
    for path, (module, shapes) in calls.items():
        parent, name = embedder.get_submodule(path.rpartition(".")[0]), type(module).__name__
        if isinstance(module, torch.nn.Linear):
            layers += describe_linear(path, module, shapes, parent, config.num_attention_heads, length)
        elif isinstance(module, torch.nn.LayerNorm) or name in RMS_NORMS:
            layers.append(describe_norm(path, module, shapes, parent, length))
        elif shapes[0] == biases:  # MPNet, T5: gathered once, added to every layer's scores
            heads, blocks = config.num_attention_heads, config.num_hidden_layers // tables
            layers.append(new_layer(path, "position bias gather", "table", len(shapes), heads=heads))
            layers.append(new_layer(f"{path}/add", "position bias add", "bias add", blocks, heads=heads))
        elif type(module) is torch.nn.Embedding:  # a subclass may hold positions that are rotated, not added
            first = not any(layer["op"] == "gather" for layer in layers)
            layers += describe_embedding(path, module, shapes, first, length)
        elif name in ACTIVATIONS:
            layers += describe_activation(path, name, shapes, parent, length)
        elif name == "ModernBertRotaryEmbedding":  # a table of sines and cosines for each kind of attention
            size = config.hidden_size // config.num_attention_heads
            layers.append(new_layer(path, "rotary table", "table", len(shapes), width=2 * size))
        elif isinstance(module, torch.nn.Conv1d) and type(parent).__name__ == "ConvLayer":
            layers += describe_convolution(path, module, shapes, parent, length)
        elif not isinstance(module, TRANSPARENT):
            raise UnknownLayer(f"{path} ({name})")
    return layers


def new_layer(name, kind, op, calls, **shape):
    return {"name": name, "kind": kind, "op": op, "shape": shape, "calls": calls}


def describe_linear(path, module, shapes, parent, heads, length):
    """A Linear, with the attention that follows a V, and the residual add that follows a block's last one."""
    kind = next(kind for kind, pattern in LINEAR_KINDS.items() if re.search(pattern, path))
    positions = []  # DeBERTa projects its table of relative positions, with the weights of Q and K or with others
    if hasattr(parent, "pos_ebd_size"):
        positions = shapes if kind == "position projection" else shapes[1:]
    calls, size = len(shapes) - len(positions), {"inputs": module.in_features, "outputs": module.out_features}
    found = []
    if calls:
        per_token(path, module, shapes[:calls], length)
        found.append(new_layer(path, kind, "linear", calls, **size))
    for shape in positions:
        found.append(new_layer(f"{path}/positions", "position projection", "linear", 1, **size, rows=shape[-2]))
    if kind in ("V", "QKV"):
        width = module.out_features // (3 if kind == "QKV" else 1)
        found += describe_attention(path.rpartition(".")[0], kind, parent, calls, width, heads)
    if kind in ("output projection", "FFN 2"):
        found.append(new_layer(f"{path}/add", "residual add", "add", calls, width=module.out_features))
    return found


def describe_attention(block, kind, module, calls, width, heads):
    """The products and the softmax of an attention block, and what its positions need. width: heads · size of one."""
    whole, scores = {"width": width, "heads": heads}, {"heads": heads}
    found = []  # (end of the name, kind, operation, shape)
    if kind == "QKV":  # ModernBERT's queries and keys are rotated
        found.append(("rotary", "rotary embedding", "rotary", {"width": 2 * width, "size": width // heads}))
    found.append(("QKᵀ", "QKᵀ", "scores", whole))
    if span := getattr(module, "pos_ebd_size", 0):  # DeBERTa's disentangled attention
        for way in (w for w in ("c2p", "p2c") if w in module.pos_att_type):  # content to position, and back
            found.append((way, way, "position scores", whole | {"positions": 2 * span}))
            found.append((f"{way} gather", "position gather", "score gather", scores))
            found.append((f"{way} add", "position add", "add", scores))
    found += [("softmax", "softmax", "softmax", scores), ("AV", "AV", "context", whole)]
    return [new_layer(f"{block}/{name}", kind, op, calls, **shape) for name, kind, op, shape in found]


def describe_norm(path, module, shapes, parent, length):
    """A LayerNorm or RMSNorm; DeBERTa has one over its table of relative positions."""
    kind, op = ("LayerNorm", "norm") if isinstance(module, torch.nn.LayerNorm) else ("RMSNorm", "rms norm")
    shape = {"parameters": sum(p.numel() for p in module.parameters())}
    if hasattr(parent, "rel_embeddings"):
        rows, width = shapes[0]
        return new_layer(path, f"position {kind}", op, len(shapes), width=width, rows=rows, **shape)
    kind = f"embedding {kind}" if "embedding" in path else kind
    return new_layer(path, kind, op, len(shapes), width=per_token(path, module, shapes, length), **shape)


def describe_embedding(path, module, shapes, first, length):
    """A gather of one row per token; every further table's is added to the first's."""
    width = per_token(path, module, shapes, length)
    gather = new_layer(path, "embedding gather", "gather", len(shapes), width=width)
    add = new_layer(f"{path}/add", "embedding add", "add", len(shapes), width=width)
    return [gather] if first else [gather, add]


def describe_activation(path, name, shapes, parent, length):
    """An activation, and its product with the other half of a gated FFN."""
    width, calls = per_token(path, parent, shapes, length), len(shapes)
    kind = "GELU" if "GELU" in name else name
    found = [new_layer(path, kind, "activation", calls, width=width, flops_per_element=ACTIVATIONS[name])]
    if hasattr(parent, "Wi") or hasattr(parent, "wi_1"):
        found.append(new_layer(f"{path}/product", "gate product", "add", calls, width=width))
    return found


def describe_convolution(path, module, shapes, parent, length):
    """DeBERTa's convolution beside its first layer, with the activation and the add, which are no modules."""
    if shapes != [(1, module.out_channels, length)]:
        raise UnknownLayer(f"{path} (Conv1d with outputs {shapes})")
    width = module.out_channels
    shape = {"inputs": module.in_channels, "outputs": width, "kernel": module.kernel_size[0], "groups": module.groups}
    name = type(ACT2FN[parent.conv_act]).__name__
    if name not in ACTIVATIONS:
        raise UnknownLayer(f"{path}/activation ({name})")
    return [
        new_layer(path, "convolution", "conv", 1, **shape),
        *describe_activation(f"{path}/activation", name, [(1, length, width)], parent, length),
        new_layer(f"{path}/add", "residual add", "add", 1, width=width),
    ]


def per_token(path, module, shapes, length):
    """Width of outputs [.., length, width]; raises UnknownLayer for others, which do not grow with the tokens."""
    for shape in shapes:
        if len(shape) < 2 or shape[-2] != length or torch.Size(shape[:-2]).numel() != 1:
            found = f"{type(module).__name__} with output {list(shape)}, expected [1, {length}, width]"
            raise UnknownLayer(f"{path} ({found})")
    return shapes[0][-1]


def by_kind(layers):
    """Layers of the same kind and shape as one, their calls added up."""
    merged = {}
    for layer in layers:
        key = (layer["kind"], layer["op"], *sorted(layer["shape"].items()))
        first = {k: v for k, v in layer.items() if k != "name"} | {"calls": 0, "example": layer["name"]}
        merged.setdefault(key, first)["calls"] += layer["calls"]
    return list(merged.values())
