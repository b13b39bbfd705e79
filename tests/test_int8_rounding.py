"""Rounding of weights: second order beats nearest on correlated activations, and the worst channels are found."""

import numpy as np
from conftest import run_here

from core import files
from precision import ablation
from precision.int8_recipes import Candidate, find_recipe
from precision.int8_rounding import INT8, outlier_channels, round_second_order, round_values


def correlated(random, tokens):
    """Values of 64 channels that eight causes make, as those of a text model are correlated."""
    return random.normal(size=(tokens, 8)) @ random.normal(size=(8, 64)) + 0.3 * random.normal(size=(tokens, 64))


def test_second_order_rounding_beats_nearest_on_tokens_it_has_not_seen():
    random = np.random.default_rng(0)
    mixing = np.random.default_rng(1)
    values, unseen = np.split(correlated(random, 1200).astype(np.float32), [1000])
    weight = mixing.normal(size=(64, 16)).astype(np.float32)
    scale, floating = np.abs(weight).max(axis=0) / 7, np.zeros(64, dtype=bool)
    rounded = round_second_order(weight, scale, values, floating)
    np.testing.assert_allclose(rounded / scale, np.rint(rounded / scale), atol=1e-4)
    assert np.abs(rounded / scale).max() <= INT8.largest

    def error(candidate):
        return np.square(unseen @ (candidate - weight)).mean()

    assert error(rounded) < 0.7 * error(round_values(weight, scale))
    floating[:2] = True  # these two make up for what the others lose
    with_floating = round_second_order(weight, scale, values, floating)
    off = with_floating[:2] / scale
    assert np.abs(off - np.rint(off)).max() > 0.1 and error(with_floating) < error(rounded)


def test_without_a_bias_the_mean_of_the_outputs_counts():
    values = 2 + correlated(np.random.default_rng(0), 1000).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    scale, floating = np.abs(weight).max(axis=0) / 7, np.zeros(64, dtype=bool)
    wrong = {
        b: values @ (round_second_order(weight, scale, values, floating, biased=b) - weight) for b in (True, False)
    }
    assert np.square(wrong[False]).mean() < 0.9 * np.square(wrong[True]).mean()
    assert wrong[True].var(axis=0).mean() < wrong[False].var(axis=0).mean()  # which is all that counts with a bias
    expected, power = values @ weight, np.ones(16, np.float32)
    candidate = Candidate(values, weight, False, 0.0)
    difference = candidate.values(values) @ candidate.rounded - expected
    assert not candidate.offsets.any() and candidate.error(values, expected, power) == np.square(difference).sum()
    candidate.biased = True
    assert candidate.error(values, expected, power) < np.square(difference).sum()


def test_a_weight_of_zeros_has_a_recipe():
    random = np.random.default_rng(0)
    values = random.normal(size=(300, 64)).astype(np.float32)
    weights = {"zeros": np.zeros((64, 8), np.float32), "others": random.normal(size=(64, 8)).astype(np.float32)}
    for own in (weights, {"zeros": weights["zeros"]}):
        recipe = find_recipe(values, values, own, True)
        rounded, steps = recipe["weights"]["zeros"]
        assert not rounded.any() and (steps > 0).all() and np.isfinite(recipe["mean_errors"]["zeros"]).all()


def test_channels_of_outliers_are_found_by_their_values_and_by_their_weights():
    random = np.random.default_rng(0)
    values, weight = random.normal(size=(300, 64)), random.normal(size=(64, 32))
    values[:, 5] *= 30
    weight[7] *= 20
    assert set(np.flatnonzero(outlier_channels(values, weight, np.ones(32), 2))) == {5, 7}
    assert outlier_channels(values, weight, np.ones(32), 4).sum() == 4


def test_each_way_adds_a_row_measured_on_texts_that_do_not_calibrate(tiny, tmp_path):
    places = ("--repository", tiny.repository, "--results", tmp_path)
    done = run_here(ablation, *places, "--max-texts", 8)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("ablation.json")
    record = files.read_json(path, "")
    assert len(record["rows"]) == 5 and record["measured"]["texts"] == 8 and str(path) in done.stdout
    first, *_, last, products = (row["relative_l2_error"] for row in record["rows"])
    assert last <= first and products > last and 0 < record["rows"][-1]["products_flops_share"] < 0.5
    done = run_here(ablation, *places, "--texts", files.TEXTS)
    assert done.returncode == 1 and "expected texts that do not calibrate, found 128" in done.stderr
    calibrating, measuring = files.split_texts(files.read_texts(files.TEXTS))
    (tmp_path / "texts.txt").write_text(f"{measuring[0]}\n  {calibrating[0].upper()}\n")
    done = run_here(ablation, *places, "--texts", tmp_path / "texts.txt")
    assert done.returncode == 1 and "found 1 that do" in done.stderr
    done = run_here(ablation, *places, "--seed", -1)
    assert done.returncode == 2 and "--seed: expected 0 or more" in done.stderr
