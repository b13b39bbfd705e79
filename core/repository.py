"""A model repository on disk: where its parts lie, its record, its graphs. Nothing is written here.

A repository is a folder of models as Triton serves it, with model.json, the record of its export, and all that
its server needs. The task's own, model_repository/, has record and tokenizer in assets/ beside it.
"""

import json
import re

import onnx

from core.files import read_json, sha256
from core.tables import EMBEDDERS, ENGINES, MODELS, NAMES, REFERENCE, TORCH, model_key

RECORD, HEALTH = "model.json", "health.json"  # the record; the question of its health check
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a service: it is a folder's name too
GENERATING = ("encoder", "decoder", "encoder_FP16", "decoder_FP16")  # graphs of a service that generates
PARTS = ("tokenizer", "postprocess", *NAMES.values(), *GENERATING)  # names that no service may have
EXPORT = "run torch2onnx.py"


def assets_of(repository):
    """Folder of record and tokenizer: the repository itself, or assets/ beside the task's own."""
    return repository if (repository / RECORD).is_file() else repository.resolve().parent / "assets"


def is_own(repository):
    """Whether record and tokenizer lie beside it, as the task's own has them."""
    return not (repository / RECORD).is_file()


def tokenizer_path(repository):
    """tokenizer.json as the server reads it."""
    return assets_of(repository) / "tokenizer" / "tokenizer.json"


def site_packages(repository):
    """Where the package lies that reads the tokenizer."""
    return (assets_of(repository) if is_own(repository) else repository / "tokenizer") / "site-packages"


def graph_path(repository, key):
    """The ONNX graph of a model; key is one of MODELS."""
    return repository / MODELS[key].name / "1" / "model.onnx"


def present(repository):
    """Keys of the models whose graphs are there, the reference first."""
    return [key for key in MODELS if graph_path(repository, key).is_file()]


def script_path(repository):
    """The TorchScript of a service, where torch2onnx.py --torchscript wrote one."""
    return repository / NAMES[TORCH] / "1" / ENGINES["pytorch"].file


def answering_key(service):
    """Key of the model through which a service answers. OpenVINO makes BF16 of the reference."""
    if service.get("engine") == "pytorch":
        return TORCH
    made = service["precision"] == "BF16" and service.get("engine") == "openvino"
    return REFERENCE if made else model_key(service["precision"])


def engine_of(repository, card, key):
    """Key of ENGINES that a repository's server asks for a graph.

    OpenVINO where the service's record says so; TensorRT where there is a plan, and for the task's own.
    """
    if (card.get("service") or {}).get("engine") == "openvino" and key in EMBEDDERS:
        return "openvino"
    engine = MODELS[key].engine
    wanted = graph_path(repository, key).with_name(ENGINES[engine].file)
    return engine if wanted.is_file() or is_own(repository) else MODELS[REFERENCE].engine


def check_name(name, where):
    """Exit if a service cannot be called so: its name becomes a folder in the repository."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name) or name in PARTS:
        raise SystemExit(
            f"{where}: expected a service's name of letters, digits, dots and dashes, and none of {', '.join(PARTS)}; "
            f"found {name!r}; choose another"
        )
    return name


def read_card(repository):
    """The record of a repository's export; exits where there is none, or one that is not to be trusted."""
    path = assets_of(repository) / RECORD
    card = read_json(path, EXPORT)
    if not isinstance(card, dict) or not {"task", "inputs", "outputs", "reference_sha256"} <= card.keys():
        raise SystemExit(
            f"{path}: expected the record of an export, found another or that of an older version; {EXPORT}"
        )
    if card.get("service"):
        check_name(card["service"].get("name"), path)
    return card


def own_record(folder):
    """The record of a repository that holds its own, as it is; {} where the folder is none, such as assets/."""
    try:
        card = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    models = any(folder.glob("*/config.pbtxt"))
    return card if models and isinstance(card, dict) and "task" in card else {}


# --- what a service answers through ---------------------------------------------------


def choose(repository, precision):
    """Key of the model of a precision, whose graph is there."""
    key = model_key(precision)
    if key not in MODELS or key not in present(repository):
        remedy = EXPORT if key == REFERENCE else f"run quantize.py --repository {repository}"
        path = repository / f"model_{key}" / "1" / "model.onnx"
        raise SystemExit(f"{path}: expected the graph of --precision {precision}, found none; {remedy}")
    return key


def check_choice(repository, service):
    """Exit unless what a service answers through is there."""
    engine, precision = service.get("engine"), service["precision"]
    if engine == "pytorch":
        if precision not in (REFERENCE, "FP32"):
            raise SystemExit(f"--engine pytorch: expected --precision {REFERENCE}, found {precision}; leave it out")
        if not script_path(repository).is_file():
            raise SystemExit(f"{script_path(repository)}: expected a TorchScript, found none; {EXPORT} --torchscript")
        return
    made = precision == "BF16" and engine == "openvino"
    if precision == "BF16" and not made and model_key(precision) not in present(repository):
        raise SystemExit(
            "--precision BF16: expected --engine openvino or its typed graph, found neither; name it, or run quantize.py --precisions BF16"
        )
    choose(repository, REFERENCE if made else precision)


# --- graphs --------------------------------------------------------------------------


def read_graph(path):
    """Load an ONNX file; exits where it is missing or broken, with the command that makes it."""
    remedy = EXPORT if path.parts[-3] == MODELS[REFERENCE].name else "run quantize.py"
    try:
        graph = onnx.load(path)
    except OSError as error:
        raise SystemExit(f"{path}: expected an ONNX graph, found {error.strerror}; {remedy}") from None
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise SystemExit(f"{path}: expected an ONNX graph, found a broken file ({error}); {remedy}") from None
    if not graph.graph.output:
        raise SystemExit(f"{path}: expected an ONNX graph, found an empty file; {remedy}")
    return graph


def graph_tensors(graph):
    """{name: (ONNX element type, dims without the batch; -1 where dynamic)} of a graph's inputs and outputs."""
    return {
        v.name: (v.type.tensor_type.elem_type, tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim)[1:])
        for v in (*graph.graph.input, *graph.graph.output)
    }


def graph_properties(graph):
    """{name: text} that quantize.py noted in a graph; empty for the reference."""
    return {p.key: p.value for p in graph.metadata_props}


def check_made_from(graph, path, reference_sha256):
    """Exit unless the graph was made from the present reference, or is it."""
    made_from = graph_properties(graph).get("reference_sha256") or sha256(path)
    if made_from != reference_sha256:
        raise SystemExit(
            f"{path}: expected a graph made from the export {reference_sha256[:12]}, found one made from "
            f"{made_from[:12]}; run quantize.py"
        )


def transposed(node):
    """Whether a Gemm reads its weight as [out, in]."""
    return any(a.name == "transB" and a.i for a in node.attribute)


def weight_matmuls(graph):
    """{node name: (in features, out features)} of MatMul and Gemm with a constant operand."""
    weights = {i.name: tuple(i.dims) for i in graph.graph.initializer if len(i.dims) == 2}
    found = {}
    for node in graph.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            shape = weights[node.input[1]]
            found[node.name] = shape[::-1] if transposed(node) else shape
    return found
