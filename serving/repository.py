#!/usr/bin/env python3
"""Check that graphs, configs, tokenizer and plans of the model repository belong together.

Reads:  model_repository/, assets/ beside it.
Writes: nothing; torch2onnx.py calls write_repository, which makes the configs.
Run:    ./repository.py --engine onnx
Prints: "model_repository: 7 models, length 128, 2 outputs, graphs and configs agree"

serve.sh runs it before each start. --engine says what the TensorRT models are served from: onnx (typed graphs, on a
CPU) or plan (TensorRT plans, on a GPU).
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from core.files import ASSETS, REPOSITORY, ROOT, read_json, replace_when_done, sha256
from core.record import gpu_record
from core.tables import ATTENTION_MASK, EMBEDDERS, EMBEDDING, INPUT_IDS, MAX_BATCH_SIZE, REFERENCE, SERVED, TEXT

FIELD_ORDER = (
    "name",
    "platform",
    "backend",
    "max_batch_size",
    "input",
    "output",
    "dynamic_batching",
    "instance_group",
    "ensemble_scheduling",
    "model_warmup",
)
COMMENTS = {
    "dynamic_batching": "defaults, as Triton's user guide (Batchers) advises for one optimization profile: no preferred\n"
    "# size; no delay, which costs a lone request more than it brings under load (tune.py)",
    "instance_group": "one per device: a second one halves a lone request's cores (tune.py) or doubles GPU memory;\n"
    "# pinned memory for its copies is on by default (ModelOptimizationPolicy)",
    "model_warmup": "a real text at the smallest and the largest batch, so that no request pays for the first run",
    "max_batch_size": "the largest batch of the plans: --maxShapes of build_trt.sh",
    "input": "the dims below are those of the export: torch2onnx.py --max-length, --num-outputs",
}
PINNED_TENSORRT = "10.16.1"  # of the image that serve.sh and build_trt.sh name; a plan loads on its own version only
MANIFEST_KEYS = (
    "graph",
    "graph_sha256",
    "reference_sha256",
    "plan_sha256",
    "gpu",
    "compute_capability",
    "tensorrt_version",
)
TRITON_TENSORRT = {"2.69.0": PINNED_TENSORRT}
DATA_TYPES = {onnx.TensorProto.INT64: pb.TYPE_INT64, onnx.TensorProto.FLOAT: pb.TYPE_FP32}


# --- writing -------------------------------------------------------------------------


def tensors(config):
    """Set of (name, data type, dims) of a config's inputs and outputs."""
    return {(t.name, t.data_type, tuple(t.dims)) for t in (*config.input, *config.output)}


def tokenizer_config(length):
    """TEXT -> INPUT_IDS, ATTENTION_MASK, both int64 [batch, length]."""
    config = pb.ModelConfig(name="tokenizer", backend="python", max_batch_size=MAX_BATCH_SIZE)
    config.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[1])
    config.output.add(name=INPUT_IDS, data_type=pb.TYPE_INT64, dims=[length])
    config.output.add(name=ATTENTION_MASK, data_type=pb.TYPE_INT64, dims=[length])
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def embedder_config(suffix, length, num_outputs):
    """INPUT_IDS, ATTENTION_MASK -> EMBEDDING float32 [batch, length, outputs]."""
    platform = "onnxruntime_onnx" if suffix == REFERENCE else "tensorrt_plan"
    config = pb.ModelConfig(name=EMBEDDERS[suffix], platform=platform, max_batch_size=MAX_BATCH_SIZE)
    config.input.add(name=INPUT_IDS, data_type=pb.TYPE_INT64, dims=[length])
    config.input.add(name=ATTENTION_MASK, data_type=pb.TYPE_INT64, dims=[length])
    config.output.add(name=EMBEDDING, data_type=pb.TYPE_FP32, dims=[length, num_outputs])
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_AUTO)
    for batch in (1, MAX_BATCH_SIZE):
        warmup = config.model_warmup.add(name=f"batch {batch}", batch_size=batch)
        for name in (INPUT_IDS, ATTENTION_MASK):
            tensor = warmup.inputs[name]
            tensor.data_type, tensor.input_data_file = pb.TYPE_INT64, name
            tensor.dims.append(length)
    return config


def ensemble_config(length, num_outputs):
    """TEXT -> one EMBEDDING_* per embedder, each float32 [batch, length, outputs]."""
    config = pb.ModelConfig(name="ensemble", platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
    config.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[1])
    steps = config.ensemble_scheduling.step
    tokens = {INPUT_IDS: INPUT_IDS, ATTENTION_MASK: ATTENTION_MASK}
    steps.add(model_name="tokenizer", model_version=-1, input_map={TEXT: TEXT}, output_map=tokens)
    for suffix, model in EMBEDDERS.items():
        output = f"{EMBEDDING}_{suffix}"
        config.output.add(name=output, data_type=pb.TYPE_FP32, dims=[length, num_outputs])
        steps.add(model_name=model, model_version=-1, input_map=tokens, output_map={EMBEDDING: output})
    return config


def config_text(config, comments=COMMENTS):
    """The config as text protobuf: decided fields only, in one order, comments above them."""
    unknown = [field.name for field, _ in config.ListFields() if field.name not in FIELD_ORDER]
    if unknown:
        raise ValueError(f"{config.name}: expected fields of FIELD_ORDER, found {unknown}")
    lines = []
    for field in FIELD_ORDER:
        part = pb.ModelConfig()
        part.MergeFrom(config)
        for descriptor, _ in config.ListFields():
            if descriptor.name != field:
                part.ClearField(descriptor.name)
        if part.ListFields():
            lines += [f"# {comments[field]}"] if field in comments else []
            lines.append(text_format.MessageToString(part).rstrip("\n"))
    return "\n".join(lines) + "\n"


def write_repository(repository, length, num_outputs, warmup):
    """Write the seven configs for this length and number of outputs, and what they need.

    warmup: {INPUT_IDS: int64 [length], ATTENTION_MASK: …} of one real text. A repository
    elsewhere also gets the tokenizer's model.py; the project's own has it.
    """
    configs = [tokenizer_config(length), ensemble_config(length, num_outputs)]
    configs += [embedder_config(suffix, length, num_outputs) for suffix in EMBEDDERS]
    for config in configs:
        path = repository / config.name / "config.pbtxt"
        (path.parent / "1").mkdir(parents=True, exist_ok=True)
        with replace_when_done(path) as temporary:
            temporary.write_text(config_text(config))
    for model in EMBEDDERS.values():
        for name, values in warmup.items():
            with replace_when_done(repository / model / "warmup" / name) as temporary:
                temporary.write_bytes(np.asarray(values, dtype="<i8").tobytes())  # as Triton reads it
    code = Path("tokenizer/1/model.py")
    if repository.resolve() != REPOSITORY:
        shutil.copyfile(REPOSITORY / code, repository / code)


# --- checking ------------------------------------------------------------------------


def read_config(path):
    """Parse a config.pbtxt with Triton's own protobuf; exits where it cannot."""
    try:
        return text_format.Parse(path.read_text(), pb.ModelConfig())
    except OSError as error:
        raise SystemExit(f"{path}: expected a config, found {error.strerror}; run torch2onnx.py") from None
    except text_format.ParseError as error:
        raise SystemExit(f"{path}: expected a Triton config, found {error}; run torch2onnx.py") from None


def read_graph(path):
    """Load an ONNX file; exits where it is missing or broken, with the command that makes it."""
    remedy = "run torch2onnx.py" if path.parts[-3] == EMBEDDERS[REFERENCE] else "run quantize.py"
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
    """Set of (name, Triton data type, dims without the batch) of an ONNX graph."""
    result = set()
    for value in (*graph.graph.input, *graph.graph.output):
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value for d in tensor.shape.dim)[1:]
        result.add((value.name, DATA_TYPES.get(tensor.elem_type, pb.TYPE_INVALID), dims))
    return result


def describe(tensor_set):
    """INPUT_IDS TYPE_INT64 [128], … in a stable order."""
    return ", ".join(f"{n} {pb.DataType.Name(t)} {list(d)}" for n, t, d in sorted(tensor_set))


def graph_properties(graph):
    """{name: text} that quantize.py noted in a graph; empty for the reference."""
    return {p.key: p.value for p in graph.metadata_props}


def check_made_from(graph, path, reference_path, reference_sha256):
    """Exit unless the graph was made from the present reference, or is it."""
    made_from = graph_properties(graph).get("reference_sha256") or sha256(path)
    if made_from != reference_sha256:
        raise SystemExit(
            f"{path}: expected a graph made from {reference_path} ({reference_sha256[:12]}), "
            f"found one made from {made_from[:12]}; run quantize.py"
        )


def check_one_search(repository, properties):
    """Exit if INT8 and BEST say that they come from different searches; properties: {suffix: those of the graph}."""
    digests = {p: properties[f"TRT_{p}"].get("recipe_sha256") for p in ("INT8", "BEST")}
    if None not in digests.values() and len(set(digests.values())) > 1:
        found = " and ".join(f"{p} {digest[:12]}" for p, digest in digests.items())
        raise SystemExit(f"{repository}: expected INT8 and BEST of one search, found {found}; run quantize.py")


def check_embedder(repository, suffix, reference_sha256, engine):
    """One embedder: graph there, whole, of the present export, and like its config. Returns the graph's properties."""
    folder = repository / EMBEDDERS[suffix]
    graph_path, config_path = folder / "1" / "model.onnx", folder / "config.pbtxt"
    config = read_config(config_path)
    graph = read_graph(graph_path)
    for name in (INPUT_IDS, ATTENTION_MASK):
        if not (folder / "warmup" / name).is_file():
            raise SystemExit(f"{folder / 'warmup' / name}: expected the warm-up input, found none; run torch2onnx.py")
    if graph_tensors(graph) != tensors(config):
        raise SystemExit(
            f"{config_path}: expected the tensors of {graph_path}, {describe(graph_tensors(graph))}; "
            f"found {describe(tensors(config))}; run torch2onnx.py, then quantize.py"
        )
    properties = graph_properties(graph)
    expected = suffix.removeprefix("TRT_")
    if properties.get("precision", expected if expected in (REFERENCE, "FP32") else REFERENCE) != expected:
        raise SystemExit(f"{graph_path}: expected a graph in {expected}, found another; run quantize.py")
    check_made_from(graph, graph_path, repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx", reference_sha256)
    if engine == "plan" and suffix != REFERENCE:
        # serve.sh starts the pinned image
        check_plan(repository, suffix.removeprefix("TRT_"), reference_sha256, gpu_record(), PINNED_TENSORRT)
    return properties


# --- plans ---------------------------------------------------------------------------


def plan_folder(repository, precision):
    """Where the plan of a precision lies, with its layers and manifest."""
    return repository / EMBEDDERS[f"TRT_{precision}"] / "1"


def check_plan(repository, precision, reference_sha256, gpu=None, tensorrt_version=None):
    """Exit unless the manifest fits the present graph, GPU and server; names both sides.

    gpu: {"name", "compute_capability"} of this machine or None; tensorrt_version: that of
    the server or None. What is None is not compared.
    """
    folder = plan_folder(repository, precision)
    plan, path = folder / "model.plan", folder / "manifest.json"
    remedy = "run build_trt.sh on the GPU that serves"
    if not plan.exists():
        raise SystemExit(f"{plan}: expected a TensorRT plan, found none; {remedy}")
    manifest = read_json(path, remedy)
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing or not (repository / manifest["graph"]).is_file():
        raise SystemExit(f"{path}: expected a whole manifest and its graph, found {missing or 'no graph'}; {remedy}")

    def compare(what, expected, found):
        if expected != found:
            raise SystemExit(f"{plan}: expected {what} {expected}, found one built for {found} ({path}); {remedy}")

    if manifest.get("plain_int8"):
        print(f"{plan}: built with --plain-int8, for comparison: INT8 in name only", file=sys.stderr)
    compare("a plan with SHA-256", sha256(plan)[:12], manifest["plan_sha256"][:12])
    compare("the reference graph", reference_sha256[:12], manifest["reference_sha256"][:12])
    compare(
        f"the graph {manifest['graph']}", sha256(repository / manifest["graph"])[:12], manifest["graph_sha256"][:12]
    )
    if gpu:
        compare("the GPU", gpu["name"], manifest["gpu"])
        compare("compute capability", gpu["compute_capability"], manifest["compute_capability"])
    if tensorrt_version:
        compare("TensorRT", tensorrt_version, manifest["tensorrt_version"])
    return manifest


def check_served_plans(repository, reference_sha256, server):
    """Check the plans behind a running server; `server` is the record that client.py reads.

    Nothing to check where no model is executed by TensorRT. An unknown Triton version is
    said on stderr and not compared.
    """
    served = [p for p in SERVED if server["engines"][f"TRT_{p}"].startswith("TensorRT")]
    version = TRITON_TENSORRT.get(server["version"])
    if served and not version:
        print(
            f"Triton {server['version']}: its TensorRT version is not known here and was not compared", file=sys.stderr
        )
    return {p: check_plan(repository, p, reference_sha256, gpu_record(), version) for p in served}


# --- the whole -----------------------------------------------------------------------


def check_tokenizer(repository, assets, length):
    """The exported tokenizer is there and pads and truncates to the configs' length."""
    path = assets / "tokenizer" / "tokenizer.json"
    tokenizer = read_json(path, "run torch2onnx.py")
    padding = (tokenizer.get("padding") or {}).get("strategy")
    truncation = (tokenizer.get("truncation") or {}).get("max_length")
    if padding != {"Fixed": length} or truncation != length:
        raise SystemExit(
            f"{path}: expected padding and truncation to {length}, the length of "
            f"{repository / 'tokenizer' / 'config.pbtxt'}; found {padding} and {truncation}; run torch2onnx.py"
        )
    if not (assets / "site-packages" / "tokenizers").is_dir():
        raise SystemExit(f"{assets}/site-packages/tokenizers: expected a folder, found none; run torch2onnx.py")


def check_repository(repository, assets, engine):
    """Exit with the first disagreement between graphs, configs and tokenizer; else a summary."""
    reference = repository / EMBEDDERS[REFERENCE] / "1" / "model.onnx"
    graph_outputs = read_graph(reference).graph.output
    reference_sha256 = sha256(reference)
    card = read_json(assets / "model.json", "run torch2onnx.py")
    if card["reference_sha256"] != reference_sha256:
        raise SystemExit(
            f"{assets / 'model.json'}: expected the record of {reference} ({reference_sha256[:12]}), "
            f"found that of {card['reference_sha256'][:12]}; run torch2onnx.py"
        )
    properties = {suffix: check_embedder(repository, suffix, reference_sha256, engine) for suffix in EMBEDDERS}
    check_one_search(repository, properties)
    length, num_outputs = (d.dim_value for d in graph_outputs[0].type.tensor_type.shape.dim[1:])
    for expected in (tokenizer_config(length), ensemble_config(length, num_outputs)):
        path = repository / expected.name / "config.pbtxt"
        if tensors(read_config(path)) != tensors(expected):
            raise SystemExit(
                f"{path}: expected what {reference} needs, {describe(tensors(expected))}; "
                f"found {describe(tensors(read_config(path)))}; run torch2onnx.py"
            )
    check_tokenizer(repository, assets, length)
    return f"{repository.name}: {len(EMBEDDERS) + 2} models, length {length}, {num_outputs} outputs"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--assets", type=Path, default=None, help="default: assets/ beside the repository")
    parser.add_argument("--engine", choices=("onnx", "plan"), default="onnx")
    return parser.parse_args()


def main():
    args = parse_args()
    from serving.classifier_repository import check_classifier_repository, is_classifier

    if is_classifier(args.repository):
        print(f"{check_classifier_repository(args.repository, args.engine)}, graphs and configs agree")
        return
    assets = args.assets or args.repository.resolve().parent / ASSETS.relative_to(ROOT)
    print(f"{check_repository(args.repository, assets, args.engine)}, graphs and configs agree")


if __name__ == "__main__":
    main()
