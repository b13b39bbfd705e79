"""config.pbtxt of every model of a repository, through Triton's own protobuf: pure functions of the record."""

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from core.repository import EXPORT
from core.tables import BYTES_PER_TOKEN, LARGEST_TEXTS, SPANS
from serving.graph_configs import add_batcher, add_graph, length_of
from tasks.table import OWN, TASKS

FIELD_ORDER = (
    "name",
    "platform",
    "backend",
    "default_model_filename",
    "max_batch_size",
    "input",
    "output",
    "model_transaction_policy",
    "dynamic_batching",
    "instance_group",
    "optimization",
    "ensemble_scheduling",
    "model_warmup",
    "parameters",
)
COMMENTS = {
    "max_batch_size": "texts in one request; the largest batch of the plans: --maxShapes of build_trt.sh",
    "input": "the dims below are those of the export; -1: as long as the longest text of a batch",
    "model_transaction_policy": "one request, many responses: a text in pieces; /infer is for other models, ask /generate",
    "dynamic_batching": "defaults, as Triton's user guide (Batchers) advises for one optimization profile: no preferred\n"
    "# size; no delay, which costs a lone request more than it brings under load; no queue policy: with one, Triton\n"
    "# 2.51's batcher now and then leaves a request lying for half a second (serve.sh --guard bounds what waits)",
    "parameters": "the largest text and the largest request in bytes: more is refused before it is tokenised",
    "instance_group": "one per device: a second one halves a lone request's cores or doubles GPU memory; pinned memory\n"
    "# for its copies is on by default (ModelOptimizationPolicy)",
    "optimization": "on a GPU the CUDA provider multiplies in TF32 by default, and the reference would be as coarse as\n"
    "# the FP32 plan",
    "model_warmup": "a real text at the smallest and the largest batch, so that no request pays for the first run",
}
OF_OPENVINO = {
    "input": "the batch is a dimension like the others: with a max_batch_size this backend executes batches of just that size",
    "parameters": "of this project's server, which then computes in FP32. Triton's own backend reads HINT_BF16 alone: without\n"
    "# it OpenVINO computes in BF16 all the same wherever the CPU has it",
}
HANDED_ON = "MODEL_"  # before an intermediate tensor of an ensemble whose name is that of an output


def data_type(name):
    """Triton's number of a type: STRING, FP32, INT64."""
    return pb.DataType.Value(f"TYPE_{name}")


def add_texts(config, card):
    """What a request has: one string a row of each."""
    for name in TASKS[card["task"]].takes:
        config.input.add(name=name, data_type=pb.TYPE_STRING, dims=[1])


def add_limits(config, max_length):
    """Bytes of a text and of a request, by the length of the model."""
    largest = BYTES_PER_TOKEN * max_length
    config.parameters["max_text_bytes"].string_value = str(largest)
    config.parameters["max_request_bytes"].string_value = str(LARGEST_TEXTS * largest)


def token_tensors(card):
    """{name: dims} of what the tokenizer makes: the graph's inputs, and what the answer needs besides."""
    task, length = TASKS[card["task"]], length_of(card)
    further = [name for name in task.also if name not in (*task.takes, *card["inputs"])]
    return {name: [length, 2] if name == SPANS else [length] for name in (*card["inputs"], *further)}


def tokenizer_config(card, max_batch_size):
    """Texts -> INPUT_IDS, ATTENTION_MASK and, where the model or the answer wants them, others."""
    config = pb.ModelConfig(name="tokenizer", backend="python", max_batch_size=max_batch_size)
    add_texts(config, card)
    for name, dims in token_tensors(card).items():
        config.output.add(name=name, data_type=pb.TYPE_INT64, dims=dims)
    add_batcher(config)
    add_limits(config, card["max_length"])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def postprocess_config(card, max_batch_size):
    """The graph's outputs, and of the tokens and texts what the answer needs -> the task's results."""
    config = pb.ModelConfig(name="postprocess", backend="python", max_batch_size=max_batch_size)
    for name, dims in card["outputs"].items():
        config.input.add(name=name, data_type=pb.TYPE_FP32, dims=dims)
    task, tokens = TASKS[card["task"]], token_tensors(card)
    for name in task.also:
        if name in task.takes:
            config.input.add(name=name, data_type=pb.TYPE_STRING, dims=[1])
        else:
            config.input.add(name=name, data_type=pb.TYPE_INT64, dims=tokens[name])
    add_results(config, card)
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def add_results(config, card):
    """What a service returns: its answers, and the graph's outputs again where the task hands them on."""
    task = TASKS[card["task"]]
    for name, (kind, dims) in task.results.items():
        config.output.add(name=name, data_type=data_type(kind), dims=dims)
    for name, dims in card["outputs"].items() if task.hands_on else ():
        config.output.add(name=name, data_type=pb.TYPE_FP32, dims=dims)


def service_config(name, card, max_batch_size, one_pass=None):
    """Texts -> answers in one model, which asks the graph's model, or in one pass executes the graph itself.

    one_pass: what executes it, for people.
    """
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    add_texts(config, card)
    add_results(config, card)
    add_batcher(config)
    add_limits(config, card["max_length"])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    if one_pass:
        note_one_pass(config, card, one_pass)
    return config


def note_one_pass(config, card, one_pass):
    """What executes a service's graphs in its own process, and of which export they are."""
    config.parameters["one_pass"].string_value = one_pass
    config.parameters["reference_sha256"].string_value = card["reference_sha256"]


def graph_config(name, key, card, max_batch_size):
    """The graph under a name of the service's own, by which its model finds it where one server has several repositories."""
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch_size)
    for tensor in card["inputs"]:
        config.input.add(name=tensor, data_type=pb.TYPE_INT64, dims=[length_of(card)])
    for tensor, dims in card["outputs"].items():
        config.output.add(name=tensor, data_type=pb.TYPE_FP32, dims=dims)
    given, made = ({name: name for name in card[part]} for part in ("inputs", "outputs"))
    add_graph(config, key, card, given, made)
    return config


def ensemble_config(name, keys, card, max_batch_size):
    """TEXT -> the answers of one model, or of every model in `keys` where the task wants all of them."""
    task = TASKS[card["task"]]
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch_size)
    add_texts(config, card)
    steps, tokens = config.ensemble_scheduling.step, {name: name for name in card["inputs"]}
    texts, made = ({name: name for name in names} for names in (task.takes, token_tensors(card)))
    steps.add(model_name="tokenizer", model_version=-1, input_map=texts, output_map=made)
    if card["task"] == OWN:
        for key in keys:
            outputs = {output: f"{output}_{key}" for output in card["outputs"]}
            add_graph(config, key, card, tokens, outputs)
            for output, dims in card["outputs"].items():
                config.output.add(name=outputs[output], data_type=pb.TYPE_FP32, dims=dims)
        return config
    (key,) = keys
    inner = {output: f"{HANDED_ON}{output}" if task.answers else output for output in card["outputs"]}
    add_graph(config, key, card, tokens, inner)
    add_results(config, card)
    if task.answers:
        outputs = {output.name: output.name for output in config.output}
        further = {name: name for name in task.also}
        steps.add(model_name="postprocess", model_version=-1, input_map=inner | further, output_map=outputs)
    return config


def config_text(config):
    """The config as text protobuf: decided fields only, in one order, comments above them."""
    unknown = [field.name for field, _ in config.ListFields() if field.name not in FIELD_ORDER]
    if unknown:
        raise ValueError(f"{config.name}: expected fields of FIELD_ORDER, found {unknown}")
    lines, comments = [], COMMENTS | (OF_OPENVINO if config.backend == "openvino" else {})
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


def read_config(path):
    """Parse a config.pbtxt; exits where it cannot."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except OSError as error:
        raise SystemExit(f"{path}: expected a config, found {error.strerror}; {EXPORT}") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: expected a Triton config, found {error}; {EXPORT}") from None


def config_tensors(config):
    """{name: (Triton's data type, dims)} of a config's inputs and outputs."""
    return {t.name: (t.data_type, tuple(t.dims)) for t in (*config.input, *config.output)}


def describe(tensors):
    """INPUT_IDS INT64 [128], … in a stable order."""
    return ", ".join(
        f"{name} {pb.DataType.Name(kind).removeprefix('TYPE_')} {list(dims)}"
        for name, (kind, dims) in sorted(tensors.items())
    )
