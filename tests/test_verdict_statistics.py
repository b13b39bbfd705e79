"""verdict/: statistics against hand-made numbers, and the rules that make a conclusion of them."""

import numpy as np
import pytest

from verdict import statistics, study


def test_threshold_has_the_precision_and_the_best_recall_by_trying_all():
    generator = np.random.default_rng(1)
    positive = generator.random(300) < 0.4
    scores = np.round(generator.normal(positive * 1.0, 1.0), 1)  # with ties
    threshold = statistics.choose_threshold(scores, positive, 0.7)
    taken = scores >= threshold
    assert positive[taken].mean() >= 0.7
    for other in np.unique(scores):
        taken_there = scores >= other
        if positive[taken_there].mean() >= 0.7:
            assert positive[taken_there].sum() <= positive[taken].sum()


def test_threshold_lies_between_scores_where_rounding_decides_nothing():
    scores, positive = np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert statistics.choose_threshold(scores, positive, 0.9) == 1.5


def test_a_precision_that_no_threshold_reaches_says_the_best_there_is():
    scores, positive = np.array([0.0, 1.0, 2.0, 3.0]), np.array([True, True, True, False])
    with pytest.raises(ValueError, match=r"precision 0.9, found at best 0.7500 \(recall 1.0000"):
        statistics.choose_threshold(scores, positive, 0.9)


def test_closest_threshold_undoes_a_shift():
    scores = np.linspace(-2, 2, 41)
    verdicts_ = (scores >= 0.05).astype(int)
    found = statistics.restored(scores + 0.5, verdicts_, 0.05)
    assert found["flips_after"] == 0
    assert found["threshold"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("near", [-9, 0.3, 9])  # torch takes all, some, none
def test_closest_threshold_is_the_best_by_trying_all(near):
    generator = np.random.default_rng(2)
    reference = generator.normal(size=200)
    scores, verdicts_ = reference + generator.normal(0, 0.5, 200), (reference >= near).astype(int)
    best = statistics.closest_threshold(scores, verdicts_, 0.3)
    flips = ((scores >= best) != verdicts_).sum()
    tried = np.linspace(scores.min() - 2, scores.max() + 2, 5001)
    assert flips <= min(((scores >= t) != verdicts_).sum() for t in tried)


def test_exact_interval_has_a_width_where_all_agree():
    found = statistics.exact_interval(100, 100)
    assert found["high"] == 1 and found["low"] == pytest.approx(0.025 ** (1 / 100))
    needed = statistics.texts_for(0.995)
    assert (
        statistics.exact_interval(needed, needed)["low"]
        > 0.995
        >= statistics.exact_interval(needed - 1, needed - 1)["low"]
    )


def test_bootstrap_interval_of_a_share_is_that_of_the_binomial():
    hit = np.arange(400) < 320
    found = statistics.ratio_interval([(hit, np.ones_like(hit))], statistics.resample(400, 4000, 0))
    assert found["value"] == 0.8
    assert found["low"] == pytest.approx(0.8 - 1.96 * 0.02, abs=0.005)
    assert found["high"] == pytest.approx(0.8 + 1.96 * 0.02, abs=0.005)


def test_a_share_of_nothing_is_undefined():
    nothing = np.zeros(10, dtype=bool)
    assert statistics.ratio_interval([(nothing, nothing)], statistics.resample(10, 50, 0)) is None


def test_mcnemar_counts_who_is_right_alone():
    reference = np.array([True] * 8 + [False] * 1 + [True] * 5)
    other = np.array([False] * 8 + [True] * 1 + [True] * 5)
    found = statistics.mcnemar(reference, other)
    assert (found["only_torch_right"], found["only_this_right"]) == (8, 1)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.mcnemar(reference, reference)["p"] == 1


def test_macro_averages_run_over_the_classes():
    classes, found = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    quality = statistics.quality(found, classes, range(3), statistics.resample(4, 20, 0))
    assert quality["accuracy"]["value"] == 0.75
    assert quality["precision"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert quality["recall"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)


def conclude(latency, bound=0.995, texts=5000):
    known = (("ONNX", 0.999, 1e-6), ("TRT_FP16", 0.998, 1e-3), ("TRT_INT8", 0.98, 0.5))
    rows = {name: {"agreement": {"low": low}, "deviation": {"max_abs": error}} for name, low, error in known}
    for row, value in zip(rows.values(), latency, strict=True):
        row |= {"latency_p50_ms": value, "engine": "somewhere"}
    return study.conclude({"torch": {}} | rows, bound, texts)


def test_the_fastest_of_those_that_agree_enough_wins():
    found = conclude((5.0, 3.0, 1.0))
    assert found["winner"] == "TRT_FP16" and "2 of 3 models pass" in found["text"]
    found = conclude((5.0, 3.0, 1.0), bound=0.9999, texts=100)
    assert found["winner"] is None and "needs at least 36887 texts" in found["text"]


def test_noise_does_not_make_a_model_the_fastest():
    assert conclude((3.1, 3.0, 1.0))["winner"] == "ONNX"


@pytest.mark.parametrize(
    ("labels", "problem", "positive", "expected"),
    [
        ("ab", "single_label_classification", 1, "threshold"),
        ("ab", "single_label_classification", 0, "threshold"),
        ("abc", "single_label_classification", None, "largest logit"),
        ("abc", "single_label_classification", 1, "largest logit"),  # one against the rest: which of the rest?
        ("ab", "multi_label_classification", 1, "largest logit"),  # both may be right, or none
    ],
)
def test_a_label_follows_a_threshold_where_one_of_two_classes_is_right(labels, problem, positive, expected):
    assert study.served_verdict({"labels": list(labels), "problem_type": problem}, positive) == expected
