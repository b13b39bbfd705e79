"""The repository of a service that generates: its graphs' configs, the service itself, and their check."""

import importlib.util
import os
import shutil
from pathlib import Path

import tokenizers
from tritonclient.grpc import model_config_pb2 as pb

from core.files import ROOT, replace_folder_when_done, replace_when_done, sha256, write_json
from core.repository import (
    EXPORT,
    HEALTH,
    RECORD,
    check_name,
    graph_properties,
    graph_tensors,
    read_card,
    read_graph,
)
from core.tables import ATTENTION_MASK, CROSS, INPUT_IDS, LOGITS, PAST, PRESENT, REFERENCE
from core.tokens import load_tokenizer
from serving import configs, graph_configs
from tasks.table import GENERATION, GENERATION_PRECISIONS

SETTINGS = ("chat_template", "special_tokens", "max_length", "max_new_tokens")  # of the record, that a service reads
CODE = {  # file in the service's version folder -> where it comes from
    "model.py": ROOT / "serving" / "models" / "generation.py",
    "generation.py": ROOT / "core" / "generation.py",
    "prompts.py": ROOT / "core" / "prompts.py",
    "texts.py": ROOT / "model_repository" / "tokenizer" / "1" / "texts.py",
}
RESULTS = {"GENERATED": "STRING", "TOKENS": "INT64", "FINISH_REASON": "STRING"}


def is_generation(card):
    """Whether a record is that of a service that generates."""
    return card["task"] in GENERATION


def graph_folder(graph, precision):
    """Name of the model that runs a graph: decoder, decoder_FP16."""
    return graph if precision == REFERENCE else f"{graph}_{precision}"


def graph_paths(repository, card, precision=REFERENCE):
    """{graph: path} of a precision."""
    return {g: repository / graph_folder(g, precision) / "1/model.onnx" for g in GENERATION[card["task"]].graphs}


def present(repository, card):
    """Precisions whose graphs are all there."""
    return [
        p for p in GENERATION_PRECISIONS if all(path.is_file() for path in graph_paths(repository, card, p).values())
    ]


def known_precision(precision):
    """One of GENERATION_PRECISIONS; FP32 is what the export made."""
    precision = REFERENCE if precision == "FP32" else precision
    if precision not in GENERATION_PRECISIONS:
        raise SystemExit(
            f"--precision: expected {', '.join(GENERATION_PRECISIONS)} of a service that generates, found {precision}; choose another"
        )
    return precision


# --- configs -------------------------------------------------------------------------


def graph_config(graph, card, precision, max_batch_size):
    """Tokens and caches -> the next token's logits and the cache; or, of the encoder, what the decoder looks at."""
    layers, heads, size = card["generation"]["cache"]
    config = pb.ModelConfig(
        name=graph_folder(graph, precision), platform="onnxruntime_onnx", max_batch_size=max_batch_size
    )
    for name in (INPUT_IDS, ATTENTION_MASK):
        config.input.add(name=name, data_type=pb.TYPE_INT64, dims=[-1])
    both = len(GENERATION[card["task"]].graphs) > 1
    for name in (PAST, CROSS)[: 1 + both] if graph == "decoder" else ():
        config.input.add(name=name, data_type=pb.TYPE_FP32, dims=[layers, heads, -1, size])
    if graph == "decoder":
        config.output.add(name=LOGITS, data_type=pb.TYPE_FP32, dims=card["outputs"][LOGITS])
    name = PRESENT if graph == "decoder" else CROSS
    config.output.add(name=name, data_type=pb.TYPE_FP32, dims=[layers, heads, -1, size])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_AUTO)
    if precision == REFERENCE:
        graph_configs.compute_in_fp32(config)
    return config


def service_config(card, max_batch_size):
    """Texts or chats -> generated texts, whole or in pieces."""
    inputs = GENERATION[card["task"]].inputs
    config = pb.ModelConfig(name=card["service"]["name"], backend="python", max_batch_size=max_batch_size)
    for name in inputs:
        config.input.add(name=name, data_type=pb.TYPE_STRING, dims=[1], optional=len(inputs) > 1)
    for name, kind in RESULTS.items():
        config.output.add(name=name, data_type=configs.data_type(kind), dims=[1])
    config.model_transaction_policy.decoupled = True
    graph_configs.add_batcher(config)
    configs.add_limits(config, card["max_length"])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def expected_configs(repository, card):
    """The configs that a repository with this record has to have."""
    batch = card["service"]["max_batch_size"]
    graphs = [(graph, p) for p in present(repository, card) for graph in GENERATION[card["task"]].graphs]
    return [service_config(card, batch), *(graph_config(graph, card, p, batch) for graph, p in graphs)]


# --- writing -------------------------------------------------------------------------


def write_tokenizer(folder, served):
    """tokenizer.json, and the packages that the service needs and a stock container may lack."""
    with replace_when_done(folder / "tokenizer.json") as temporary:
        served.save(str(temporary))
    for package in (tokenizers.__name__, "jinja2", "markupsafe"):
        source = Path(importlib.util.find_spec(package).origin).parent
        with replace_folder_when_done(folder / "site-packages" / package) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def write_repository(repository, served=None, **service):
    """All of a repository but its graphs; served: the tokenizer, None where it is there already.

    service: "name", "precision", "max_batch_size" where they are other than in the record.
    """
    card = read_card(repository)
    before = card.get("service") or {}
    card["service"] = before | {key: value for key, value in service.items() if value is not None}
    name = check_name(card["service"]["name"], repository)
    precision = card["service"]["precision"] = known_precision(card["service"]["precision"])
    if precision not in present(repository, card):
        remedy = EXPORT if precision == REFERENCE else f"run quantize.py --repository {repository}"
        raise SystemExit(f"{repository}: expected the graphs of --precision {precision}, found none; {remedy}")
    if before.get("name") not in (None, name) and (repository / before["name"]).is_dir():
        shutil.rmtree(repository / name, ignore_errors=True)
        (repository / before["name"]).rename(repository / name)
    for config in expected_configs(repository, card):
        write_text(repository / config.name / "config.pbtxt", configs.config_text(config))
    models = {graph: graph_folder(graph, precision) for graph in GENERATION[card["task"]].graphs}
    write_service(repository / name / "1", card, CODE, {"models": models})
    if served is not None:
        write_tokenizer(repository / name, served)
    write_json(repository / HEALTH, {"model": name, "body": {"TEXT": "Hello", "max_new_tokens": 1}})
    write_json(repository / RECORD, card)


def write_service(version, card, code, settings):
    """The service's folder: code, {file: where it comes from}, and settings.json with the settings besides."""
    version.mkdir(parents=True, exist_ok=True)
    for file, source in code.items():
        write_text(version / file, source.read_text(encoding="utf-8"))
    settings = card["generation"] | {key: card[key] for key in SETTINGS} | settings
    write_json(version / "settings.json", settings)


def write_one_pass(repository, card, output, precision):
    """What a CPU serves: the service alone, which runs the graphs in its own process. Returns what executes them."""
    service = card["service"]
    precision = known_precision(precision or service["precision"])
    if precision not in present(repository, card):
        raise SystemExit(f"{repository}: expected the graphs of --precision {precision}, found none; run quantize.py")
    graphs = {graph: str(path.resolve()) for graph, path in graph_paths(repository, card, precision).items()}
    folder = output / service["name"]
    settings = {"home": str((repository / service["name"]).resolve()), "graphs": graphs}
    code = CODE | {"onnx_runtime.py": ROOT / "core" / "onnx_runtime.py"}
    write_service(folder / "1", card, code, settings)
    config = service_config(card, service["max_batch_size"])
    by = f"ONNX Runtime, {'FP32' if precision == REFERENCE else precision}, {len(os.sched_getaffinity(0))} cores"
    configs.note_one_pass(config, card, by)
    write_text(folder / "config.pbtxt", configs.config_text(config))
    return by


def write_text(path, content):
    """Write a text file, atomically."""
    with replace_when_done(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def graphs_sha256(paths):
    """SHA-256 of all graphs of an export."""
    return sha256(*paths.values())


def extract(source, target, precision, **service):
    """A repository with the graphs of one precision alone, in `target`."""
    card, precision = read_card(source), known_precision(precision)
    unwanted = [
        graph_folder(g, p) for p in GENERATION_PRECISIONS if p != precision for g in GENERATION[card["task"]].graphs
    ]
    with replace_folder_when_done(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", *unwanted))
        write_repository(temporary, precision=precision, **service)


# --- the check -----------------------------------------------------------------------


def check_repository(repository):
    """Exit with the first disagreement in a repository; else a summary."""
    card = read_card(repository)
    service = card["service"]
    there = present(repository, card)
    if service["precision"] not in there:
        raise SystemExit(f"{repository}: expected graphs in {service['precision']}, found none; {EXPORT}")
    for precision in there:
        for path in graph_paths(repository, card, precision).values():
            check_graph(path, precision, card)
    if REFERENCE in there and graphs_sha256(graph_paths(repository, card)) != card["reference_sha256"]:
        raise SystemExit(f"{repository}: expected the graphs of the present export, found others; {EXPORT}")
    check_configs(repository, card)
    check_service(repository / service["name"], card)
    through = " and ".join(graph_folder(graph, service["precision"]) for graph in GENERATION[card["task"]].graphs)
    return (
        f"{service['name']} generates up to {card['max_new_tokens']} tokens through {through}, prompts up to "
        f"{card['max_length']} tokens, up to {service['max_batch_size']} texts at once"
    )


def check_graph(path, precision, card):
    """Exit unless a graph has its config's tensors, and is of this precision and of the present export."""
    graph = read_graph(path)
    config = configs.read_config(path.parents[1] / "config.pbtxt")
    found = {name: dims for name, (_, dims) in graph_tensors(graph).items()}
    expected = {name: dims for name, (_, dims) in configs.config_tensors(config).items()}
    if found != expected:
        raise SystemExit(f"{path}: expected the tensors of its config, {expected}; found {found}; {EXPORT}")
    notes = graph_properties(graph)
    if notes.get("precision", REFERENCE) != precision or (
        precision != REFERENCE and notes.get("reference_sha256") != card["reference_sha256"]
    ):
        raise SystemExit(
            f"{path}: expected a graph in {precision} of the present export, found another; run quantize.py"
        )


def check_configs(repository, card):
    """Exit unless exactly the models of the record are there, with its tensors."""
    expected = {config.name: config for config in expected_configs(repository, card)}
    for name in sorted({path.name for path in repository.iterdir() if path.is_dir()} | expected.keys()):
        path = repository / name / "config.pbtxt"
        found = configs.read_config(path)
        wanted = configs.config_tensors(expected[name]) if name in expected else "no such model"
        if configs.config_tensors(found) != wanted:
            raise SystemExit(
                f"{path}: expected what the record asks for, {wanted}; found {configs.config_tensors(found)}; "
                f"run python -m serving.repository --repository {repository}"
            )


def check_service(folder, card):
    """Exit unless the service has its code, its tokenizer and the packages that it imports."""
    load_tokenizer(folder / "tokenizer.json")
    wanted = [*(f"1/{file}" for file in (*CODE, "settings.json")), "site-packages/tokenizers"]
    wanted += ["site-packages/jinja2", "site-packages/markupsafe"] if card["chat_template"] else []
    for name in wanted:
        if not (folder / name).exists():
            raise SystemExit(f"{folder / name}: expected it with the service, found none; {EXPORT}")
