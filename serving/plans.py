"""TensorRT plans on disk: where they lie, which shapes they take, whether they fit graph, GPU and server."""

import shutil
import sys

from core.files import read_json, sha256
from core.record import gpu_record
from core.repository import graph_path
from core.tables import ENGINES, MODELS, OPT_BATCH_SIZE, OPT_LENGTH, TRITON_TENSORRT

REMEDY = "run build_trt.sh on the GPU that serves"
KEYS = ("graph", "graph_sha256", "reference_sha256", "plan_sha256", "gpu", "compute_capability", "tensorrt_version")


def plan_path(repository, key):
    """Where the plan of a model lies; its layers and manifest lie beside it."""
    return graph_path(repository, key).with_name("model.plan")


def shapes(card, opt_batch=OPT_BATCH_SIZE, opt_length=OPT_LENGTH):
    """[(batch, length)] of trtexec's smallest, optimal and largest input, as the record has them."""
    limit, largest = card["max_length"], card["service"]["max_batch_size"]
    lengths = (limit, limit, limit) if card["fixed_length"] else (1, min(opt_length, limit), limit)
    return list(zip((1, min(opt_batch, largest), largest), lengths, strict=True))


def read_manifest(plan):
    """The manifest beside a plan; exits where one of both is missing, or the manifest says too little."""
    path = plan.with_name("manifest.json")
    if not plan.is_file():
        raise SystemExit(f"{plan}: expected a TensorRT plan, found none; {REMEDY}")
    manifest = read_json(path, REMEDY)
    missing = [key for key in KEYS if key not in manifest] if isinstance(manifest, dict) else KEYS
    if missing:
        raise SystemExit(f"{path}: expected the manifest of a plan, found {', '.join(missing)} missing; {REMEDY}")
    return manifest


def check_plan(repository, key, reference_sha256, gpu=None, tensorrt=None):
    """The manifest of a model's plan; exits unless it fits plan, graph, GPU and server, and names both sides.

    gpu: {"name", "compute_capability"} of this machine; tensorrt: version of the server. None is not compared.
    """
    plan = plan_path(repository, key)
    manifest = read_manifest(plan)
    # a repository of one plan lacks the reference, from which trtexec's flags make FP32 and FP16
    graph = repository / manifest["graph"]
    expected = {
        "the plan with SHA-256": ("plan_sha256", sha256(plan)),
        "the export": ("reference_sha256", reference_sha256),
        f"the graph {manifest['graph']}": ("graph_sha256", sha256(graph) if graph.is_file() else reference_sha256),
        "the GPU": ("gpu", gpu and gpu["name"]),
        "compute capability": ("compute_capability", gpu and gpu["compute_capability"]),
        "TensorRT": ("tensorrt_version", tensorrt),
    }
    for what, (field, value) in expected.items():
        found = manifest[field]
        if value and value != found:
            raise SystemExit(f"{plan}: expected {what} {value}, found one built for {found}; {REMEDY}")
    if manifest.get("plain_int8"):
        print(f"{plan}: built with --plain-int8, for comparison: INT8 in name only", file=sys.stderr)
    return manifest


def copy_plan(repository, key, target, card):
    """The plan with its manifest and the graph beside it; exits where one is missing or does not fit."""
    folder = graph_path(repository, key).parent
    for name in ("model.plan", "manifest.json"):
        if not (folder / name).is_file():
            raise SystemExit(
                f"{folder / name}: expected a TensorRT plan and its manifest, found none; "
                "run build_trt.sh, or leave --engine tensorrt out"
            )
    check_plan(repository, key, card["reference_sha256"])
    for name in ("model.onnx", "model.plan", "manifest.json"):
        shutil.copyfile(folder / name, target / name)


def check_served_plans(repository, reference_sha256, server):
    """{model's key: manifest} of the plans behind a running server; `server` is the record of read_server.

    Nothing is checked where no model is executed by TensorRT. An unknown Triton version is said on stderr.
    """
    served = [key for key in MODELS if server["engines"].get(key, "").startswith(ENGINES["tensorrt"].title)]
    tensorrt = TRITON_TENSORRT.get(server["version"])
    if served and not tensorrt:
        print(f"Triton {server['version']}: its TensorRT version is unknown here and was not compared", file=sys.stderr)
    return {key: check_plan(repository, key, reference_sha256, gpu_record(), tensorrt) for key in served}
