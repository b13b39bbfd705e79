"""Two of the project's three tables, precisions and engines, and the models that they make; tasks/ holds the third.

Everything else loops over them: a further precision is a row here and a maker of graphs in precision/, a further
engine a row here and a folder in serving/backends/.
"""

from collections import namedtuple
from dataclasses import dataclass

# bytes per element of a Linear with Q/DQ (input, weight, output) and of every other layer
Element = namedtuple("Element", "input weight output other")


@dataclass(frozen=True)
class Precision:
    """One arithmetic. A plan is a TensorRT engine file; a typed graph fixes the precision by its tensors' types."""

    maker: str  # function of precision/makers.py that makes the graph
    served: bool  # whether it is one of the task's four TensorRT models
    capability: float  # least compute capability whose tensor cores have it; 0: every GPU
    trt10_graph: str  # what trtexec 10 builds by default from: the "reference" or the "typed" graph
    trt10_flags: tuple  # with which flags; from TensorRT 11 on the typed graph alone says it
    plan_has: str | None  # the precision of which a plan must have layers
    element: Element
    peak: str  # column of assets/hardware.csv: what multiplies in a Linear
    other_peak: str  # and in QKᵀ and AV, which have no Q/DQ
    target: dict | None  # what the search for INT8 keeps on the texts that select
    gate: dict | None  # what client.py --check allows on texts that made no choice, averages over texts
    line: object  # style in pictures, readable in black and white
    marker: str
    on_cpu: bool  # whether ONNX Runtime's CPU kernels execute its graph


# the gates are what keeps rankings of texts: FP32 may be TF32 on a GPU, as coarse as FP16; FP16 and BF16: ten
# times what MiniLM shows; INT8 and BEST: wider than the search's target, which holds on other texts
FLOAT_GATE = {"relative_l2_error": 0.01, "mean_cosine": 0.9999}
BF16_GATE = {"relative_l2_error": 0.05, "mean_cosine": 0.998}  # three bits less than FP16
INT8_TARGET = {"relative_l2_error": 0.10, "mean_cosine": 0.99}
INT8_GATE = {"relative_l2_error": 0.12, "mean_cosine": 0.985}

# name: maker, served, capability, graph and flags for TensorRT 10, plan_has, bytes, peaks, target, gate, picture, on_cpu
PRECISIONS = {
    "FP32": Precision(
        "link_reference", True, 0, "reference", (), None, Element(4, 4, 4, 4), "FP32", "FP32",
        None, FLOAT_GATE, "-", "s", True,
    ),
    "TF32": Precision(  # stored as FP32; never a model of its own: it is what a GPU makes of FP32
        "emulate_tf32", False, 8.0, "reference", (), None, Element(4, 4, 4, 4), "TF32", "TF32",
        None, FLOAT_GATE, (0, (1, 1)), "P", True,
    ),
    "FP16": Precision(
        "convert_fp16", True, 7.0, "reference", ("--fp16",), "FP16", Element(2, 2, 2, 2), "FP16", "FP16",
        None, FLOAT_GATE, "--", "^", True,
    ),
    "BF16": Precision(  # made where it is asked for; OpenVINO computes in it what FP32's graph says
        "convert_bf16", False, 8.0, "typed", (), "BF16", Element(2, 2, 2, 2), "BF16", "BF16",
        None, BF16_GATE, (0, (3, 1, 1, 1)), "X", False,
    ),
    "INT8": Precision(  # FP32 around the Q/DQ pairs: it shows the arithmetic
        "insert_int8", True, 7.5, "typed", ("--int8",), "INT8", Element(1, 1, 4, 4), "INT8", "FP32",
        INT8_TARGET, INT8_GATE, "-.", "D", True,
    ),
    "BEST": Precision(  # FP16 around them: the one to deploy
        "insert_int8_fp16", True, 7.5, "typed", ("--best",), "INT8", Element(1, 1, 2, 2), "INT8", "FP16",
        INT8_TARGET, INT8_GATE, ":", "v", True,
    ),
    "FP8": Precision(  # E4M3; FP16 around the Q/DQ pairs; made where it is asked for
        "insert_fp8_fp16", False, 8.9, "typed", (), "FP8", Element(1, 1, 2, 2), "FP8", "FP16",
        INT8_TARGET, INT8_GATE, (0, (5, 1, 1, 1)), "*", False,
    ),
}  # fmt: skip
SERVED = tuple(name for name, row in PRECISIONS.items() if row.served)
FURTHER = tuple(name for name, row in PRECISIONS.items() if row.plan_has and not row.served)  # asked for: --precisions
CPU_PRECISIONS = (*SERVED, "BF16")  # of a service on a CPU
REFERENCE = "ONNX"
REFERENCE_LINE, REFERENCE_MARKER = (0, (5, 1)), "o"


@dataclass(frozen=True)
class Engine:
    """What executes a model, as its config names it and as the server's answer shows it."""

    title: str
    platform: str  # of config.pbtxt; "" where its key stands there as the backend
    file: str  # that it needs in the version folder
    stand_in: str  # what executes it where the server reports "runtime": "model.py", a Python-based backend of ours


ENGINES = {
    "onnxruntime": Engine("ONNX Runtime", "onnxruntime_onnx", "model.onnx", "ONNX Runtime, CPU"),
    "tensorrt": Engine("TensorRT", "tensorrt_plan", "model.plan", "ONNX Runtime, CPU"),
    "openvino": Engine("OpenVINO", "", "model.onnx", "OpenVINO, CPU"),
    "pytorch": Engine("PyTorch", "pytorch_libtorch", "model.pt", "PyTorch, CPU"),
}
# of OpenVINO's config: this project's, which forces FP32 where the server is ours, and the compiled backend's
PRECISION_HINT, HINT_BF16 = "INFERENCE_PRECISION_HINT", "HINT_BF16"

Model = namedtuple("Model", "name engine precision")
# key in results and suffix of the ensemble's outputs -> the served model
MODELS = {REFERENCE: Model("model_ONNX", "onnxruntime", "FP32")}
MODELS |= {f"TRT_{p}": Model(f"model_TRT_{p}", "tensorrt", p) for p in (*SERVED, *FURTHER)}
EMBEDDERS = {key: model.name for key, model in MODELS.items() if model.precision in SERVED}  # the task's five
TORCH = "TORCH"  # key of the checkpoint as a TorchScript, beside the graphs of a service
NAMES = {key: model.name for key, model in MODELS.items()} | {TORCH: "model_TORCH"}


def model_key(precision):
    """Key of the model that serves a precision: ONNX -> ONNX, FP16 -> TRT_FP16."""
    return precision if precision == REFERENCE else f"TRT_{precision}"


# names of tensors
TEXT, INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS = "TEXT", "INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS"
POSITIONS, SEGMENTS, STARTS = "POSITIONS", "SEGMENTS", "STARTS"  # of texts that lie one behind the other
SPANS, WORDS = "SPANS", "WORDS"  # of each token: its first character and the one behind its last; its word's number
EMBEDDING, HIDDEN_STATE, LOGITS = "EMBEDDING", "HIDDEN_STATE", "LOGITS"
LABEL, SCORE, ENTITIES, TOKEN = "LABEL", "SCORE", "ENTITIES", "TOKEN"
QUESTION, CONTEXT, ANSWER, START, END = "QUESTION", "CONTEXT", "ANSWER", "START", "END"
PAST, PRESENT, CROSS = "PAST", "PRESENT", "CROSS"  # caches of a generating model

PACKED_FILE = "packed.onnx"  # beside model.onnx of the reference: the same on texts one behind the other
GRAPH = "_graph"  # behind a service's name: the model by which it calls its graph

MAX_LENGTH = 128  # tokens per text of the task's own embedders
MAX_BATCH_SIZE = 8  # the largest batch of the plans: --maxShapes of build_trt.sh
ONE_PASS_BATCH_SIZE = (
    16  # texts that a pass on a CPU joins: fewer leave cores idle between passes, more keep others waiting
)
OPT_BATCH_SIZE = 4  # the batch that a plan's tactics are chosen for
OPT_LENGTH = 128  # and the length, where it is dynamic

# what a server accepts before it refuses: bytes of a text for each token of the model's length (a token has 4 to 5
# characters, a text may be far longer than the model reads), texts of such a size in one request
BYTES_PER_TOKEN, LARGEST_TEXTS = 512, 4

# the image that builds plans and serves them: the last Triton with TensorRT 10. A plan loads on its own version only
IMAGE = "nvcr.io/nvidia/tritonserver:26.05-py3"
SDK_IMAGE = f"{IMAGE}-sdk"
PINNED_TENSORRT = "10.16.1"
TRITON_TENSORRT = {"2.69.0": PINNED_TENSORRT}  # Triton's version -> its TensorRT's
