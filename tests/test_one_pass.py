"""A service in one pass: its batches, and its answers beside those of the ensemble."""

import concurrent.futures
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import link_copy, post, run, run_here, start_server, succeed
from hypothesis import given
from hypothesis import strategies as st

from core import engines, files, runner
from core.repository import read_card, tokenizer_path
from core.tokens import load_tokenizer
from serving import one_pass, server
from serving.repository import write_repository

LENGTHS = st.lists(st.integers(1, 512), min_size=0, max_size=40)


@given(LENGTHS, st.integers(1, 8))
def test_every_text_is_in_one_batch_and_no_core_idles(lengths, cores):
    for batches in (runner.packed_batches(lengths, cores), runner.padded_batches(lengths, cores)):
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    batches = runner.packed_batches(lengths, cores)
    if sum(lengths) <= runner.ONE_BATCH:
        assert len(batches) == 1
    elif len(lengths) > 1:
        assert len(batches) >= min(cores, len(lengths)) and all(batches)
        loads = [sum(lengths[i] for i in batch) for batch in batches]
        assert max(loads) - min(loads) <= max(lengths)


@given(LENGTHS, st.integers(1, 8))
def test_padding_stays_within_the_budget(lengths, cores):
    for batch in runner.padded_batches(lengths, cores):
        padded = len(batch) * max((lengths[i] for i in batch), default=0)
        assert len(batch) < 2 or padded <= runner.BUDGET


def test_a_long_text_beside_short_ones_costs_no_padding():
    lengths = [512, *[20] * 31]
    batches = runner.padded_batches(lengths, 2)
    assert [0] in batches
    assert sum(len(b) * max(lengths[i] for i in b) for b in batches) == sum(lengths)


@pytest.fixture(scope="module")
def paths(tiny):
    """{path: the tiny classifier's service on it}, two servers."""
    found = {}
    for path in ("auto", "ensemble"):
        done, (http, grpc) = start_server(tiny.repository, path=path)
        assert done.returncode == 0, done.stderr
        found[path] = SimpleNamespace(http_port=http, http=f"127.0.0.1:{http}", grpc=f"127.0.0.1:{grpc}")
    yield found
    for service in found.values():
        succeed("serve.sh", "stop", "--http-port", service.http_port)


def five_hundred_texts():
    own = files.read_texts(files.TEXTS)
    words = " ".join(own).split()
    more = [" ".join(words[i : i + 1 + i % 60]) for i in range(500)]
    return [*own, "", " ", "word " * 3000, *more][:500]


def test_both_paths_give_the_same_answers(paths):
    """One text a request, many at once: in one pass they meet others in their batch."""
    texts = five_hundred_texts()
    outputs = ["LABEL", "SCORE", "LOGITS"]

    def ask(path, text):
        return server.infer("tiny", server.text_tensor([text]), outputs, paths[path].grpc, "grpc")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = {path: list(pool.map(lambda text, path=path: ask(path, text), texts)) for path in paths}
    for one, other in zip(answers["auto"], answers["ensemble"], strict=True):
        assert one["LABEL"] == other["LABEL"]
        np.testing.assert_allclose(one["LOGITS"], other["LOGITS"], atol=1e-5)
        np.testing.assert_allclose(one["SCORE"], other["SCORE"], atol=1e-5)
    client, _ = server.connect(paths["auto"].http, "http")
    (stats,) = client.get_inference_statistics("tiny")["model_stats"]
    assert stats["inference_count"] > 1.5 * stats["execution_count"]  # they did meet others


BODIES = [
    {"TEXT": "a", "parameters": {"top_k": 3}},
    {"TEXT": "a", "parameters": {"top_k": "many"}},
    {"TEXT": "a", "parameters": {"topk": 1}},
    {"TEXTS": "a"},
]


@pytest.mark.parametrize("body", BODIES, ids=[str(body)[:50] for body in BODIES])
def test_both_paths_refuse_alike(paths, body):
    (status, answer), (other_status, other) = (
        post(paths[path], "tiny/generate", body) for path in ("auto", "ensemble")
    )
    assert status == other_status == 400
    assert answer["error"] == other["error"].removeprefix("in ensemble 'tiny', ")


def test_a_bad_text_fails_alone(paths):
    texts = [b"good", b"\xff\xfe", b"good", b"\xc3("] * 4

    def ask(text):
        tensor = {"TEXT": np.array([[text]], dtype=object)}
        try:
            return server.infer("tiny", tensor, ["LABEL"], paths["auto"].grpc, "grpc")
        except server.SERVER_ERRORS as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, texts))
    for text, answer in zip(texts, answers, strict=True):
        assert isinstance(answer, dict) if text == b"good" else "TEXT: expected UTF-8" in answer


@given(st.integers(1, 512))
def test_openvino_computes_few_sizes_and_none_that_is_too_long(tokens):
    sizes = {}
    for offset in (0, None):
        settings = {"inputs": [], "position_offset": offset, "per_token": False, "cores": 1, "max_length": 509}
        for engine in ("onnxruntime", "openvino"):
            run = runner.Runner(settings | {"engine": engine}, None, lambda sizes: sizes)
            sizes[engine, offset] = run.size(tokens)
    assert sizes["onnxruntime", 0] == sizes["onnxruntime", None] == tokens
    assert tokens <= sizes["openvino", 0] < tokens + 64 and sizes["openvino", 0] % 8 == 0
    assert tokens <= sizes["openvino", None] <= max(tokens, 509)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("packed", [True, False])
def test_batches_give_what_each_text_gives_alone(tiny, packed, engine):
    """ONNX Runtime computes both times; of "openvino" are the few sizes, with tokens that no text has."""
    from core.repository import graph_path
    from core.tables import PACKED_FILE

    card, tokenizer = read_card(tiny.repository), load_tokenizer(tokenizer_path(tiny.repository))
    padding = tokenizer.padding
    tokenizer.no_padding()
    path, offset = graph_path(tiny.repository, "ONNX"), None
    if packed:
        path, offset = path.with_name(PACKED_FILE), card["packed"]["position_offset"]
    inputs = runner.packed_inputs(card["inputs"]) if packed else card["inputs"]
    settings = {"inputs": inputs, "position_offset": offset, "per_token": False, "cores": 2}
    settings |= {"engine": engine, "max_length": card["max_length"]}
    run = runner.Runner(settings, padding, lambda sizes: engines.open_onnxruntime(path, "LOGITS", "FP32", sizes))
    encodings = tokenizer.encode_batch(five_hundred_texts()[::25])
    run.warm(tokenizer.encode("text"))
    together = run(encodings)
    for encoding, row in zip(encodings, together, strict=True):
        np.testing.assert_allclose(run([encoding])[0], row, atol=1e-5)


def test_int8_is_packed_and_gives_what_the_padded_graph_gives(reviews, tmp_path):
    card, tokenizer = read_card(reviews.repository), load_tokenizer(tokenizer_path(reviews.repository))
    padding = tokenizer.padding
    tokenizer.no_padding()
    encodings, found = tokenizer.encode_batch(files.read_texts(files.TEXTS)[::8]), {}
    for pack in (True, False):
        settings = one_pass.graph_settings(reviews.repository, card, "INT8", "onnxruntime", pack)
        assert (settings["position_offset"] is not None) == pack
        run = runner.Runner(settings | {"per_token": False}, padding, one_pass.opener(settings, "LOGITS"))
        found[pack] = np.array(run(encodings))
    np.testing.assert_allclose(found[True], found[False], atol=0.02)  # a value on a step's edge falls on either side
    assert not np.array_equal(found[True], run_fp32(reviews.repository, card, padding, encodings))
    succeed(
        "serving.repository", "--repository", reviews.repository, "--precision", "INT8", "--output", tmp_path / "own"
    )
    own = one_pass.graph_settings(tmp_path / "own", read_card(tmp_path / "own"), "INT8", "onnxruntime")
    assert own["position_offset"] is not None and own["graph"].endswith("model_TRT_INT8/1/packed.onnx")


def run_fp32(repository, card, padding, encodings):
    settings = one_pass.graph_settings(repository, card, "FP32", "onnxruntime")
    return np.array(
        runner.Runner(settings | {"per_token": False}, padding, one_pass.opener(settings, "LOGITS"))(encodings)
    )


# --- the choice of engine and precision ----------------------------------------------


def test_the_fastest_that_holds_is_chosen_and_the_nearest_of_those_as_fast():
    from verdict.choose import choose

    names = ("holds", "together_texts_per_s", "relative_l2_error")
    rows = [
        dict(zip(names, values, strict=True))
        for values in ((True, 100, 0), (False, 900, 0.5), (True, 200, 0.01), (True, 205, 0.05))
    ]
    assert choose(rows) == rows[2]
    assert choose(rows[:2]) == rows[0]


def test_a_candidate_holds_by_the_agreement_of_a_classifier_and_by_the_gate_elsewhere():
    from tasks.table import TASKS
    from verdict.choose import holds

    classifier, sentences = TASKS["classification"], TASKS["sentence-embedding"]
    agreement = {"agreement": {"value": 0.995, "low": 0.985, "high": 0.999}}
    assert holds(classifier, "INT8", agreement, 0.98) and not holds(classifier, "INT8", agreement, 0.99)
    assert holds(classifier, "INT8", {"agreement": {"value": 1.0, "low": 0.9, "high": 1.0}}, 0.99)
    near, far = ({"relative_l2_error": error, "mean_cosine": 0.99} for error in (0.1, 0.2))
    assert holds(sentences, "INT8", near, 0.99) and not holds(sentences, "INT8", far, 0.99)
    assert not holds(sentences, "BF16", near, 0.99)


def test_the_choice_is_written_and_served(tiny, tmp_path):
    repository = link_copy(tiny.repository, tmp_path / "tiny")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(files.read_texts(files.TEXTS)[:24]))
    options = ("--repository", repository, "--texts", texts, "--results", tmp_path / "results")
    done = succeed("verdict.choose", *options)
    chosen = read_card(repository)["service"]
    assert f"chosen: {chosen['cpu_engine']}, {chosen['cpu_precision']}" in done.stdout
    assert chosen["cpu_precision"] == "FP32" and list(tmp_path.glob("results/*/*/choice.json"))
    done = succeed("serving.one_pass", "--repository", repository, "--output", tmp_path / "view")
    assert "FP32, packed" in done.stderr


def test_texts_that_did_not_calibrate_choose_and_one_is_enough(tiny, tmp_path, monkeypatch):
    from verdict import choose

    seen, measure = [], choose.measure

    def measure_one(runners, encodings):
        seen.append(len(encodings))
        return measure(runners, encodings[:1])

    monkeypatch.setattr(choose, "measure", measure_one)
    repository = link_copy(tiny.repository, tmp_path / "tiny")
    done = run_here(choose, "--repository", repository, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/*/*/choice.json")
    rows = files.read_json(path, "")["rows"]
    assert seen == [128] and all(row["alone_texts_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("broken", ["FP16", "FP32"])
def test_what_answers_with_nan_is_no_candidate(tiny, tmp_path, monkeypatch, broken):
    from verdict import choose

    def open_runner(repository, card, engine, precision, padding):
        return lambda encodings: [np.array([np.nan if precision == broken else 1.0, 0.5])] * len(encodings)

    monkeypatch.setattr(choose, "open_runner", open_runner)
    monkeypatch.setattr(choose, "candidates", lambda _: [("onnxruntime", "FP32"), ("onnxruntime", "FP16")])
    repository = link_copy(tiny.repository, tmp_path / "tiny")
    done = run_here(choose, "--repository", repository, "--results", tmp_path / "results")
    if broken == "FP32":
        assert done.returncode == 1 and "expected finite answers of FP32" in done.stderr, done.stderr
        assert "run torch2onnx.py" in done.stderr and not (tmp_path / "results").exists()
    else:
        assert done.returncode == 0 and "onnxruntime, FP16: left out: NaN" in done.stderr, done.stderr
        assert read_card(repository)["service"]["cpu_precision"] == "FP32"


def test_a_service_that_one_pass_never_serves_has_no_choice(tiny, tmp_path):
    from verdict import choose

    repository = link_copy(tiny.repository, tmp_path / "tiny")
    card = read_card(repository)
    files.write_json(repository / "model.json", card | {"outputs": card["outputs"] | {"HIDDEN_STATE": [-1, 32]}})
    done = run_here(choose, "--repository", repository, "--results", tmp_path / "results")
    assert done.returncode == 1 and "classification with LOGITS, HIDDEN_STATE" in done.stderr, done.stderr


def test_an_engine_that_is_not_installed_is_named_with_its_command(tiny, tmp_path):
    if not engines.why_missing("openvino"):
        pytest.skip("openvino is installed")
    done = run(
        "serving.one_pass", "--repository", tiny.repository, "--output", tmp_path / "view", "--engine", "openvino"
    )
    assert done.returncode == 1 and "pip install -r serving/requirements-openvino.txt" in done.stderr
    assert not (tmp_path / "view").exists()


def test_what_this_machine_cannot_compute_is_refused_and_a_choice_of_it_is_not_served(
    tiny, tmp_path, capsys, monkeypatch
):
    from serving import one_pass

    monkeypatch.setattr(one_pass, "has_bf16", lambda: False)
    assert "none of ONNX Runtime's kernels" in one_pass.why_not("onnxruntime", "BF16")
    assert "a CPU with instructions for BF16" in one_pass.why_not("openvino", "BF16")
    repository = link_copy(tiny.repository, tmp_path / "tiny")
    write_repository(repository, cpu_engine="openvino", cpu_precision="BF16")
    said = one_pass.write_one_pass(repository, tmp_path / "view", None, None)
    assert said.startswith("tiny: one pass, ONNX Runtime, FP32, packed")
    assert "tiny: chosen was openvino, BF16: expected a CPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--engine openvino --precision BF16"):
        one_pass.write_one_pass(repository, tmp_path / "view", "BF16", "openvino")
