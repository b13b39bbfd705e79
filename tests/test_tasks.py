"""Every task beside the classifier, from a checkpoint to the answers of the real server, each held against an oracle."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import post, run_here, start_server, succeed
from tiny_tasks import LABELS, LENGTH, SIZES, save_tiny

import torch2onnx
from core import checkpoint, files, repository
from serving import server
from tasks.table import TASKS

PEOPLE = [
    "My name is Maria O'Brien and I live at 12 Oak Street.",
    "Müller & Söhne verkauft Bücher in Köln-Ehrenfeld; naïve café.",
    "東京タワーは東京にあります。 Tokyo tower 🙂🚀 unbelievably tall",
    "",
    "antidisestablishmentarianism " * 12,
]


@pytest.fixture(scope="module")
def services(repositories):
    """One server of all the tasks' repositories."""
    done, (http, grpc) = start_server(*repositories.values())
    assert done.returncode == 0, done.stderr
    yield SimpleNamespace(http=f"127.0.0.1:{http}", grpc=f"127.0.0.1:{grpc}")
    succeed("serve.sh", "stop", "--http-port", http)


def ask(services, task, **body):
    """(status, answer) of one request to a task's service."""
    return post(services, f"{task}/generate", body)


# --- entities ------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["simple", "first", "max", "average"])
def test_entities_are_those_of_transformers(services, checkpoints, aggregation):
    folder = checkpoints["token-classification"]
    pipeline = transformers.pipeline("token-classification", str(folder), aggregation_strategy=aggregation)
    seen = 0
    for text in PEOPLE:
        status, answer = ask(services, "token-classification", TEXT=text, aggregation=aggregation)
        assert status == 200, answer
        found, expected = json.loads(answer["ENTITIES"]), pipeline(text) if text else []
        assert [(e["label"], e["start"], e["end"]) for e in found] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]
        np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], atol=1e-4)
        assert all(e["text"] == text[e["start"] : e["end"]] for e in found)
        seen += len(found)
    assert seen > 20


def test_entities_of_a_tokenizer_without_marked_pieces_are_those_of_transformers(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    from core.tables import SPANS, WORDS
    from core.tokens import encode
    from serving.models.answers import token_classification as answers

    words = ByteLevelBPETokenizer()
    words.train_from_iterator(files.read_texts(files.TEXTS), vocab_size=600, special_tokens=["<s>", "<pad>", "</s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, pad_token="<pad>")
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = transformers.RobertaConfig(vocab_size=600, **SIZES, **names)
    model = transformers.RobertaForTokenClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    settings = answers.settings_of({"labels": LABELS}, words._tokenizer)
    assert not settings["pieces"]
    for aggregation in answers.AGGREGATIONS:
        pipeline = transformers.pipeline(
            "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=aggregation
        )
        for text in PEOPLE[:3]:
            feeds = encode(words._tokenizer, [text], ["INPUT_IDS", SPANS, WORDS])
            with torch.inference_mode():
                logits = model(torch.from_numpy(feeds["INPUT_IDS"])).logits.numpy()
            tensors = {"LOGITS": logits, "TEXT": np.array([[text.encode()]], dtype=object)} | feeds
            (found,) = answers.answer(tensors, settings, {"aggregation": aggregation})["ENTITIES"][0]
            expected = [(e["entity_group"], e["start"], e["end"]) for e in pipeline(text)]
            assert [(e["label"], e["start"], e["end"]) for e in json.loads(found)] == expected


# --- answers in a context ------------------------------------------------------------


def slow_answer(model, tokenizer, question, context, longest=30):
    """(answer, score, start, end) by trying every pair of tokens of every window, one after the other."""
    windows = tokenizer(
        question, context, truncation="only_second", max_length=LENGTH, stride=LENGTH // 4,
        return_overflowing_tokens=True, return_offsets_mapping=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    best = {}
    for i, offsets in enumerate(windows["offset_mapping"].tolist()):
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in windows]
        with torch.inference_mode():
            output = model(**{name: windows[name][i : i + 1] for name in names})
        starts, ends = output.start_logits[0].double().tolist(), output.end_logits[0].double().tolist()
        inside = [j for j, sequence in enumerate(windows.sequence_ids(i)) if sequence == 1]
        for first in inside:
            for last in inside:
                if first <= last < first + longest:
                    span = (offsets[first][0], offsets[last][1])
                    value = starts[first] + ends[last] - starts[0] - ends[0]
                    best[span] = max(value, best.get(span, value))
    total = 1 + sum(np.exp(value) for value in best.values())
    span, value = max(best.items(), key=lambda item: item[1], default=((-1, -1), -1.0))
    if value < 0:
        return "", 1 / total, -1, -1
    return context[span[0] : span[1]], np.exp(value) / total, *span


QUESTIONS = ["Where does Müller live?", "Who?", "What is said about the tower in 東京 🙂 and why?"]
CONTEXTS = [*PEOPLE[:3], " ".join(files.read_texts(files.TEXTS)[:12]), "a", "  naïve\tcafé \n", PEOPLE[4]]


def test_answers_are_those_of_trying_every_span_of_every_window(services, checkpoints):
    folder = checkpoints["question-answering"]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answered = 0
    for question in QUESTIONS:
        for context in CONTEXTS:
            status, found = ask(services, "question-answering", QUESTION=question, CONTEXT=context)
            assert status == 200, found
            answer, score, start, end = slow_answer(model, tokenizer, question, context)
            assert (found["ANSWER"], found["START"], found["END"]) == (answer, start, end)
            assert found["SCORE"] == pytest.approx(score, rel=1e-3)
            answered += bool(answer)
    assert answered > 10


def test_more_answers_do_not_overlap_and_fall_in_score(services):
    body = {"QUESTION": QUESTIONS[0], "CONTEXT": CONTEXTS[3], "top_k": 4, "max_answer_tokens": 3, "no_answer": False}
    _, answer = ask(services, "question-answering", **body)
    spans = sorted(zip(answer["START"], answer["END"], strict=True))
    assert len(spans) == 4 and all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert answer["SCORE"] == sorted(answer["SCORE"], reverse=True)
    assert [CONTEXTS[3][s:e] for s, e in zip(answer["START"], answer["END"], strict=True)] == answer["ANSWER"]
    assert "START_LOGITS" not in answer
    _, answer = ask(services, "question-answering", **body, logits=True)
    assert len(answer["START_LOGITS"]) == len(answer["END_LOGITS"]) > LENGTH  # several windows


def test_questions_of_one_request_get_the_answers_they_get_alone(services):
    pairs = [(q, c) for q in QUESTIONS for c in CONTEXTS[:2]]
    names = TASKS["question-answering"].takes
    outputs = ["ANSWER", "SCORE", "START", "END"]
    for protocol in ("http", "grpc"):
        url = getattr(services, protocol)
        together = server.infer("question-answering", server.text_tensor(pairs, names), outputs, url, protocol)
        for row, pair in enumerate(pairs):
            alone = server.infer("question-answering", server.text_tensor([pair], names), outputs, url, protocol)
            assert together["ANSWER"][row, 0] == alone["ANSWER"][0, 0]
            assert together["SCORE"][row, 0] == pytest.approx(alone["SCORE"][0, 0], rel=1e-3)


# --- masked words --------------------------------------------------------------------


def test_masked_words_are_those_of_transformers(services, checkpoints):
    pipeline = transformers.pipeline("fill-mask", str(checkpoints["fill-mask"]))
    for text in ("The [MASK] whistles while the radio plays.", "[MASK]", "Müller lebt in [MASK] 🙂 東京."):
        status, answer = ask(services, "fill-mask", TEXT=text, top_k=5)
        assert status == 200, answer
        expected = pipeline(text, top_k=5)
        assert answer["TOKEN"] == [row["token_str"] for row in expected]
        np.testing.assert_allclose(answer["SCORE"], [row["score"] for row in expected], atol=1e-5)


# --- sentences -----------------------------------------------------------------------


def test_sentences_are_those_of_sentence_transformers(services):
    from sentence_transformers import SentenceTransformer

    texts = [*PEOPLE, *files.read_texts(files.TEXTS)[:20], "word " * 600]
    expected = SentenceTransformer(str(checkpoint.packaged_folder()), device="cpu").encode(texts)
    outputs, found = ["EMBEDDING", "HIDDEN_STATE"], []
    for start in range(0, len(texts), 8):
        batch = server.text_tensor(texts[start : start + 8])
        answer = server.infer("sentence-embedding", batch, outputs, services.grpc, "grpc")
        assert answer["HIDDEN_STATE"].shape[0] == len(answer["EMBEDDING"]) and answer["HIDDEN_STATE"].shape[2] == 384
        found.append(answer["EMBEDDING"])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pooling_mode_cls_token": True}, None),
        ({"pooling_mode_max_tokens": True}, "pooling by mean or CLS, found pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling by mean or CLS"),
    ],
    ids=["CLS", "maximum", "two"],
)
def test_the_pooling_is_that_of_the_checkpoint(tmp_path, config, words):
    folder = save_tiny(tmp_path / "sentences", "AutoModel")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    done = run_here(
        torch2onnx, "--task", "sentence-embedding", "--model", folder, "--repository", tmp_path / "repository"
    )
    assert done.returncode == (1 if words else 0), done.stderr
    if words:
        assert words in done.stderr and not (tmp_path / "repository/model.json").exists()
        return
    assert repository.read_card(tmp_path / "repository")["pooling"] == "cls"


# --- bad input -----------------------------------------------------------------------

REFUSED = [
    ("question-answering", {"QUESTION": "", "CONTEXT": "a"}, "QUESTION: expected text"),
    ("question-answering", {"QUESTION": "a", "CONTEXT": " \n"}, "CONTEXT: expected text"),
    ("question-answering", {"QUESTION": "why " * 30, "CONTEXT": "a"}, "leave room for the context; found 30"),
    ("question-answering", {"QUESTION": "a", "CONTEXT": "a " * 9000}, "CONTEXT: expected at most 128 windows"),
    ("question-answering", {"QUESTION": "a", "CONTEXT": "b", "top_k": 0}, "top_k: expected 1 to 20"),
    ("question-answering", {"QUESTION": "a", "CONTEXT": "b", "no_answer": "no"}, "no_answer: expected true or false"),
    ("question-answering", {"QUESTION": "a", "CONTEXT": "b", "max_answer_tokens": 0}, "max_answer_tokens: expected 1"),
    ("question-answering", {"QUESTION": "a", "CONTEXT": "b", "topk": 1}, "expected some of top_k"),
    ("question-answering", {"QUESTION": "a"}, "CONTEXT"),
    ("fill-mask", {"TEXT": "no mask"}, "expected one [MASK] within the model's length, found 0 in row 0"),
    ("fill-mask", {"TEXT": "[MASK] [MASK]"}, "found 2 in row 0"),
    ("fill-mask", {"TEXT": "word " * 600 + "[MASK]"}, "found 0 in row 0"),
    ("fill-mask", {"TEXT": "[MASK]", "top_k": 40000}, "top_k: expected 1 to 30522"),
    ("token-classification", {"TEXT": "a", "aggregation": "none"}, "expected one of simple, first, max, average"),
    ("token-classification", {"TEXT": "a", "strategy": "max"}, "expected some of aggregation, found 'strategy'"),
]


@pytest.mark.parametrize(("task", "body", "words"), REFUSED, ids=[f"{t} {w[:40]}" for t, _, w in REFUSED])
def test_bad_requests_get_a_clear_400(services, task, body, words):
    status, answer = ask(services, task, **body)
    assert status == 400 and words in answer["error"], answer


def test_the_longest_question_is_answered(services):
    status, answer = ask(services, "question-answering", QUESTION="why " * 29, CONTEXT="because")
    assert status == 200, answer


@pytest.mark.parametrize("task", ["question-answering", "token-classification"])
def test_a_tokenizer_without_the_places_of_its_tokens_is_refused(checkpoints, tmp_path, task):
    folder = shutil.copytree(checkpoints[task], tmp_path / "slow")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')  # written in Python alone
    done = run_here(torch2onnx, "--task", task, "--model", folder, "--repository", tmp_path / "repository")
    assert done.returncode == 1 and not (tmp_path / "repository").exists()
    assert "expected a fast tokenizer with a padding token, found EsmTokenizer" in done.stderr


@pytest.mark.parametrize(("task", "other"), [("question-answering", "fill-mask"), ("ner", "question-answering")])
def test_the_head_of_another_task_is_named_with_its_task(checkpoints, tmp_path, task, other):
    folder = tmp_path / "repository"
    done = run_here(torch2onnx, "--task", task, "--model", checkpoints[other], "--repository", folder)
    assert done.returncode == 1 and f"take --task {other}" in done.stderr and not folder.exists()


def test_two_services_of_one_name_are_refused(repositories, tmp_path):
    done, _ = start_server(repositories["fill-mask"], repositories["fill-mask"])
    assert done.returncode == 1 and "expected services of different names, found 'fill-mask'" in done.stderr
