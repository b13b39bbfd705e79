"""classifier_repository.py, postprocess.py and the service: configs, checks, answers."""

import json
import os
import shutil
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import classifier_configs as configs
import numpy as np
import onnx
import pytest
from conftest import ROOT, run, run_here

from core import files, onnx_runtime, tables, tokens
from serving import classifier_repository, repository


def copy(source, target):
    """A repository of one's own to break: links to the graphs, copies of the rest."""
    shutil.copytree(
        source, target, copy_function=lambda a, b: os.link(a, b) if a.endswith(".onnx") else shutil.copy(a, b)
    )
    return target


def write(folder, *options):
    return run_here(classifier_repository, "--repository", folder, *options)


def check(folder):
    return run_here(repository, "--repository", folder)


# --- configs -------------------------------------------------------------------------


def test_every_config_is_what_the_script_writes_and_fits_its_graph(reviews):
    card = classifier_repository.read_card(reviews.repository)
    assert classifier_repository.present(reviews.repository) == list(tables.EMBEDDERS)
    served = tokens.load_served_tokenizer(reviews.repository / "tokenizer/tokenizer.json")
    feeds = tokens.encode(served, [classifier_repository.WARMUP_TEXT], card["inputs"])
    length = feeds["INPUT_IDS"].shape[1]
    expected = [configs.tokenizer_config(card, 8), configs.postprocess_config(card, 8)]
    expected += [configs.ensemble_config("reviews", "ONNX", card, 8)]
    expected += [configs.model_config(suffix, card, 8, "onnx", length) for suffix in tables.EMBEDDERS]
    assert {c.name for c in expected} == {path.parent.name for path in reviews.repository.glob("*/config.pbtxt")}
    for config in expected:
        text = (reviews.repository / config.name / "config.pbtxt").read_text()
        assert text == repository.config_text(config, configs.OUR_COMMENTS)
    for model in tables.EMBEDDERS.values():
        graph = onnx.load(reviews.repository / model / "1/model.onnx")
        names = {v.name for v in (*graph.graph.input, *graph.graph.output)}
        assert names == {*card["inputs"], "LOGITS"}


def test_code_in_a_repository_is_the_projects(reviews):
    for name, source in (("tokenizer", "model_repository/tokenizer/1/model.py"), ("postprocess", "postprocess.py")):
        assert (reviews.repository / name / "1/model.py").read_bytes() == (ROOT / source).read_bytes()


def test_ensemble_answers_through_the_chosen_graph(reviews, tmp_path):
    folder = copy(reviews.repository, tmp_path / "reviews")
    assert write(folder, "--precision", "INT8", "--max-batch-size", 3, "--name", "opinions").returncode == 0
    config = repository.read_config(folder / "opinions/config.pbtxt")
    assert [s.model_name for s in config.ensemble_scheduling.step] == ["tokenizer", "model_TRT_INT8", "postprocess"]
    assert config.max_batch_size == 3 and not (folder / "reviews").exists()
    assert check(folder).returncode == 0


def test_an_output_has_one_graph_and_needs_nothing_beside_it(reviews, tmp_path):
    done = write(reviews.repository, "--precision", "BEST", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {"model.json", "model_TRT_BEST", "postprocess", "reviews", "tokenizer"}
    assert (tmp_path / "out/tokenizer/site-packages/tokenizers/__init__.py").is_file()
    assert check(tmp_path / "out").returncode == 0
    # a stock server has no backend that mends QuantizeLinear in float16
    graph = onnx.load(tmp_path / "out/model_TRT_BEST/1/model.onnx").graph
    halves = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT16}
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert quantizers and not any(n.input[1] in halves for n in quantizers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "FP16"), ("model_TRT_FP16/1/model.onnx", "quantize.py")),
        (("--name", "postprocess"), ("--name", "found postprocess")),
        (("--output", "files"), ("expected an empty folder", "name another")),
        (("--engine", "plan", "--output", "out"), ("model.plan", "expected a TensorRT plan")),
    ],
)
def test_what_cannot_be_written_is_named(tiny, tmp_path, options, words):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/mine.txt").write_text("mine")
    done = write(tiny.repository, *(tmp_path / o if o in ("files", "out") else o for o in options))
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr
    assert (tmp_path / "files/mine.txt").is_file() and not (tmp_path / "out").exists()


def test_only_a_repository_of_a_service_is_replaced(tiny, tmp_path):
    for content in ('{"task": "embedding", "service": {}}', '{"task": "classification"}', "[]"):
        (tmp_path / "assets").mkdir(exist_ok=True)
        (tmp_path / "assets/model.json").write_text(content)
        done = write(tiny.repository, "--output", tmp_path / "assets")
        assert done.returncode == 1 and "found other files" in done.stderr
        assert (tmp_path / "assets/model.json").read_text() == content
    (tmp_path / "link").symlink_to(tiny.repository)
    done = write(tiny.repository, "--output", tmp_path / "link")
    assert done.returncode == 1 and "expected another folder than --repository" in done.stderr
    for _ in range(2):
        assert write(tiny.repository, "--output", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("name", ["tokenizer", "postprocess", "model_ONNX", "tiny"])
def test_a_config_that_does_not_fit_is_named(tiny, tmp_path, name):
    folder = copy(tiny.repository, tmp_path / "r")
    path = folder / name / "config.pbtxt"
    path.write_text(path.read_text().replace("dims: 2", "dims: 3").replace("INPUT_IDS", "OTHER_IDS"))
    done = check(folder)
    assert done.returncode == 1 and str(path) in done.stderr and "classifier_repository.py" in done.stderr


def test_graphs_that_do_not_belong_together_are_named(reviews, tiny, tmp_path):
    folder = copy(tiny.repository, tmp_path / "r")
    (folder / "model_TRT_FP16/1").mkdir(parents=True)
    shutil.copy(reviews.repository / "model_TRT_FP16/1/model.onnx", folder / "model_TRT_FP16/1")
    assert "model_TRT_FP16/config.pbtxt: expected a config" in check(folder).stderr
    done = write(folder)
    assert done.returncode == 1 and "expected a graph of the export" in done.stderr and "quantize.py" in done.stderr


def test_a_new_export_takes_the_older_typed_graphs_away(reviews, trained, tmp_path):
    import torch2onnx

    folder = copy(reviews.repository, tmp_path / "reviews")
    options = ("--task", "classification", "--model", trained.folder, "--repository", folder)
    assert run_here(torch2onnx, *options).returncode == 0
    assert classifier_repository.present(folder) == ["ONNX"] and check(folder).returncode == 0


# --- postprocess ---------------------------------------------------------------------


@pytest.fixture
def postprocess(monkeypatch):
    """The module, with a stand-in for what only the server has."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    monkeypatch.delitem(sys.modules, "postprocess", raising=False)
    import postprocess

    return postprocess


def test_scores_are_stable_and_right(postprocess):
    logits = np.array([[1000.0, 1000.0], [-1000.0, 0.0], [0.0, np.log(3)]])
    np.testing.assert_allclose(postprocess.softmax(logits), [[0.5, 0.5], [0, 1], [0.25, 0.75]], atol=1e-12)
    np.testing.assert_allclose(postprocess.sigmoid(logits), [[1, 1], [0, 0.5], [0.5, 0.75]], atol=1e-12)


@pytest.mark.parametrize("value", [0, 3, -1, "many", None, True, [1]])
def test_top_k_outside_the_classes_is_refused(postprocess, value):
    request = types.SimpleNamespace(parameters=lambda: json.dumps({"top_k": value}))
    with pytest.raises(ValueError, match="top_k: expected 1 to 2"):
        postprocess.read_top_k(request, 2)


def test_top_k_is_one_unless_asked(postprocess):
    for parameters, expected in (("", 1), ("{}", 1), ('{"top_k": 2}', 2), ('{"top_k": "2"}', 2)):
        assert postprocess.read_top_k(types.SimpleNamespace(parameters=lambda p=parameters: p), 2) == expected


# --- the service ---------------------------------------------------------------------


def post(service, path, body):
    """POST as curl would; returns (status, answer)."""
    url = f"http://{service.http}/v2/models/{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_curl_gets_a_label_and_its_score(service):
    status, answer = post(service, "reviews/generate", {"TEXT": "A wonderful film, warm and clever."})
    assert status == 200 and answer["LABEL"] == "positive"
    exponents = np.exp(answer["LOGITS"])
    assert answer["SCORE"] == pytest.approx(exponents.max() / exponents.sum(), abs=1e-6)
    status, answer = post(service, "reviews/generate", {"TEXT": "A dull, awful waste of time."})
    assert answer["LABEL"] == "negative" and 0.5 < answer["SCORE"] <= 1


def test_top_k_labels_come_in_the_order_of_their_scores(service):
    body = {"TEXT": "A wonderful film.", "parameters": {"top_k": 2}}
    _, answer = post(service, "reviews/generate", body)
    assert answer["LABEL"] == ["positive", "negative"] and sum(answer["SCORE"]) == pytest.approx(1)
    assert answer["SCORE"][0] > answer["SCORE"][1]
    status, answer = post(service, "reviews/generate", body | {"parameters": {"top_k": 3}})
    assert status >= 400 and "top_k: expected 1 to 2" in answer["error"]


def texts_input(*texts):
    return {"inputs": [{"name": "TEXT", "shape": [len(texts), 1], "datatype": "BYTES", "data": list(texts)}]}


def test_texts_of_a_batch_get_the_labels_they_get_alone(service):
    texts = ["I loved it.", "", "word " * 2000, "naïve 🙂 café", "Terrible service and cold soup."]
    _, together = post(service, "reviews/infer", texts_input(*texts))
    outputs = {o["name"]: o for o in together["outputs"]}
    assert outputs["LABEL"]["shape"] == [5, 1] and outputs["LOGITS"]["shape"] == [5, 2]
    logits = np.reshape(outputs["LOGITS"]["data"], (5, 2))
    for text, label, row in zip(texts, outputs["LABEL"]["data"], logits, strict=True):
        _, alone = post(service, "reviews/generate", {"TEXT": text})
        assert alone["LABEL"] == label
        np.testing.assert_allclose(alone["LOGITS"], row, atol=1e-4)


def test_more_texts_than_the_maximum_are_refused(service):
    status, answer = post(service, "reviews/infer", texts_input(*["a"] * 9))
    assert status >= 400 and "batch-size must be <= 8" in answer["error"]


def test_every_precision_is_served_as_its_graph_is(service):
    served = tokens.load_served_tokenizer(service.repository / "tokenizer/tokenizer.json")
    feeds = tokens.encode(served, ["A fine day."], ["INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS"])
    tensors = [
        {"name": n, "shape": list(v.shape), "datatype": "INT64", "data": v.ravel().tolist()} for n, v in feeds.items()
    ]
    for model in tables.EMBEDDERS.values():
        _, answer = post(service, f"{model}/infer", {"inputs": tensors})
        expected = onnx_runtime.open_session(service.repository / model / "1/model.onnx").run(["LOGITS"], feeds)[0]
        np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (1, 2)), expected, atol=1e-4)


# --- plans ---------------------------------------------------------------------------


def test_plans_are_built_for_every_length_and_then_served_from(reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_repository, "gpu_record", lambda: None)  # the stand-in names one of its own
    folder = copy(reviews.repository, tmp_path / "reviews")
    standin = {"TRTEXEC": str(ROOT / "tests/trtexec_standin.py"), "STANDIN_VERSION": "101601"}
    environment = os.environ | standin | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = ("--model-repository", folder, "--results", tmp_path / "results", "--only", "INT8")
    done = run("build_trt.sh", *options, "--dry-run", env=environment)
    names = ("INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS")
    for what, shape in (("min", "1x1"), ("opt", "4x128"), ("max", "8x512")):
        assert f"--{what}Shapes=" + "\\,".join(f"{name}:{shape}" for name in names) in done.stdout
    done = run("build_trt.sh", *options, env=environment)
    assert done.returncode == 0, done.stderr
    platforms = {s: repository.read_config(folder / m / "config.pbtxt").platform for s, m in tables.EMBEDDERS.items()}
    assert [s for s, platform in platforms.items() if platform == "tensorrt_plan"] == ["TRT_INT8"]
    assert check(folder).returncode == 0
    done = write(folder, "--precision", "INT8", "--engine", "plan", "--output", tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out/model_TRT_INT8/1/model.plan").is_file(), done.stderr
    for place in (folder, tmp_path / "out"):
        path = place / "model_TRT_INT8/1/manifest.json"
        manifest = json.loads(path.read_text())
        for key, value, words in (
            ("tensorrt_version", "11.0.0", "expected TensorRT 10.16.1, found one for 11.0.0"),
            ("graph_sha256", "0" * 64, "expected the graph"),
            ("reference_sha256", "0" * 64, "expected the export"),
        ):
            files.write_json(path, manifest | {key: value})
            done = run_here(repository, "--repository", place, "--engine", "plan")
            assert done.returncode == 1 and words in done.stderr, done.stderr
    options = ("--precision", "INT8", "--engine", "plan", "--output", tmp_path / "other")
    done = write(folder, *options)
    assert done.returncode == 1 and "expected the export" in done.stderr and not (tmp_path / "other").exists()
    (folder / "model_TRT_INT8/1/manifest.json").unlink()
    done = write(folder, *options)
    assert done.returncode == 1 and "manifest.json: expected a TensorRT plan and its manifest" in done.stderr
