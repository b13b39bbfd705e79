"""The manifest beside a TensorRT plan: whether the plan fits graph, GPU and server."""

import sys

from core.files import read_json, sha256
from core.record import gpu_record
from core.repository import graph_path
from core.tables import MODELS, TRITON_TENSORRT

MANIFEST_KEYS = (
    "graph",
    "graph_sha256",
    "reference_sha256",
    "plan_sha256",
    "gpu",
    "compute_capability",
    "tensorrt_version",
)
REMEDY = "run build_trt.sh on the GPU that serves"


def check_plan(repository, key, reference_sha256, gpu=None, tensorrt=None):
    """Exit unless the manifest fits the present graph, GPU and server; names both sides. Returns the manifest.

    gpu: {"name", "compute_capability"} of this machine or None; tensorrt: the server's version or None. What is
    None is not compared.
    """
    folder = graph_path(repository, key).parent
    plan, path = folder / "model.plan", folder / "manifest.json"
    if not plan.is_file():
        raise SystemExit(f"{plan}: expected a TensorRT plan, found none; {REMEDY}")
    manifest = read_json(path, REMEDY)
    missing = [name for name in MANIFEST_KEYS if name not in manifest]
    if missing:
        raise SystemExit(f"{path}: expected a whole manifest, found it without {', '.join(missing)}; {REMEDY}")
    if manifest.get("plain_int8"):
        print(f"{plan}: built with --plain-int8, for comparison: INT8 in name only", file=sys.stderr)
    # a repository with one graph lacks the reference, from which trtexec's flags make FP32 and FP16
    graph = repository / manifest["graph"]
    for what, name, expected in (
        ("SHA-256", "plan_sha256", sha256(plan)),
        ("the export", "reference_sha256", reference_sha256),
        (f"the graph {manifest['graph']}", "graph_sha256", sha256(graph) if graph.is_file() else reference_sha256),
        ("the GPU", "gpu", gpu and gpu["name"]),
        ("compute capability", "compute_capability", gpu and gpu["compute_capability"]),
        ("TensorRT", "tensorrt_version", tensorrt),
    ):
        if expected and manifest[name] != expected:
            raise SystemExit(
                f"{plan}: expected {what} {expected}, found one built for {manifest[name]} ({path}); {REMEDY}"
            )
    return manifest


def check_served_plans(repository, reference_sha256, server):
    """Check the plans behind a running server; server: what serving.server.read_server returned.

    Nothing to check where no model is executed by TensorRT. An unknown Triton version is said on stderr and not
    compared.
    """
    served = [key for key in MODELS if server["engines"].get(key, "").startswith("TensorRT")]
    version = TRITON_TENSORRT.get(server["version"])
    if served and not version:
        print(
            f"Triton {server['version']}: its TensorRT version is not known here and was not compared", file=sys.stderr
        )
    return {key: check_plan(repository, key, reference_sha256, gpu_record(), version) for key in served}
