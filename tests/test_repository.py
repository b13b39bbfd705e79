"""serving/repository.py and serving/check.py: what is written, and every disagreement that is named."""

import json
import shutil

import onnx
import pytest
from conftest import ROOT, copy_repository, link_copy, run, run_here

from core import files, repository, tables, tokens
from serving import check as checker
from serving import configs, graph_configs
from serving import repository as writer

OWN_CARD = {
    "task": "embedding",
    "inputs": ["INPUT_IDS", "ATTENTION_MASK"],
    "outputs": {"EMBEDDING": [128, 2]},
    "max_length": 128,
    "fixed_length": True,
    "service": {"name": "ensemble", "precision": "ONNX", "max_batch_size": 8},
}


def check(folder, *options):
    return run_here(checker, "--repository", folder, *options)


def write(folder, *options):
    return run_here(writer, "--repository", folder, *options)


def refuse(folder, *words, options=()):
    done = check(folder, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# --- the task's own ------------------------------------------------------------------


def test_committed_configs_are_what_the_script_writes():
    own = ROOT / "model_repository"
    for config in checker.expected_configs(own, OWN_CARD, 128):
        assert (own / config.name / "config.pbtxt").read_text() == configs.config_text(config)


def test_written_configs_are_read_back_by_tritons_protobuf(exported):
    card = repository.read_card(exported.repository)
    for config in checker.expected_configs(exported.repository, card, 128):
        assert configs.read_config(exported.repository / config.name / "config.pbtxt") == config
    code = "tokenizer/1/model.py"
    assert (exported.repository / code).read_bytes() == (ROOT / "model_repository" / code).read_bytes()


def test_the_reference_alone_is_kept_from_tf32():
    text = configs.config_text(graph_configs.model_config("ONNX", OWN_CARD, 8, "onnxruntime", 128))
    assert 'key: "use_tf32"' in text and 'name: "cuda"' in text
    assert "use_tf32" not in configs.config_text(
        graph_configs.model_config("TRT_FP16", OWN_CARD, 8, "onnxruntime", 128)
    )


def test_agreement_is_said(exported):
    done = run("serving.check", "--repository", exported.repository)
    assert done.returncode == 0 and "graphs and configs agree" in done.stdout, done.stderr


def test_another_length_names_config_and_graph(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    path = folder / "model_TRT_INT8/config.pbtxt"
    path.write_text(path.read_text().replace("dims: 128", "dims: 64"))
    refuse(folder, str(path), "model_TRT_INT8/1/model.onnx", "[64]", "[128]")


def test_another_length_of_the_ensemble_is_named(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    path = folder / "ensemble/config.pbtxt"
    path.write_text(path.read_text().replace("dims: 128", "dims: 64"))
    refuse(folder, str(path), "model_ONNX/1/model.onnx")


def test_missing_and_truncated_graphs_are_named(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    path = folder / "model_TRT_FP16/1/model.onnx"
    content = path.read_bytes()
    path.unlink()
    refuse(folder, str(path), "quantize.py")
    path.write_bytes(content[: len(content) // 2])
    refuse(folder, str(path), "broken", "quantize.py")
    reference = folder / "model_ONNX/1/model.onnx"
    reference.unlink()
    refuse(folder, str(reference), "torch2onnx.py")


def test_a_graph_of_an_older_export_is_named(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    path = folder / "model_TRT_BEST/1/model.onnx"
    graph = onnx.load(path)
    path.unlink()  # a link to the graph that other tests use
    onnx.helper.set_model_props(graph, {"reference_sha256": "0" * 64, "precision": "BEST"})
    onnx.save(graph, path)
    refuse(folder, str(path), "made from 000000000000", "quantize.py")


def test_a_graph_of_another_precision_is_named(exported, tmp_path):
    folder = copy_repository(exported, tmp_path)
    path = folder / "model_TRT_FP16/1/model.onnx"
    path.unlink()
    shutil.copy(folder / "model_ONNX/1/model.onnx", path)
    refuse(folder, str(path), "expected a graph in FP16, found one in FP32")


def test_a_missing_plan_is_named_where_plans_are_served(exported):
    refuse(exported.repository, "model_TRT_FP32/1/model.plan", "build_trt.sh", options=("--plans",))


def test_a_record_of_an_older_layout_is_named_with_the_command_that_makes_it_anew(tmp_path):
    files.write_json(tmp_path / "model.json", {"task": "classification", "inputs": ["INPUT_IDS"], "labels": ["a", "b"]})
    refuse(tmp_path, str(tmp_path / "model.json"), "older version", "torch2onnx.py")


# --- a service -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../mine", "/mine", "", "..", "tokenizer", 7])
def test_a_record_with_a_path_as_name_deletes_nothing(tiny, tmp_path, name):
    folder = link_copy(tiny.repository, tmp_path / "a/b/r")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/text").write_text("mine")
    card = json.loads((folder / "model.json").read_text())
    card["service"]["name"] = name if name != "/mine" else str(tmp_path / "mine")
    files.write_json(folder / "model.json", card)
    for done in (write(folder, "--name", "other"), check(folder), write(folder, "--output", tmp_path / "out")):
        assert done.returncode == 1 and str(folder / "model.json") in done.stderr, done.stderr
    assert (tmp_path / "mine/text").read_text() == "mine" and not (tmp_path / "out").exists()


def test_every_config_is_what_the_script_writes_and_fits_its_graph(reviews):
    card = repository.read_card(reviews.repository)
    assert repository.present(reviews.repository) == list(tables.EMBEDDERS)
    served = tokens.load_tokenizer(reviews.repository / "tokenizer/tokenizer.json")
    length = tokens.encode(served, [writer.WARMUP_TEXT], card["inputs"])["INPUT_IDS"].shape[1]
    expected = checker.expected_configs(reviews.repository, card, length)
    assert {c.name for c in expected} == {path.parent.name for path in reviews.repository.glob("*/config.pbtxt")}
    for config in expected:
        assert (reviews.repository / config.name / "config.pbtxt").read_text() == configs.config_text(config)


def test_no_tensor_of_an_ensemble_is_intermediate_and_an_output(reviews):
    config = configs.read_config(reviews.repository / "reviews/config.pbtxt")
    *inner, last = config.ensemble_scheduling.step
    assert [s.model_name for s in config.ensemble_scheduling.step] == ["tokenizer", "model_ONNX", "postprocess"]
    between = {tensor for step in inner for tensor in step.output_map.values()}
    assert {output.name for output in config.output} == set(last.output_map.values()) and not between & set(
        last.output_map.values()
    )


def test_code_in_a_repository_is_the_projects(reviews):
    for name, source in (
        ("tokenizer/1/model.py", "model_repository/tokenizer/1/model.py"),
        ("postprocess/1/model.py", "serving/models/postprocess.py"),
        ("postprocess/1/answers/classification.py", "serving/models/answers/classification.py"),
    ):
        assert (reviews.repository / name).read_bytes() == (ROOT / source).read_bytes()


def test_ensemble_answers_through_the_chosen_graph(reviews, tmp_path):
    folder = link_copy(reviews.repository, tmp_path / "reviews")
    assert write(folder, "--precision", "INT8", "--max-batch-size", 3, "--name", "opinions").returncode == 0
    config = configs.read_config(folder / "opinions/config.pbtxt")
    assert [s.model_name for s in config.ensemble_scheduling.step] == ["tokenizer", "model_TRT_INT8", "postprocess"]
    assert config.max_batch_size == 3 and not (folder / "reviews").exists()
    assert check(folder).returncode == 0


def test_an_output_has_one_graph_and_needs_nothing_beside_it(reviews, tmp_path):
    done = write(reviews.repository, "--precision", "BEST", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {"health.json", "model.json", "model_TRT_BEST", "postprocess", "reviews", "tokenizer"}
    assert (tmp_path / "out/tokenizer/site-packages/tokenizers/__init__.py").is_file()
    assert check(tmp_path / "out").returncode == 0
    # a stock server has no backend that mends QuantizeLinear in float16
    graph = onnx.load(tmp_path / "out/model_TRT_BEST/1/model.onnx").graph
    halves = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT16}
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert quantizers and not any(n.input[1] in halves for n in quantizers)


def test_an_output_of_the_tasks_own_holds_its_record_too(exported, tmp_path):
    done = write(exported.repository, "--precision", "FP16", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {"health.json", "model.json", "model_TRT_FP16", "ensemble", "tokenizer"}
    assert check(tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "FP16"), ("model_TRT_FP16/1/model.onnx", "quantize.py")),
        (("--name", "postprocess"), ("--name", "'postprocess'")),
        (("--output", "files"), ("expected an empty folder", "name another")),
        (("--engine", "tensorrt", "--output", "out"), ("model.plan", "expected a TensorRT plan")),
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
    folder = link_copy(tiny.repository, tmp_path / "r")
    path = folder / name / "config.pbtxt"
    path.write_text(path.read_text().replace("dims: 2", "dims: 3").replace("INPUT_IDS", "OTHER_IDS"))
    done = check(folder)
    assert done.returncode == 1 and str(path) in done.stderr and "torch2onnx.py" in done.stderr


def test_graphs_that_do_not_belong_together_are_named(reviews, tiny, tmp_path):
    folder = link_copy(tiny.repository, tmp_path / "r")
    (folder / "model_TRT_FP16/1").mkdir(parents=True)
    shutil.copy(reviews.repository / "model_TRT_FP16/1/model.onnx", folder / "model_TRT_FP16/1")
    assert "model_TRT_FP16/config.pbtxt: expected a config" in check(folder).stderr
    done = write(folder)
    assert done.returncode == 1 and "expected a graph made from the export" in done.stderr


def test_a_folder_replaced_halfway_is_whole_one_way_or_the_other(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_text("old")
    moves, real = [], files.os.replace

    def interrupted(source, target):
        moves.append(target)
        if len(moves) == 2:  # the old one is aside, the new one not yet in its place
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.replace_folder_when_done(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    monkeypatch.setattr(files.os, "replace", real)
    with files.replace_folder_when_done(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
