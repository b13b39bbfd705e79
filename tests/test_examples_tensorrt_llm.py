"""examples/tensorrt_llm: the files that its container reads; nothing here needs a GPU."""

import pytest
from conftest import ROOT, run, succeed

from serving.configs import config_tensors, read_config

BUILD = "examples/tensorrt_llm/build.py"


@pytest.mark.parametrize("stream", [False, True])
def test_config_and_model_yaml_say_the_same(tmp_path, stream):
    clone = tmp_path / "clone/triton_backend/all_models/llmapi/tensorrt_llm/1"
    clone.mkdir(parents=True)
    (clone / "model.py").write_text("# of the clone\n")
    (clone / "model.yaml").write_text("model: another\n")
    options = ["--tensorrt-llm", tmp_path / "clone", "--model", "org/name", "--output", tmp_path / "out"]
    succeed(BUILD, *options, *(["--stream"] if stream else []))
    folder = tmp_path / "out/tensorrt_llm"
    config, written = read_config(folder / "config.pbtxt"), (folder / "1/model.yaml").read_text()
    assert config.name == folder.name and config.model_transaction_policy.decoupled == stream
    assert f"decoupled: {str(stream).lower()}" in written and "model: org/name" in written
    assert "text_input" in config_tensors(config) and (folder / "1/model.py").is_file()


def test_a_clone_without_the_model_is_named(tmp_path):
    done = run(BUILD, "--tensorrt-llm", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 1 and "clone a tag that has it" in done.stderr and not (tmp_path / "out").exists()


def test_every_example_has_its_files_and_its_row():
    page = (ROOT / "examples/README.md").read_text()
    folders = [path.parent for path in ROOT.glob("examples/*/build.py")]
    assert folders
    for folder in folders:
        assert f"({folder.name}/README.md)" in page
        assert (folder / "README.md").is_file() and read_config(folder / "config.pbtxt").input
