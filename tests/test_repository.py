"""repository.py: the committed configs, and every disagreement it has to name."""

import numpy as np
import onnx
from conftest import ROOT, copy_repository, run

from core import tables
from serving import repository


def written_configs(length, num_outputs):
    configs = [repository.tokenizer_config(length), repository.ensemble_config(length, num_outputs)]
    return configs + [repository.embedder_config(suffix, length, num_outputs) for suffix in tables.EMBEDDERS]


def test_committed_configs_are_what_the_script_writes():
    embedder = repository.read_config(ROOT / "model_repository/model_ONNX/config.pbtxt")
    for config in written_configs(*embedder.output[0].dims):
        assert (ROOT / "model_repository" / config.name / "config.pbtxt").read_text() == repository.config_text(config)


def test_written_configs_are_read_back_by_tritons_protobuf(tmp_path):
    warmup = {name: np.arange(40) for name in ("INPUT_IDS", "ATTENTION_MASK")}
    repository.write_repository(tmp_path, 40, 5, warmup)
    for config in written_configs(40, 5):
        assert repository.read_config(tmp_path / config.name / "config.pbtxt") == config
    assert (tmp_path / "tokenizer/1/model.py").read_bytes() == (
        ROOT / "model_repository/tokenizer/1/model.py"
    ).read_bytes()


def test_configs_agree_with_the_signatures_of_the_graphs(exported):
    for model in tables.EMBEDDERS.values():
        graph = onnx.load(exported.repository / model / "1/model.onnx")
        config = repository.read_config(exported.repository / model / "config.pbtxt")
        assert repository.graph_tensors(graph) == repository.tensors(config)


def check(folder, *options):
    return run("repository.py", "--repository", folder, *options)


def test_agreement_is_said(exported):
    done = check(exported.repository)
    assert done.returncode == 0 and "graphs and configs agree" in done.stdout


def refuse(folder, *words, options=()):
    done = check(folder, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


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


def test_a_missing_plan_is_named_where_plans_are_served(exported):
    refuse(exported.repository, "model_TRT_FP32/1/model.plan", "build_trt.sh", options=("--engine", "plan"))
