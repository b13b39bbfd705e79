"""Generation without a server: the graphs of every architecture against torch, and the loop around them."""

import numpy as np
import pytest
import transformers
from tiny_generators import TEXTS, make_model, make_tokenizer

from core import generation
from core.onnx_runtime import open_session
from tasks import generation_check, generation_graphs
from tasks.generation import warn_of_settings


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "t5 with a deeper decoder", "bart", "marian"])
def test_graphs_are_exact_and_their_tokens_are_those_of_generate(kind, tmp_path):
    model = make_model(kind)
    settings = {"cache": generation_graphs.cache_dims(model), "pad": 0, "ends": [2], "suppressed": [], "first": None}
    settings["start"] = 2 if model.config.is_encoder_decoder else None
    card = {"name": kind, "architecture": kind, "outputs": {"LOGITS": [model.config.vocab_size]}}
    card |= {"generation": settings, "max_length": 40, "max_new_tokens": 100}
    graphs, sessions = generation_graphs.graphs_of(model), {}
    for name, module in graphs.items():
        generation_check.trace_graph(module, card, tmp_path / f"{name}.onnx")
        sessions[name] = open_session(tmp_path / f"{name}.onnx")
    assert generation_check.check_graphs(graphs, sessions, card, max_error=1e-4) < 1e-4
    assert generation_check.check_tokens(model, make_tokenizer(), card, sessions, TEXTS) >= 40


def test_settings_that_the_service_does_not_follow_are_said(capsys):
    warn_of_settings("marian", transformers.GenerationConfig(num_beams=4, repetition_penalty=1.2, min_length=0))
    said = capsys.readouterr().err
    assert "found num_beams 4, repetition_penalty 1.2; the service does not follow them" in said
    warn_of_settings("t5", transformers.GenerationConfig())
    assert not capsys.readouterr().err


def test_top_p_draws_from_the_fewest_likely_tokens():
    logits = np.log(np.array([0.05, 0.5, 0.3, 0.15]))
    wish = generation.Wish(1, temperature=1.0, top_p=0.7)
    dice = np.random.default_rng(0)
    drawn = [generation.choose(logits, wish, dice) for _ in range(2000)]
    assert set(drawn) == {1, 2} and np.mean(np.array(drawn) == 1) == pytest.approx(0.625, abs=0.04)
    everything = [generation.choose(logits, wish._replace(top_p=1.0), dice) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(everything) / 4000, np.exp(logits), atol=0.03)


def test_rows_that_ended_are_computed_no_further():
    settings = {"cache": [2, 1, 4], "pad": 0, "start": None, "ends": [9], "suppressed": [], "first": None}
    sizes = []

    def step(model, feeds):
        sizes.append(len(feeds["INPUT_IDS"]))
        logits = np.zeros((sizes[-1], 10), dtype=np.float32)
        logits[:, 3] = 1
        past = feeds["ATTENTION_MASK"].shape[1]
        return {"LOGITS": logits, "PRESENT": np.zeros((sizes[-1], 2, 1, past, 4), dtype=np.float32)}

    wishes = [generation.Wish(count) for count in (1, 4, 2)]
    found = list(generation.generate(step, settings, [[5], [5, 6], [7]], wishes, gone=lambda row: row == 1))
    assert sizes == [3, 1] and [row for row, _, _ in found] == [0, 1, 2, 2]
