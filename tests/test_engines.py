"""OpenVINO and PyTorch as engines of a service: configs, the stand-ins' rules, and both through the real server."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, copy_project, link_copy, post, run, run_here, start_server, succeed
from test_tasks_readme import alike
from tiny_tasks import LABELS, save_tiny

import quantize
import torch2onnx
import verdicts
from core import engines, files
from core.onnx_runtime import open_session
from core.repository import answering_key, graph_path, read_card, script_path
from core.tables import NAMES
from serving import check, one_pass, server
from serving import repository as writer
from serving.graph_configs import openvino_config
from serving.server import executed_by
from tasks.examples import examples
from tasks.table import OWN, TASKS

CARD = {
    "task": "classification",
    "inputs": ["INPUT_IDS", "ATTENTION_MASK"],
    "outputs": {"LOGITS": [2]},
    "max_length": 64,
    "fixed_length": False,
}
TEXTS = [*files.read_texts(files.TEXTS)[:12], "", "naïve café", "word " * 900]


@pytest.fixture(scope="module")
def scripted(tiny, tmp_path_factory):
    """The tiny classifier exported with a TorchScript beside the graph, which the service answers through."""
    repository = tmp_path_factory.mktemp("scripted") / "tiny"
    options = ("--task", "classification", "--model", tiny.checkpoint, "--repository", repository)
    done = run_here(torch2onnx, *options, "--torchscript")
    assert done.returncode == 0 and "TorchScript agrees with torch: max abs error" in done.stdout, done.stderr
    done = run_here(writer, "--repository", repository, "--engine", "pytorch")
    assert "tiny answers through model_TORCH" in done.stdout, done.stderr
    return SimpleNamespace(checkpoint=tiny.checkpoint, repository=repository)


@pytest.fixture(scope="module")
def served(scripted):
    """The same, served as serve.sh does by itself: a service that PyTorch executes has no one pass."""
    done, (http, _) = start_server(scripted.repository)
    assert done.returncode == 0, done.stderr
    yield f"127.0.0.1:{http}"
    succeed("serve.sh", "stop", "--http-port", http)


# --- PyTorch -------------------------------------------------------------------------


def logits_of_onnx(repository, text):
    from core.repository import tokenizer_path
    from core.tokens import encode, load_tokenizer

    session = open_session(graph_path(repository, "ONNX"))
    feeds = encode(load_tokenizer(tokenizer_path(repository)), [text], read_card(repository)["inputs"])
    return session.run(["LOGITS"], feeds)[0]


def test_a_service_answers_through_torch_as_through_onnx(scripted, served):
    for text in TEXTS:
        found = server.infer("tiny", server.text_tensor([text]), ["LOGITS"], served)["LOGITS"]
        np.testing.assert_allclose(found, logits_of_onnx(scripted.repository, text), atol=1e-5, err_msg=text)
    config = server.read_config("model_TORCH", served, "http")
    assert config["platform"] == "pytorch_libtorch" and executed_by(config) == "PyTorch, CPU"
    assert {t["name"] for t in config["input"]} == {"INPUT__0", "INPUT__1", "INPUT__2"}


def test_a_request_with_ids_outside_the_vocabulary_is_refused_and_the_next_one_answered(served):
    def ask(number):
        tensors = {f"INPUT__{i}": np.full((1, 4), value, dtype=np.int64) for i, value in enumerate((number, 1, 0))}
        return server.infer("model_TORCH", tensors, ["OUTPUT__0"], served)["OUTPUT__0"]

    with pytest.raises(server.InferenceServerException, match="expected ids of the vocabulary"):
        ask(10**6)
    assert ask(101).shape == (1, 2)


def test_the_row_of_torch_in_a_study_goes_through_the_server(scripted, served, tmp_path):
    places = ("--model", scripted.checkpoint, "--repository", scripted.repository, "--results", tmp_path)
    data = tmp_path / "data.tsv"
    texts = files.read_texts(files.TEXTS)[:60]
    data.write_text("text\tlabel\n" + "".join(f"{text}\t{('bad', 'good')[i % 2]}\n" for i, text in enumerate(texts)))
    options = ("--data", data, "--url", served, "--resamples", 50, "--agreement", 0.5, "--precision", 0.1)
    done = run_here(verdicts, *places, *options)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/*/verdicts.json")
    models = files.read_json(path, "")["models"]
    assert list(models) == ["torch", "ONNX"] and models["torch"]["engine"] == "PyTorch, CPU"
    assert models["torch"]["latency_p50_ms"] > 0 and models["ONNX"]["deviation"]["max_abs"] < 1e-4


def test_another_export_removes_the_script_of_the_last(scripted, tmp_path):
    repository = link_copy(scripted.repository, tmp_path / "tiny")
    torch2onnx.remove_typed_graphs(repository)
    assert not script_path(repository).exists() and graph_path(repository, "ONNX").is_file()


def test_an_extract_holds_the_script_alone(scripted, tmp_path):
    target = tmp_path / "alone"
    done = run_here(writer, "--repository", scripted.repository, "--output", target, "--engine", "pytorch")
    assert done.returncode == 0 and "answers through model_TORCH" in done.stdout, done.stderr
    assert script_path(target).is_file() and not (target / "model_ONNX").exists()


# --- what is refused, before a server starts ---------------------------------------------


def refuse(repository, *words):
    done = run_here(check, "--repository", repository)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("what", ["missing", "truncated", "an ONNX graph"])
def test_a_script_that_is_none_is_named(scripted, tmp_path, what):
    repository = link_copy(scripted.repository, tmp_path / "tiny")
    path = script_path(repository)
    content = path.read_bytes()
    path.unlink()
    if what == "truncated":
        path.write_bytes(content[:1000])
    elif what != "missing":
        path.write_bytes(graph_path(repository, "ONNX").read_bytes())
    refuse(repository, str(path), "expected the TorchScript of", "torch2onnx.py --torchscript")


def test_an_engine_that_a_service_cannot_have_is_named(tiny, tmp_path):
    for options, words in (
        (("--engine", "pytorch"), "expected a TorchScript, found none; run torch2onnx.py --torchscript"),
        (("--precision", "BF16"), "expected --engine openvino"),
        (("--engine", "openvino", "--precision", "INT8"), "run quantize.py"),
        (("--engine", "tensorrt"), "expected --output with it"),
    ):
        done = run_here(writer, "--repository", tiny.repository, *options)
        assert done.returncode in (1, 2) and words in done.stderr, done.stderr
    assert "engine" not in read_card(tiny.repository)["service"]
    done = run_here(writer, "--repository", ROOT / "model_repository", "--engine", "openvino")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = run_here(torch2onnx, "--model", tiny.checkpoint, "--torchscript")
    assert done.returncode == 2 and "a --repository of its own" in done.stderr


def test_an_engine_whose_package_is_missing_is_named(tiny, tmp_path, monkeypatch):
    repository = link_copy(tiny.repository, tmp_path / "tiny")
    done = run_here(writer, "--repository", repository, "--engine", "openvino", "--precision", "BF16")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    refuse(repository, "--engine openvino: expected the package openvino", "requirements-openvino.txt")
    monkeypatch.setattr(one_pass, "write_one_pass", lambda *_: None)  # as of a service with a second output
    done = run_here(one_pass, "--repository", repository, "--output", tmp_path / "models")
    assert done.returncode == 1 and "--engine openvino: expected the package openvino" in done.stderr


# --- OpenVINO ------------------------------------------------------------------------


def test_the_config_is_one_that_the_compiled_backend_executes_with_any_batch():
    config = openvino_config("ONNX", CARD, 16)
    assert (config.backend, config.platform, config.max_batch_size) == ("openvino", "", 0)
    assert not config.HasField("dynamic_batching") and config.default_model_filename == "model.onnx"
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[-1, -1], [-1, -1], [-1, 2]]
    assert config.parameters["INFERENCE_PRECISION_HINT"].string_value == "f32"
    config = openvino_config("ONNX", CARD | {"service": {"precision": "BF16"}}, 16)
    assert config.parameters["HINT_BF16"].string_value == "YES" and len(config.parameters) == 1


@pytest.mark.parametrize(
    ("parameters", "runtime", "words"),
    [
        ({"INFERENCE_PRECISION_HINT": "f32"}, "model.py", "OpenVINO, CPU"),
        ({"INFERENCE_PRECISION_HINT": "f32"}, "", "OpenVINO, CPU, BF16 where the CPU has it"),
        ({}, "model.py", "OpenVINO, CPU, BF16 where the CPU has it"),
        ({"HINT_BF16": "YES"}, "model.py", "OpenVINO, CPU, BF16"),
    ],
)
def test_fp32_that_may_be_bf16_is_told(parameters, runtime, words):
    shown = {name: {"string_value": value} for name, value in parameters.items()}
    assert executed_by({"platform": "", "backend": "openvino", "runtime": runtime, "parameters": shown}) == words


@pytest.fixture
def stand_in(monkeypatch):
    """The backend's class, without a server and without the package."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(Logger=None))
    monkeypatch.syspath_prepend(str(ROOT / "serving/backends"))
    monkeypatch.delitem(sys.modules, "graph_model", raising=False)
    spec = importlib.util.spec_from_file_location("openvino_backend", ROOT / "serving/backends/openvino/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.TritonPythonModel()
    sys.path.remove(str(ROOT / "serving/backends/openvino"))
    sys.modules.pop("graph_model")


def test_what_the_compiled_backend_refuses_is_refused(stand_in):
    with pytest.raises(ValueError, match="expected requests with batch size 8, got 3"):
        stand_in.infer(None, {"INPUT_IDS": np.zeros((3, 4), dtype=np.int64)}, 8)
    with pytest.raises(ValueError, match="only YES"):
        stand_in.options({"HINT_BF16": "NO"})
    with pytest.raises(ValueError, match="TARGET_DEVICE"):
        stand_in.options({"TARGET_DEVICE": "GPU"})
    with pytest.raises(ValueError, match="computes it in bf16"):
        stand_in.note_precision("m", {"INFERENCE_PRECISION_HINT": "f32"}, "bf16")
    assert stand_in.options({"HINT_BF16": "YES"})["INFERENCE_PRECISION_HINT"] == "bf16"


# --- every task through both, model by model ------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """serve.sh beside an environment with openvino: this one, or one that is made for it."""
    if importlib.util.find_spec("openvino"):
        return ROOT / "serve.sh"
    if not os.environ.get("EXAMPLES"):
        pytest.skip("installs openvino: ./test.sh --examples")
    project = copy_project(tmp_path_factory.mktemp("project"))
    (project / ".venv").unlink()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    (packages,) = project.glob(".venv/lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages]
    subprocess.run([*pip, "-r", ROOT / "serving/requirements-openvino.txt"], check=True)
    return project / "serve.sh"


def make_service(task, folder):
    """A tiny service of a task, with a graph in INT8 and a TorchScript."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = save_tiny(folder / "checkpoint", TASKS[task].auto_model, **(labels if TASKS[task].labelled else {}))
    places = ("--repository", folder / "service", "--results", folder / "results")
    options = ("--task", task, "--model", model, "--torchscript", "--no-packed", "--dynamic-length")
    for done in (
        run_here(torch2onnx, *options, *places),
        run_here(quantize, "--naive", "--precisions", "INT8", *places),
    ):
        assert done.returncode == 0, done.stderr
    return folder / "service"


# engine, precision, words of what executes it, largest relative L2 error
CHOICES = [
    ("openvino", "ONNX", "OpenVINO, CPU", 1e-5),
    ("openvino", "BF16", "OpenVINO, CPU, BF16", 0.05),
    ("openvino", "INT8", "OpenVINO, CPU", 0.15),
    ("pytorch", "ONNX", "PyTorch, CPU", 1e-5),
]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_answers_through_openvino_and_torch_as_through_onnx(task, script, tmp_path):
    repository, row, answers = make_service(task, tmp_path), TASKS[task], []
    card, session = read_card(repository), open_session(graph_path(repository, "ONNX"))
    asked = examples(card, [*files.read_texts(files.TEXTS)[:3], "naïve café", "word " * 900])
    body = dict(zip(row.takes, asked[0] if isinstance(asked[0], tuple) else asked[:1], strict=True))
    for engine, precision, words, largest in CHOICES:
        if precision == "BF16" and not engines.has_bf16():
            continue
        done = run_here(writer, "--repository", repository, "--engine", engine, "--precision", precision)
        assert done.returncode == 0, done.stderr
        key = answering_key(read_card(repository)["service"])
        done, (http, _) = start_server(repository, path="ensemble", script=script)
        assert done.returncode == 0, done.stderr
        url = f"127.0.0.1:{http}"
        try:
            assert executed_by(server.read_config(NAMES[key], url, "http")) == words
            for texts in (asked[:1], asked):  # of one length and of several
                feeds = server.infer("tokenizer", server.text_tensor(texts, row.takes), card["inputs"], url)
                for name in card["outputs"]:
                    found = server.infer_graph(key, card, feeds, name, url)
                    expected = session.run([name], feeds)[0]
                    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                    assert error < largest and (error > 1e-4) == (largest > 1e-4), (engine, precision, name)
                    if precision == "ONNX":
                        np.testing.assert_allclose(found, expected, atol=1e-4)
            status, answer = post(SimpleNamespace(http=url), "service/generate", body)
            assert status == 200, answer
            # the task's own answers through all of its models
            own = {n.removesuffix(f"_{key}"): v for n, v in answer.items() if task != OWN or n.endswith(f"_{key}")}
            answers += [json.dumps(own)] if precision == "ONNX" else []
        finally:
            run(script, "stop", "--http-port", http)
    assert len(answers) == 2 and alike(*answers), answers
