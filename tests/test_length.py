"""bench/length.py: texts of an exact length, FLOPs, and what a service and the report make of them."""

import json

import pytest
import report_data as data
from conftest import run_here, save_classifier, start_server, succeed, tiny_config

from bench import length
from core.repository import tokenizer_path
from core.tokens import load_tokenizer


@pytest.mark.parametrize("tokens", [4, 17, 64, 511])
def test_texts_have_exactly_so_many_tokens_and_differ(tiny, tokens):
    tokenizer = load_tokenizer(tokenizer_path(tiny.repository))
    tokenizer.no_padding()
    texts = length.make_texts(tokenizer, [tokens])[tokens]
    assert [len(tokenizer.encode(text).ids) for text in texts] == [tokens] * length.TEXTS_EACH
    assert len(set(texts)) == length.TEXTS_EACH


def test_flops_grow_as_a_polynomial_of_the_length(tiny):
    flops = length.count_flops(tiny.checkpoint, [16, 32, 64])
    # two layers: 4 Linears of 32 × 32, two of 32 × 64, QKᵀ and AV of width 32, and the head
    matmuls = {n: 2 * n * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 2) + 2 * 2 * 2 * n * n * 32 for n in flops}
    assert all(matmuls[n] < flops[n] < 1.3 * matmuls[n] for n in flops)
    assert flops[64] / flops[16] > 4


def measure(tiny, folder, *options):
    given = ("--model", tiny.checkpoint, "--repository", tiny.repository, "--results", folder / "results")
    return run_here(length, *given, "--lengths", 16, 64, "--rounds", 2, *options)


def test_a_service_and_its_runner_are_measured_and_shown(tiny, tmp_path):
    done, (http, grpc) = start_server(tiny.repository)
    assert done.returncode == 0, done.stderr
    try:
        served = measure(tiny, tmp_path, "--url", f"127.0.0.1:{grpc}")
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    assert served.returncode == 0, served.stderr
    (path,) = tmp_path.glob("results/*/*/length.json")
    assert "packed" in json.loads(path.read_text())["executed_by"]
    done = measure(tiny, tmp_path, "--precision", "FP32")
    assert done.returncode == 0 and "FLOPs × " in done.stdout, done.stderr
    record = json.loads(path.read_text())
    assert [row["tokens"] for row in record["rows"]] == [16, 64]
    assert all(0 < r["seconds"]["min"] <= r["seconds"]["median"] <= r["seconds"]["max"] for r in record["rows"])
    assert record["executed_by"] == "onnxruntime, FP32, without a server"


@pytest.mark.parametrize(("options", "words"), [(("--lengths", 64, 513), "at most 512"), (("--url", "1:1"), "1:1")])
def test_a_length_beyond_the_service_and_a_server_that_is_gone_are_named(tiny, tmp_path, options, words):
    done = measure(tiny, tmp_path, *options)
    assert done.returncode == 1 and words in done.stderr and not list(tmp_path.glob("results/*"))


def test_other_weights_are_refused(tiny, tmp_path):
    config = tiny_config()
    config.initializer_range = 0.5
    other = save_classifier(tmp_path / "other", config)
    done = run_here(length, "--model", other, "--repository", tiny.repository, "--results", tmp_path)
    assert done.returncode == 1 and "found that of other weights" in done.stderr


def test_tables_and_picture_hold_the_growth(tmp_path):
    place = data.make_place(tmp_path)
    folder = place.results / "reviews" / "a-cpu"
    data.write_length(folder, data.classifier(), (0.010, 0.100), (1e9, 12.5e9))
    data.written(place)
    tables = (folder / "tables.md").read_text()
    assert "| 512 | 100.00 (90.00 to 120.00) | 12.50 | 10.00 | 12.50 | 0.80 |" in tables
    assert (folder / "length.png").is_file() and data.report(place, "--check").returncode == 0
