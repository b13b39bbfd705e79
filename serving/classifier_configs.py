"""Configs of a classifier's repository, through Triton's protobuf."""

from tritonclient.grpc import model_config_pb2 as pb

from core.tables import EMBEDDERS, LOGITS, TEXT
from serving.repository import COMMENTS

LABEL, SCORE = "LABEL", "SCORE"
PLATFORMS = {"onnx": "onnxruntime_onnx", "plan": "tensorrt_plan"}
OUR_COMMENTS = COMMENTS | {
    "max_batch_size": "texts in one request: classifier_repository.py --max-batch-size",
    "input": "-1: as long as the longest text of a batch; other dims are those of the export",
}


def new_config(name, max_batch_size, **kind):
    """A config with what all have in common."""
    return pb.ModelConfig(name=name, max_batch_size=max_batch_size, **kind)


def length_of(card):
    """The sequence dimension: a number where it was fixed, else -1."""
    return card["max_length"] if card["fixed_length"] else -1


def tokenizer_config(card, max_batch_size):
    """TEXT -> INPUT_IDS, ATTENTION_MASK and, where the model wants them, TOKEN_TYPE_IDS."""
    config = new_config("tokenizer", max_batch_size, backend="python")
    config.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[1])
    for name in card["inputs"]:
        config.output.add(name=name, data_type=pb.TYPE_INT64, dims=[length_of(card)])
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def model_config(suffix, card, max_batch_size, kind, warmup_length):
    """Token tensors -> LOGITS float32 [batch, classes]; kind is onnx or plan."""
    config = new_config(EMBEDDERS[suffix], max_batch_size, platform=PLATFORMS[kind])
    for name in card["inputs"]:
        config.input.add(name=name, data_type=pb.TYPE_INT64, dims=[length_of(card)])
    config.output.add(name=LOGITS, data_type=pb.TYPE_FP32, dims=[len(card["labels"])])
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_AUTO)
    for batch in sorted({1, max_batch_size}):
        warmup = config.model_warmup.add(name=f"batch {batch}", batch_size=batch)
        for name in card["inputs"]:
            tensor = warmup.inputs[name]
            tensor.data_type, tensor.input_data_file = pb.TYPE_INT64, name
            tensor.dims.append(warmup_length)
    return config


def postprocess_config(card, max_batch_size):
    """LOGITS -> LABEL, SCORE, both as long as the request's top_k."""
    config = new_config("postprocess", max_batch_size, backend="python")
    config.input.add(name=LOGITS, data_type=pb.TYPE_FP32, dims=[len(card["labels"])])
    config.output.add(name=LABEL, data_type=pb.TYPE_STRING, dims=[-1])
    config.output.add(name=SCORE, data_type=pb.TYPE_FP32, dims=[-1])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def ensemble_config(name, suffix, card, max_batch_size):
    """TEXT -> LABEL, SCORE, LOGITS through one of the graphs."""
    config = new_config(name, max_batch_size, platform="ensemble")
    config.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[1])
    config.output.add(name=LABEL, data_type=pb.TYPE_STRING, dims=[-1])
    config.output.add(name=SCORE, data_type=pb.TYPE_FP32, dims=[-1])
    config.output.add(name=LOGITS, data_type=pb.TYPE_FP32, dims=[len(card["labels"])])
    steps, tokens = config.ensemble_scheduling.step, {name: name for name in card["inputs"]}
    scores = {LABEL: LABEL, SCORE: SCORE}
    steps.add(model_name="tokenizer", model_version=-1, input_map={TEXT: TEXT}, output_map=tokens)
    steps.add(model_name=EMBEDDERS[suffix], model_version=-1, input_map=tokens, output_map={LOGITS: LOGITS})
    steps.add(model_name="postprocess", model_version=-1, input_map={LOGITS: LOGITS}, output_map=scores)
    return config
