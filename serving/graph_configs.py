"""config.pbtxt of what executes a graph, by engine, and the step of an ensemble that asks it."""

from tritonclient.grpc import model_config_pb2 as pb

from core.tables import ENGINES, HINT_BF16, MODELS, NAMES, PRECISION_HINT, REFERENCE, TORCH


def length_of(card):
    """The sequence dimension: a number where it was fixed, else -1."""
    return card["max_length"] if card["fixed_length"] else -1


def add_batcher(config):
    """Requests that wait join one batch."""
    config.dynamic_batching.SetInParent()


def model_config(key, card, max_batch_size, engine, warmup_length):
    """Token tensors -> the graph's outputs; engine is a key of ENGINES."""
    if engine == "openvino":
        return openvino_config(key, card, warmup_length)
    config = pb.ModelConfig(name=NAMES[key], platform=ENGINES[engine].platform, max_batch_size=max_batch_size)
    for name in card["inputs"]:
        config.input.add(name=name, data_type=pb.TYPE_INT64, dims=[length_of(card)])
    for name, dims in card["outputs"].items():
        config.output.add(name=name, data_type=pb.TYPE_FP32, dims=dims)
    add_batcher(config)
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_AUTO)
    if engine == "onnxruntime" and MODELS[key].precision == "FP32":
        compute_in_fp32(config)
    for batch in sorted({1, max_batch_size}):
        add_warmup(config, {name: name for name in card["inputs"]}, batch, [warmup_length])
    return config


def compute_in_fp32(config):
    """Forbid TF32, which the CUDA provider takes by default."""
    cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    cuda.parameters["use_tf32"] = "0"


def add_warmup(config, files, batch, dims, count=0):
    """A real text, whose tensors lie in files; files: {input: name}. count: runs, where it is more than one."""
    warmup = config.model_warmup.add(name=f"batch {batch}", batch_size=batch, count=count)
    for name, file in files.items():
        tensor = warmup.inputs[name]
        tensor.data_type, tensor.input_data_file = pb.TYPE_INT64, file
        tensor.dims.extend(dims)


def openvino_config(key, card, warmup_length):
    """The same graph for OpenVINO, as its compiled backend takes any batch: the batch is a dimension like the others.

    With a max_batch_size that backend executes batches of just this size.
    """
    config = pb.ModelConfig(name=NAMES[key], backend="openvino", default_model_filename=ENGINES["openvino"].file)
    for name in card["inputs"]:
        config.input.add(name=name, data_type=pb.TYPE_INT64, dims=[-1, length_of(card)])
    for name, dims in card["outputs"].items():
        config.output.add(name=name, data_type=pb.TYPE_FP32, dims=[-1, *dims])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    if key == REFERENCE and (card.get("service") or {}).get("precision") == "BF16":
        config.parameters[HINT_BF16].string_value = "YES"
    else:
        config.parameters[PRECISION_HINT].string_value = "f32"
    add_warmup(config, {name: name for name in card["inputs"]}, 1, [1, warmup_length])
    return config


def script_names(card):
    """{tensor: its name in a TorchScript's config}, which counts them."""
    inputs = {name: f"INPUT__{number}" for number, name in enumerate(card["inputs"])}
    return inputs | {name: f"OUTPUT__{number}" for number, name in enumerate(card["outputs"])}


def script_config(card, max_batch_size, warmup_length):
    """The checkpoint as a TorchScript."""
    names, platform = script_names(card), ENGINES["pytorch"].platform
    config = pb.ModelConfig(name=NAMES[TORCH], platform=platform, max_batch_size=max_batch_size)
    for name in card["inputs"]:
        config.input.add(name=names[name], data_type=pb.TYPE_INT64, dims=[length_of(card)])
    for name, dims in card["outputs"].items():
        config.output.add(name=names[name], data_type=pb.TYPE_FP32, dims=dims)
    add_batcher(config)
    # a trace keeps the device on which it was made
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    for batch in sorted({1, max_batch_size}):  # more than once: torch optimises what it has run
        add_warmup(config, {names[name]: name for name in card["inputs"]}, batch, [warmup_length], count=3)
    return config


def add_graph(config, key, card, given, made):
    """An ensemble's step that asks a graph; given, made: {tensor of the graph: tensor of the ensemble}."""
    if key == TORCH:
        names = script_names(card)
        given, made = ({names[name]: tensor for name, tensor in tensors.items()} for tensors in (given, made))
    config.ensemble_scheduling.step.add(model_name=NAMES[key], model_version=-1, input_map=given, output_map=made)
