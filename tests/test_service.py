"""A classifier's service: the functions behind its answers, and the answers of the real server."""

import itertools

import numpy as np
import pytest
from conftest import post

from core import onnx_runtime, tables, tokens
from serving import server
from serving.models import answers
from serving.models.answers import classification

SETTINGS = {"labels": ["negative", "positive"], "score": "softmax"}


# --- the functions -------------------------------------------------------------------


def test_scores_are_stable_and_right():
    logits = np.array([[1000.0, 1000.0], [-1000.0, 0.0], [0.0, np.log(3)]])
    np.testing.assert_allclose(classification.softmax(logits), [[0.5, 0.5], [0, 1], [0.25, 0.75]], atol=1e-12)
    np.testing.assert_allclose(classification.sigmoid(logits), [[1, 1], [0, 0.5], [0.5, 0.75]], atol=1e-12)


@pytest.mark.parametrize("value", [0, 3, -1, "many", None, True, [1], 1.5, float("inf"), float("nan")])
def test_top_k_outside_the_classes_is_refused(value):
    with pytest.raises(ValueError, match="top_k: expected 1 to 2"):
        answers.read_count({"top_k": value}, "top_k", 1, 2, "the classes")


def test_top_k_is_one_unless_asked():
    for parameters, expected in (({}, 1), ({"top_k": 2}, 2), ({"top_k": "2"}, 2)):
        assert answers.read_count(parameters, "top_k", 1, 2, "the classes") == expected


def test_the_largest_logit_is_the_label_unless_there_is_a_threshold():
    tensors = {"LOGITS": np.array([[0.0, 0.4], [0.0, 0.6], [1.0, 0.6]], dtype=np.float32)}
    answer = classification.answer(tensors, SETTINGS, {})
    assert answer["LABEL"].tolist() == [[b"positive"], [b"positive"], [b"negative"]]
    threshold = SETTINGS | {"threshold": {"label": "positive", "value": 0.5}}
    answer = classification.answer(tensors, threshold, {"top_k": 2})
    assert answer["LABEL"][:, 0].tolist() == [b"negative", b"positive", b"positive"]
    scores = classification.softmax(tensors["LOGITS"])
    np.testing.assert_allclose(answer["SCORE"][:, 0], scores[range(3), [0, 1, 1]], rtol=1e-6)


# --- the service ---------------------------------------------------------------------


def test_curl_gets_a_label_and_its_score(service):
    status, answer = post(service, "reviews/generate", {"TEXT": "A wonderful film, warm and clever."})
    assert status == 200 and answer["LABEL"] == "positive"
    exponents = np.exp(answer["LOGITS"])
    assert answer["SCORE"] == pytest.approx(exponents.max() / exponents.sum(), abs=1e-6)
    status, answer = post(service, "reviews/generate", {"TEXT": "A dull, awful waste of time."})
    assert answer["LABEL"] == "negative" and 0.5 < answer["SCORE"] <= 1


OUTPUTS = ("LABEL", "SCORE", "LOGITS")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(OUTPUTS, n)]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_any_of_the_outputs_may_be_asked_for(service, protocol):
    url = service.http if protocol == "http" else service.grpc
    text = server.text_tensor(["A wonderful film.", "A dull one."])
    everything = server.infer("reviews", text, OUTPUTS, url, protocol)
    for subset in SUBSETS:
        found = server.infer("reviews", text, subset, url, protocol)
        assert found.keys() == set(subset)
        for name in subset:
            np.testing.assert_array_equal(found[name], everything[name])


def test_top_k_labels_come_in_the_order_of_their_scores(service):
    body = {"TEXT": "A wonderful film.", "parameters": {"top_k": 2}}
    _, answer = post(service, "reviews/generate", body)
    assert answer["LABEL"] == ["positive", "negative"] and sum(answer["SCORE"]) == pytest.approx(1)
    assert answer["SCORE"][0] > answer["SCORE"][1]
    status, answer = post(service, "reviews/generate", body | {"parameters": {"top_k": 3}})
    assert status >= 400 and "top_k: expected 1 to 2" in answer["error"]


def texts_input(*texts):
    return {"inputs": [{"name": "TEXT", "shape": [len(texts), 1], "datatype": "BYTES", "data": list(texts)}]}


def test_texts_of_a_batch_get_the_labels_they_get_alone(service):
    texts = ["I loved it.", "", "word " * 2000, "naïve 🙂 café", "Terrible service and cold soup."]
    _, together = post(service, "reviews/infer", texts_input(*texts))
    outputs = {o["name"]: o for o in together["outputs"]}
    assert outputs["LABEL"]["shape"] == [5, 1] and outputs["LOGITS"]["shape"] == [5, 2]
    logits = np.reshape(outputs["LOGITS"]["data"], (5, 2))
    for text, label, row in zip(texts, outputs["LABEL"]["data"], logits, strict=True):
        _, alone = post(service, "reviews/generate", {"TEXT": text})
        assert alone["LABEL"] == label
        np.testing.assert_allclose(alone["LOGITS"], row, atol=1e-4)


def test_more_texts_than_the_maximum_are_refused(service):
    status, answer = post(service, "reviews/infer", texts_input(*["a"] * 9))
    assert status >= 400 and "batch-size must be <= 8" in answer["error"]


def test_every_precision_is_served_as_its_graph_is(service):
    served = tokens.load_tokenizer(service.repository / "tokenizer/tokenizer.json")
    feeds = tokens.encode(served, ["A fine day."], ["INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS"])
    for model in tables.EMBEDDERS.values():
        found = server.infer(model, feeds, ["LOGITS"], service.http)["LOGITS"]
        expected = onnx_runtime.open_session(service.repository / model / "1/model.onnx").run(["LOGITS"], feeds)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
