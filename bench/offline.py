"""Sentence embeddings of many texts at once: the project's services beside sentence-transformers without a server."""

import contextlib
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from bench import processes
from bench.arithmetic import spread
from bench.install import install, is_installed, python_of, versions
from bench.systems import SERVE, SERVERS, System, hide_paths
from core.repository import read_card
from core.tables import EMBEDDING
from serving.server import SERVER_ERRORS, infer, text_tensor

REQUIREMENTS = "sentence-transformers"
BACKENDS = {
    "torch": "torch, FP32",
    "onnx": "ONNX Runtime, FP32",
    "openvino-f32": "OpenVINO, FP32",
    "openvino": "OpenVINO, its default precision",
}
UNDER_WAY = 4  # requests of the largest batch that the service takes


def start_encoder(backend, args, folder, stack):
    """A function that encodes the texts once and returns seconds, and the embeddings' file. Raises NotMeasured."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"--model": args.sentence_model.resolve(), "--backend": backend, "--texts": args.work / "texts.json"}
    given |= {"--embeddings": folder / "embeddings.npy", "--threads": len(os.sched_getaffinity(0))}
    argv = [
        python_of(REQUIREMENTS),
        SERVERS / "sentence_encoder.py",
        *(part for pair in given.items() for part in pair),
    ]
    threads = {"OMP_NUM_THREADS": str(given["--threads"]), "HF_HUB_OFFLINE": "1"}
    log = folder / "server.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            list(map(str, argv)), env=os.environ | threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            text=True, start_new_session=True,
        )  # fmt: skip
    stack.callback(processes.end, processes.Server(process, {}, log, time.perf_counter()))
    overdue = threading.Timer(args.timeout_s, process.kill)  # a pipe is read without a time limit
    stack.callback(overdue.cancel)
    overdue.start()

    def read(word):
        for line in process.stdout:  # libraries print too
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise processes.NotMeasured(f"it ended by itself: {processes.last_line(log)}")

    read("ready")
    overdue.cancel()

    def encode():
        try:
            process.stdin.write("\n")
            process.stdin.flush()
        except OSError:
            raise processes.NotMeasured(f"it ended by itself: {processes.last_line(log)}") from None
        return float(read("seconds"))

    return encode, np.load(given["--embeddings"])


def check_repositories(repositories):
    """Exit unless all are exports of sentence embeddings."""

    for repository in repositories:
        if (task := read_card(repository)["task"]) != "sentence-embedding":
            raise SystemExit(f"{repository}: expected an export of sentence embeddings, found {task}; name another")


def start_service(repository, args, folder, texts, stack):
    """The same of a service of the project, over gRPC, in requests of the largest batch."""
    card = read_card(repository)
    service, size = card["service"]["name"], card["service"]["max_batch_size"]
    batches = [text_tensor(texts[i : i + size]) for i in range(0, len(texts), size)]
    system = System("", "", SERVE + "{repository}", "triton")
    server = processes.start(system, {"repository": repository.resolve()}, folder)
    stack.callback(processes.end, server)
    url = f"127.0.0.1:{server.ports['grpc']}"

    def ask(batch):
        return infer(service, batch, [EMBEDDING], url, "grpc")[EMBEDDING]

    wait_service(server, lambda: ask(batches[0]), args.timeout_s)
    pool = stack.enter_context(ThreadPoolExecutor(UNDER_WAY))

    def encode():
        began = time.perf_counter()
        list(pool.map(ask, batches))
        return time.perf_counter() - began

    return encode, np.concatenate([ask(batch) for batch in batches])


def wait_service(server, ask, timeout_s):
    """Until the service answers; raises NotMeasured."""
    while time.perf_counter() - server.started < timeout_s:
        with contextlib.suppress(*SERVER_ERRORS):
            ask()
            return
        if server.process.poll() is not None:
            break
        time.sleep(0.1)
    raise processes.NotMeasured(f"no answer: {processes.last_line(server.log)}")


def rows(args, texts):
    """{name: (requirements, what starts it, given a stack)}; the first is what ratios are to."""
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    found = {}
    for number, repository in enumerate(args.sentence_repository):
        name = "project" if number == 0 else f"project, {repository.name}"
        folder = args.work / f"sentences {number}"
        found[name] = None, lambda stack, r=repository, f=folder: start_service(r, args, f, texts, stack)
    for backend, title in BACKENDS.items():
        folder = args.work / f"sentences {backend}"
        start = lambda stack, b=backend, f=folder: start_encoder(b, args, f, stack)  # noqa: E731
        found[f"sentence-transformers: {title}"] = REQUIREMENTS, start
    return found


def least_cosine(found, expected):
    """The least cosine of two arrays' rows."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / lengths).min())


def measure(args, texts):
    """Entries of "embeddings" in peers.json: texts a second over the rounds, the ratio to the first, cosine to torch."""
    table, running, errors, arrays = rows(args, texts), {}, {}, {}
    if not is_installed(REQUIREMENTS):
        reason = install(REQUIREMENTS) if args.install else "not installed; --install makes its environment"
        errors = {name: reason for name, (needs, _) in table.items() if needs and reason}
    seconds = {name: [] for name in table}
    with contextlib.ExitStack() as stack, tqdm(total=len(table) * (args.rounds + 1), desc="sentences") as progress:
        for name in (n for n in table if n not in errors):
            with noted(errors, name):
                running[name], arrays[name] = table[name][1](stack)
        for number in range(args.rounds + 1):  # the first warms up
            for name in (n for n in table if n in running and n not in errors):
                with noted(errors, name):
                    seconds[name] += [running[name]()][: bool(number)]
                progress.update()
    expected = arrays.get(f"sentence-transformers: {BACKENDS['torch']}")
    return [
        entry(name, needs, errors.get(name), len(texts), seconds[name], seconds["project"])
        | ({"least_cosine": least_cosine(arrays[name], expected)} if expected is not None and name in arrays else {})
        for name, (needs, _) in table.items()
    ]


@contextlib.contextmanager
def noted(errors, name):
    """Note in errors why a row fails, and go on."""
    try:
        yield
    except (processes.NotMeasured, *SERVER_ERRORS) as error:
        errors[name] = hide_paths(str(error))


def entry(name, needs, error, count, seconds, base):
    """One row; base: the seconds of the project in the same rounds."""
    if error:
        return {"name": name, "error": error}
    ratios = [b / s for s, b in zip(seconds, base, strict=False)]
    speeds = [count / s for s in seconds]
    return {"name": name, "versions": versions(needs), "texts_per_s": spread(speeds), "ratio": spread(ratios)}
