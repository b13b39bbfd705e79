"""Any models beside the project's: an environment of their own, what is wrong with one, and that the others serve."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, post, run, start_server

from serving import others

EXAMPLE = ROOT / "examples/python_environment"
HERE = others.HOST_VERSION


def make_environment(folder, version=HERE, numpy="1.26.4", library=False):
    """What others.py looks at of an environment; nothing in it runs."""
    (folder / f"lib/python{version}/site-packages/numpy-{numpy}.dist-info").mkdir(parents=True)
    if library:
        (folder / f"lib/libpython{version}.so.1.0").touch()
    return folder


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, ".")
    return archive


def fault_of(environment, version=HERE):
    with pytest.raises(SystemExit) as found:
        others.check_environment(environment, version)
    assert str(environment) in str(found.value) and "\n" not in str(found.value)
    return str(found.value)


def test_an_environment_is_read_as_folder_and_as_archive(tmp_path):
    folder = make_environment(tmp_path / "environment")
    others.check_environment(folder, HERE)
    others.check_environment(pack(folder, tmp_path / "environment.tar.gz"), HERE)
    others.check_environment(make_environment(tmp_path / "other", "3.8", library=True), "3.8")


def test_what_is_no_environment_is_named(tmp_path):
    assert "found none" in fault_of(tmp_path / "missing.tar.gz")
    (tmp_path / "letter.tar.gz").write_bytes(b"Dear sir" * 100)
    assert "expected a packed environment" in fault_of(tmp_path / "letter.tar.gz")
    whole = pack(ROOT / "core", tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert "expected a packed environment" in fault_of(tmp_path / "cut.tar.gz")
    (tmp_path / "empty").mkdir()
    assert "found none" in fault_of(tmp_path / "empty")


def test_another_python_and_numpy_2_are_named(tmp_path):
    folder = make_environment(tmp_path / "old", "3.8")
    assert f"expected Python {HERE}, as the stub has it, found 3.8" in fault_of(folder)
    assert "expected lib/libpython3.8.so.1.0" in fault_of(folder, "3.8")
    assert "expected numpy<2" in fault_of(make_environment(tmp_path / "new", numpy="2.1.0"))


def test_the_stub_in_the_models_folder_says_its_python(tmp_path):
    assert others.stub_version(tmp_path) == HERE
    (tmp_path / others.STUB).write_bytes(b"\x7fELF\0libpython3.10.so.1.0\0")
    assert others.stub_version(tmp_path) == "3.10"


PYTORCH, OPENVINO = 'platform: "pytorch_libtorch"', 'backend: "openvino"'
GRAPHS = {"no_script": PYTORCH, "other_script": PYTORCH, "no_graph": OPENVINO, "other_graph": OPENVINO}


@pytest.fixture
def repository(tmp_path):
    """The example's model four times: in an environment that has the server's packages by a .pth, and in no good one.

    Beside it graphs that their engines do not load.
    """
    folder = tmp_path / "repository"
    for name in ("whole", "broken", "numberless", "foreign"):
        (folder / name / "1").mkdir(parents=True)
        shutil.copy(EXAMPLE / "model.py", folder / name / "1")
        text = (EXAMPLE / "config.pbtxt").read_text().replace("own_packages", name)
        (folder / name / "config.pbtxt").write_text(text)
    environment = folder / "whole/environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = environment / f"lib/python{HERE}/site-packages"
    (packages / "server.pth").write_text(sysconfig.get_path("purelib"))
    (packages / "only_here.py").write_text("__version__ = '1.2.3'\n")
    (folder / "broken/environment").write_text("no environment")
    (folder / "numberless/config.pbtxt").write_text('name: "numberless"\nbackend "python"\n')
    config = folder / "foreign/config.pbtxt"
    config.write_text(config.read_text().split("# a folder")[0].replace('"python"', '"nobody"'))
    for name, words in GRAPHS.items():
        (folder / name / "1").mkdir(parents=True)
        tensors = [f'{t}put {{ name: "{t.upper()}PUT__0" data_type: TYPE_FP32 dims: [ -1 ] }}' for t in ("in", "out")]
        (folder / name / "config.pbtxt").write_text(
            "\n".join([f'name: "{name}"', words, "max_batch_size: 8", *tensors])
        )
    for name, file in (("other_script", "model.pt"), ("other_graph", "model.xml")):
        (folder / name / "1" / file).write_bytes(b"\x08\x0a an ONNX graph")
    return folder


def test_what_cannot_be_served_is_named_and_the_others_answer(tiny, repository):
    done, (http, _) = start_server(tiny.repository, others=[repository])
    try:
        assert done.returncode == 0, done.stderr
        service = SimpleNamespace(http=f"127.0.0.1:{http}")
        assert post(service, "whole/generate", {"PACKAGE": "only_here"})[1]["VERSION"] == "1.2.3"
        status, answer = post(service, "whole/generate", {"PACKAGE": "nowhere_at_all"})
        assert status == 400 and "No module named 'nowhere_at_all'" in answer["error"]
        assert post(service, "tiny/generate", {"TEXT": "a text"})[0] == 200
        lines = dict(line.split(": ", 2)[1:] for line in done.stderr.splitlines() if line.startswith("not served"))
        assert lines.keys() == {"broken", "numberless", "foreign", *GRAPHS}
        assert "model.pt: expected a graph for PyTorch, found none; export it there" in lines["no_script"]
        assert "model.xml: expected a graph for OpenVINO, found none; export it there" in lines["no_graph"]
        assert "expected a graph that PyTorch loads, found: " in lines["other_script"]
        missing = "No module named 'openvino'; pip install -r serving/requirements-openvino.txt"
        there = importlib.util.find_spec("openvino")
        assert ("expected a graph that OpenVINO loads" if there else missing) in lines["other_graph"]
        assert "expected a packed environment" in lines["broken"] and "backend 'nobody'" in lines["foreign"]
        assert "expected a Triton config" in lines["numberless"] and "torch2onnx" not in lines["numberless"]
        assert run("serve.sh", "status", "--http-port", http).returncode == 0
    finally:
        run("serve.sh", "stop", "--http-port", http)


def test_a_model_of_the_project_that_is_not_served_ends_the_start(tmp_path, monkeypatch, capsys):
    (tmp_path / "foreign").mkdir()
    index = [
        {"name": "foreign", "state": "UNAVAILABLE", "reason": "Internal: no such\n\nAt:\n stack"},
        {"name": "tiny"},
    ]
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(json.dumps(index).encode()))
    with pytest.raises(SystemExit, match="not served: tiny: Triton gives no reason"):
        others.name_missing("127.0.0.1:8000", [tmp_path])
    assert capsys.readouterr().err == "not served: foreign: Internal: no such\n"
    del index[1]
    with pytest.raises(SystemExit, match="expected a model that is served, found none"):
        others.name_missing("127.0.0.1:8000", [tmp_path])


def test_no_models_and_no_folder_are_named(tmp_path):
    done, _ = start_server(others=[tmp_path])
    assert done.returncode == 1 and "expected folders of models, found none" in done.stderr
    done, _ = start_server(others=[tmp_path / "nowhere"])
    assert done.returncode == 1 and "--any-repository: expected a folder" in done.stderr
    shutil.copytree(EXAMPLE, tmp_path / "own_packages")
    done = run("examples/python_environment/build.py", "--output", tmp_path / "own_packages")
    assert done.returncode == 1 and "name another" in done.stderr and (tmp_path / "own_packages/model.py").exists()


def test_a_build_script_answers_help_from_any_folder(tmp_path):
    for script in ROOT.glob("examples/*/build.py"):
        done = run(Path(script).relative_to(ROOT), "-h", cwd=tmp_path)
        assert done.returncode == 0 and "usage:" in done.stdout
