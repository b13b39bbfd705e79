#!/usr/bin/env python3
"""Check that record, graphs, configs, tokenizer and plans of a model repository belong together.

Reads:  --repository; the record and tokenizer of the task's own lie in assets/ beside it.
Writes: nothing.
Run:    python -m serving.check --repository model_repository
Prints: "model_repository: ensemble answers through 5 models, length 128; graphs and configs agree"

serve.sh runs it before each start, with --plans where a GPU serves.
"""

from pathlib import Path

import numpy as np
import onnx

from core.arguments import make_parser
from core.engines import why_missing
from core.files import sha256
from core.metrics import deviations
from core.onnx_runtime import open_session
from core.record import gpu_record
from core.repository import (
    EXPORT,
    answering_key,
    check_made_from,
    engine_of,
    graph_path,
    graph_properties,
    graph_tensors,
    is_own,
    present,
    read_card,
    read_graph,
    script_path,
    site_packages,
    tokenizer_path,
)
from core.tables import (
    ATTENTION_MASK,
    EMBEDDERS,
    GRAPH,
    MAX_BATCH_SIZE,
    MODELS,
    NAMES,
    PINNED_TENSORRT,
    REFERENCE,
    TORCH,
)
from core.tokens import encode, load_tokenizer
from serving import configs, generation, graph_configs
from serving.plans import check_plan, check_served_plans
from serving.server import SERVER_ERRORS, infer, one_pass, text_tensor
from tasks.examples import examples
from tasks.table import OWN, TASKS

ONNX_TYPES = {onnx.TensorProto.INT64: "INT64", onnx.TensorProto.FLOAT: "FP32"}
SAME_MODEL_L2 = 0.05  # TF32 on a GPU stays far below, another model far above
QUESTION = "Is the model behind the server the one in the repository?"


def served_keys(repository):
    """Keys of the models that a repository has configs of: the task's own has the five, also before there are graphs."""
    there = present(repository)
    return [key for key in MODELS if key in there or (is_own(repository) and key in EMBEDDERS)]


def answering_keys(card, keys):
    """Keys of the models through which a service answers: the task's own through all that it has."""
    key = answering_key(card["service"])
    if card["task"] != OWN:
        return [key]
    return [*keys, TORCH] if key == TORCH else keys


def expected_configs(repository, card, warmup_length):
    """The configs that a repository with this record has to have."""
    task, service = TASKS[card["task"]], card["service"]
    batch, keys = service.get("max_batch_size", MAX_BATCH_SIZE), served_keys(repository)
    answering = answering_keys(card, keys)
    found = [configs.tokenizer_config(card, batch)]
    if task.windows:
        found += [configs.service_config(service["name"], card, batch)]
        found += [configs.graph_config(service["name"] + GRAPH, answering[0], card, batch)]
    else:
        found += [configs.ensemble_config(service["name"], answering, card, batch)]
        found += [configs.postprocess_config(card, batch)] if task.answers else []
    found += [graph_configs.script_config(card, batch, warmup_length)] if script_path(repository).is_file() else []
    return found + [
        graph_configs.model_config(key, card, batch, engine_of(repository, card, key), warmup_length) for key in keys
    ]


# --- the parts -----------------------------------------------------------------------


def check_configs(repository, card):
    """Exit unless every config there is has the tensors and the platform that the record asks for."""
    remedy = f"run python -m serving.repository --repository {repository}, or torch2onnx.py"
    expected = {config.name: config for config in expected_configs(repository, card, 1)}
    folders = {path.name for path in repository.iterdir() if path.is_dir()}
    for name in sorted(folders | expected.keys()):
        path = repository / name / "config.pbtxt"
        found = configs.read_config(path)
        if name not in expected:
            raise SystemExit(f"{path}: expected no such model by the record, found one; {remedy}, or remove it")
        if configs.config_tensors(found) != configs.config_tensors(expected[name]):
            raise SystemExit(
                f"{path}: expected what the record and {graph_path(repository, REFERENCE)} need, "
                f"{configs.describe(configs.config_tensors(expected[name]))}; found {configs.describe(configs.config_tensors(found))}; {remedy}"
            )
        served = [config.platform or config.backend for config in (expected[name], found)]
        if len(set(served)) > 1:
            raise SystemExit(f"{path}: expected platform {served[0]}, found {served[1]}; {remedy}")


def check_graph(repository, key, card):
    """One graph: whole, with the config's tensors, of this precision and of the present export. Returns its notes."""
    path = graph_path(repository, key)
    config = path.parents[1] / "config.pbtxt"
    graph = read_graph(path)
    batch = () if configs.read_config(config).max_batch_size else (-1,)  # without one it is a dimension like others
    found = {
        name: (configs.data_type(ONNX_TYPES.get(kind, "INVALID")), (*batch, *dims))
        for name, (kind, dims) in graph_tensors(graph).items()
    }
    if found != configs.config_tensors(configs.read_config(config)):
        raise SystemExit(
            f"{config}: expected the tensors of {path}, {configs.describe(found)}; "
            f"found {configs.describe(configs.config_tensors(configs.read_config(config)))}; run torch2onnx.py, then quantize.py"
        )
    for name in card["inputs"]:
        if not (config.parent / "warmup" / name).is_file():
            raise SystemExit(f"{config.parent / 'warmup' / name}: expected the warm-up input, found none; {EXPORT}")
    properties, precision = graph_properties(graph), MODELS[key].precision
    if (found := properties.get("precision", "FP32")) != precision:
        raise SystemExit(f"{path}: expected a graph in {precision}, found one in {found}; run quantize.py")
    check_made_from(graph, path, card["reference_sha256"])
    return properties


def check_script(repository, card):
    """Exit unless the TorchScript is that of the export; where the service answers through it, it has to be there."""
    path, remedy = script_path(repository), f"{EXPORT} --torchscript"
    if not path.is_file():
        if card["service"].get("engine") == "pytorch":
            raise SystemExit(f"{path}: expected the TorchScript of --engine pytorch, found none; {remedy}")
        return
    if (found := sha256(path)) != card.get("torchscript_sha256"):
        raise SystemExit(
            f"{path}: expected the TorchScript of the export, found another or a broken file ({found[:12]}); {remedy}"
        )


def check_one_search(repository, properties):
    """Exit if INT8 and BEST say that they come from different searches; properties: {key: notes of the graph}."""
    found = {key: notes["recipe_sha256"] for key, notes in properties.items() if "recipe_sha256" in notes}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key} {digest[:12]}" for key, digest in found.items())
        raise SystemExit(f"{repository}: expected INT8 and BEST of one search, found {said}; run quantize.py")


def check_tokenizer(repository, card):
    """The tokenizer is there, pads and truncates as the record says, and has its package."""
    path = tokenizer_path(repository)
    tokenizer = load_tokenizer(path)
    found = ((tokenizer.truncation or {}).get("max_length"), (tokenizer.padding or {}).get("length"))
    expected = (card["max_length"], card["max_length"] if card["fixed_length"] else None)
    if found != expected:
        raise SystemExit(f"{path}: expected truncation and padding to {expected}, found {found}; {EXPORT}")
    if not (site_packages(repository) / "tokenizers").is_dir():
        raise SystemExit(f"{site_packages(repository) / 'tokenizers'}: expected a folder, found none; {EXPORT}")


# --- the whole -----------------------------------------------------------------------


def check_repository(repository, plans=False, read=None):
    """Exit with the first disagreement in a repository; else a summary.

    plans: hold the plans against this GPU too. read: keys of the graphs to look into, all where nothing is said.
    """
    card = read_card(repository)
    service = card.get("service") or {}
    if not service.get("name"):
        raise SystemExit(
            f"{repository}: expected a record that says what is served, found none; "
            f"run python -m serving.repository --repository {repository}"
        )
    if generation.is_generation(card):
        return generation.check_repository(repository)
    keys = served_keys(repository)
    properties = {key: check_graph(repository, key, card) for key in keys if read is None or key in read}
    check_script(repository, card)
    check_configs(repository, card)
    check_one_search(repository, properties)
    check_tokenizer(repository, card)
    for key in keys if plans else ():
        if engine_of(repository, card, key) == "tensorrt":
            check_plan(repository, key, card["reference_sha256"], gpu_record(), PINNED_TENSORRT)
    answering = answering_keys(card, keys)
    answering = f"{len(answering)} models" if card["task"] == OWN else NAMES[answering[0]]
    length = f"length {card['max_length']}" if card["fixed_length"] else f"length up to {card['max_length']}"
    return f"{service['name']} answers through {answering}, {length}, up to {service['max_batch_size']} texts a request"


def check_served(repository, card, server, url, protocol="http"):
    """Exit if the server answers otherwise than the repository: by its reference, and by its plans where it has some.

    A server that was started before another export would be measured under its name. server: what
    serving.server.read_server returned.
    """
    if found := one_pass(card["service"]["name"], url, protocol):
        server |= {"path": "one pass", "executed_by": found["one_pass"]}
        if found["reference_sha256"] != card["reference_sha256"]:
            raise SystemExit(f"{url}: expected the export in {repository}, found another; ./serve.sh stop, then start")
        return
    check_served_plans(repository, card["reference_sha256"], server)
    path, output = graph_path(repository, REFERENCE), TASKS[card["task"]].output
    if not path.is_file():
        raise SystemExit(f"{path}: expected the graph that is served, found none; {EXPORT}")
    try:
        asked = examples(card, [QUESTION])
        feeds = infer("tokenizer", text_tensor(asked, TASKS[card["task"]].takes), card["inputs"], url, protocol)
        served = infer(EMBEDDERS[REFERENCE], feeds, [output], url, protocol)[output]
        own = open_session(path).run([output], encode(load_tokenizer(tokenizer_path(repository)), asked, feeds))[0]
        rows = feeds[ATTENTION_MASK] if TASKS[card["task"]].per_token else np.ones((1, 1))
        error = deviations(own.reshape(1, -1, own.shape[-1]), served.reshape(1, -1, own.shape[-1]), rows)
        error = error["relative_l2_error"]
    except SERVER_ERRORS as found:
        raise SystemExit(f"{url}: expected an answer, found: {found}; ./serve.sh status, then its log") from None
    except Exception as found:  # ONNX Runtime on ids that the other model's tokenizer made; ValueError on shapes
        error = str(found)
    if isinstance(error, str) or error > SAME_MODEL_L2:
        raise SystemExit(
            f"{url}: expected the model in {path}, found another (relative L2 error {error}); ./serve.sh stop, then start"
        )


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--repository", type=Path, action="append", required=True, help="again for those of one server")
    parser.add_argument("--plans", action="store_true", help="hold the TensorRT plans against this GPU and the image")
    return parser.parse_args()


def check_all(repositories, plans=False, read=None):
    """Check the repositories of one server; a line about each. Exits with the first disagreement.

    read: {repository: what check_repository takes}.
    """
    names, lines = {}, []
    for repository in repositories:
        said = check_repository(repository, plans, (read or {}).get(repository))
        name = read_card(repository)["service"]["name"]
        if name in names:
            raise SystemExit(
                f"{repository}: expected services of different names, found {name!r} in {names[name]} too; rename one with "
                f"python -m serving.repository --repository {repository} --name NAME"
            )
        names[name] = repository
        lines.append(f"{repository.name}: {said}; graphs and configs agree")
    return lines


def check_generating(repositories):
    """Exit where several services of one server would ask for a decoder: Triton finds a model by a name that is the only one."""
    found = [repository for repository in repositories if generation.is_generation(read_card(repository))]
    if len(found) > 1:
        raise SystemExit(
            f"{found[1]}: expected one service that generates in a server of graphs, found {found[0]} too; start a server "
            "for each, or on a CPU leave out --path ensemble"
        )


def check_engine(repository, plans=False):
    """Exit where this machine has not what executes a service's graphs; the container has its own."""
    engine = (read_card(repository).get("service") or {}).get("engine")
    if not plans and (reason := why_missing(engine)):
        raise SystemExit(f"{repository}: --engine {engine}: {reason}")


def main():
    args = parse_args()
    print(*check_all(args.repository, args.plans), sep="\n")
    for repository in args.repository:
        check_engine(repository, args.plans)
    check_generating(args.repository)


if __name__ == "__main__":
    main()
