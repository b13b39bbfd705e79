"""The process of a Python model: its libpython, its characters, its NumPy."""

import subprocess
import sys
from types import SimpleNamespace

from conftest import link_copy, post, run, start_server, succeed

PLANTED = """
        import ssl
        print("naïve, from the model")
        (Path(__file__).parent / "words.txt").write_bytes("café".encode())
        assert open(Path(__file__).parent / "words.txt").read() == "café"
"""


def with_tokenizer(repository, target, code, parameters=""):
    """A copy of a repository whose tokenizer executes more as it starts."""
    copy = link_copy(repository, target)
    path = copy / "tokenizer/1/model.py"
    start = "def initialize(self, args):"
    path.write_text(path.read_text().replace(start, start + code), encoding="utf-8")
    config = copy / "tokenizer/config.pbtxt"
    config.write_text(config.read_text() + parameters)
    return copy


def test_a_model_loads_modules_of_this_python_and_prints_and_reads_what_is_not_ascii(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "POSIX")
    repository = with_tokenizer(tiny.repository, tmp_path / "tiny", PLANTED)
    done, (http, _) = start_server(repository, path="ensemble")
    assert done.returncode == 0, done.stderr
    try:
        status, answer = post(SimpleNamespace(http=f"127.0.0.1:{http}"), "tiny/generate", {"TEXT": "a naïve café"})
        assert status == 200 and answer["LABEL"] in ("bad", "good")
    finally:
        succeed("serve.sh", "stop", "--http-port", http)


def test_a_numpy_that_is_too_new_is_named_before_the_process_ends(tiny, tmp_path):
    version = "2.4.1"
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "numpy").mkdir()
    fake = f"__version__ = {version!r}\ndef __getattr__(name):\n    return object\n"
    (packages / "numpy/__init__.py").write_text(fake)
    parameter = f'parameters {{\n  key: "EXECUTION_ENV_PATH"\n  value {{ string_value: "{environment}" }}\n}}\n'
    repository = with_tokenizer(tiny.repository, tmp_path / "tiny", "", parameter)
    done, (http, _) = start_server(repository, path="ensemble")
    run("serve.sh", "stop", "--http-port", http)  # where it started all the same
    assert done.returncode == 1
    assert f"expected NumPy below 2 in the environment of a Python model, found {version}" in done.stderr, done.stderr
