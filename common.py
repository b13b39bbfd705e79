"""What must be identical in the export, the server, the client and the tests.

Tensor names, precisions, paths, error metrics, the environment record, and the way
in which files are written. Everything else lives in the script that needs it.
"""

import contextlib
import copy
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
REPOSITORY = ROOT / "model_repository"
ASSETS = ROOT / "assets"
RESULTS = ROOT / "results"
TEXTS = ASSETS / "texts.txt"

TEXT = "TEXT"
INPUT_IDS = "INPUT_IDS"
ATTENTION_MASK = "ATTENTION_MASK"
EMBEDDING = "EMBEDDING"
# of a classifier (torch2onnx.py --task classification)
TOKEN_TYPE_IDS = "TOKEN_TYPE_IDS"
LOGITS = "LOGITS"

REFERENCE = "ONNX"
PRECISIONS = ("FP32", "FP16", "INT8", "BEST")
# suffix of the ensemble's output EMBEDDING_* -> model in the repository
EMBEDDERS = {REFERENCE: "model_ONNX"} | {f"TRT_{p}": f"model_TRT_{p}" for p in PRECISIONS}

# what a plan's EMBEDDING may deviate, averages over texts; client.py --check and quantize.py hold it.
# FP32: a GPU may round to TF32, as FP16; FP16: ten times what MiniLM shows; INT8, BEST: what keeps
# rankings of texts, and what a maximum-calibrated graph misses
GATES = {
    "FP32": {"relative_l2_error": 0.01, "mean_cosine": 0.9999},
    "FP16": {"relative_l2_error": 0.01, "mean_cosine": 0.9999},
    "INT8": {"relative_l2_error": 0.10, "mean_cosine": 0.99},
    "BEST": {"relative_l2_error": 0.10, "mean_cosine": 0.99},
}
# INT8 and BEST of a classifier, over all texts at once: the direction of two logits says little
LOGITS_GATE = {"relative_l2_error": 0.05, "mean_cosine": 0.9}

MAX_LENGTH = 128  # tokens per text of an embedder
MAX_BATCH_SIZE = 8  # the largest batch of the plans: --maxShapes of build_trt.sh


# --- files ---------------------------------------------------------------------------


@contextlib.contextmanager
def replace_when_done(path):
    """Yield a temporary neighbour of `path`; move it there only if the block succeeds.

    An interrupted or failed step therefore leaves the previous file or none, never half
    of one. Raises whatever the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SystemExit(f"{path}: expected room for it on the disk, found: {error.strerror}; free some") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    with replace_when_done(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path, remedy):
    """Read a JSON file; exit with `remedy` if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise SystemExit(f"{path}: expected a file, found none; {remedy}") from None
    except ValueError as error:
        raise SystemExit(f"{path}: expected JSON, found {error}; {remedy}") from None


def sha256(path):
    """SHA-256 of a file's content, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_texts(path, option="--texts"):
    """Texts of a UTF-8 file, one a line; empty lines are skipped. Exits if none is left; `option` names the file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise SystemExit(f"{path}: expected a text file, found {error.strerror}; name one with {option}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: expected UTF-8, found {error}; convert the file") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise SystemExit(f"{path}: expected at least one text, found none; write one text a line")
    return texts


def spread(texts, limit):
    """At most `limit` texts, evenly spread, so that a short run sees every kind of text."""
    if limit is None or limit >= len(texts):
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]


def split_texts(texts):
    """(calibration texts, evaluation texts): every second line each, so both are varied."""
    return texts[0::2], texts[1::2]


# --- execution on a CPU --------------------------------------------------------------


def open_session(path, threads=0, spinning="off"):
    """ONNX Runtime session of a graph (path or ModelProto) on the CPU, the same in server, checks and tests.

    threads: how many compute one operator; 0 leaves the choice to ONNX Runtime. spinning:
    what its threads do between two operators, "on" (its default), "off" (they sleep) or
    "stop" (they spin in a run, and stop at its end).
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; it warns about each constant that a conversion left behind
    # off: threads that spin between two requests take the cores from the server and from the
    # other embedders; tune.py measures it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if spinning == "off" else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1" if spinning == "stop" else "0")
    model = copy.deepcopy(path) if isinstance(path, onnx.ModelProto) else onnx.load(path)
    _quantize_from_float32(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _quantize_from_float32(model):
    """Let each float16 QuantizeLinear read float32: the same values, rounded to nearest.

    ONNX Runtime's CPU kernel for float16 truncates where ONNX says round (its pull request
    32452); executed as they are, graphs with Q/DQ in FP16 deviate more than twice too much.
    """
    from onnx import TensorProto, helper, numpy_helper

    scales = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT16}
    nodes, added = [], {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in scales:
            scale = numpy_helper.to_array(scales[node.input[1]]).astype(np.float32)
            name = f"{node.input[1]}_float32"
            added[name] = numpy_helper.from_array(scale, name)
            values = f"{node.output[0]}_float32"
            nodes.append(helper.make_node("Cast", [node.input[0]], [values], to=TensorProto.FLOAT))
            node.input[0], node.input[1] = values, name
        nodes.append(node)
    if added:
        nodes = [copy.deepcopy(node) for node in nodes]  # before the field they live in is cleared
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(added.values())


# --- metrics -------------------------------------------------------------------------


def deviations(reference, candidate, mask):
    """Differences of an embedder's EMBEDDING from the reference, over real tokens.

    reference, candidate: float arrays [batch, length, outputs]; mask: [batch, length],
    1 for a real token, 0 for padding. Returns a dict: max_abs_error, mean_abs_error,
    relative_l2_error (norm of the difference / norm of the reference), mean_cosine
    (mean over tokens of the cosine of the two vectors), argmax_flip_share (tokens whose
    largest output is another one) and tokens (how many were compared). Raises
    ValueError when shapes differ, no token is real, or a value is NaN or infinite.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"expected shape {list(reference.shape)}, found {list(candidate.shape)}")
    real = mask.astype(bool)
    reference, candidate = reference[real].astype(np.float64), candidate[real].astype(np.float64)
    if not len(reference):
        raise ValueError("expected at least one real token, found none")
    for name, values in (("reference", reference), ("candidate", candidate)):
        broken = int((~np.isfinite(values)).any(axis=1).sum())
        if broken:
            raise ValueError(f"NaN or Inf in {broken} of {len(values)} tokens of the {name}")
    difference = candidate - reference
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(candidate, axis=1)
    cosine = (reference * candidate).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return {
        "max_abs_error": float(np.abs(difference).max()),
        "mean_abs_error": float(np.abs(difference).mean()),
        "relative_l2_error": float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        "mean_cosine": float(cosine.mean()),
        "argmax_flip_share": float((reference.argmax(axis=1) != candidate.argmax(axis=1)).mean()),
        "tokens": len(reference),
    }


# --- records -------------------------------------------------------------------------


def slug(name):
    """A folder name for a model: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")


def environment_record():
    """Machine, versions and code state of this run, for every file under results/.

    Of an absolute path in the arguments only the name is recorded: where it lay is nobody's business.
    """
    return {
        "argv": [Path(arg).name if Path(arg).is_absolute() else arg for arg in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _command("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "dirty": _dirty(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_record(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


PACKAGES = ("torch", "transformers", "onnx", "onnxruntime-gpu", "nvidia-modelopt", "nvidia-pytriton", "tritonclient")


def gpu_record():
    """Name, compute capability and driver of the first GPU, or None where there is none."""
    line = _command("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    if not line:
        return None
    return dict(zip(("name", "compute_capability", "driver"), line.splitlines()[0].split(", "), strict=True))


def _command(*argv):
    """First output of a command without its line end, or None where it cannot be had."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _dirty():
    """Whether code or configs differ from the commit; None outside a checkout."""
    # results/ and the two generated texts change by measuring, so they do not count
    exclude = [f":!{name}" for name in ("results", "report.md", "README.md")]
    argv = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *exclude]
    try:
        return bool(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
