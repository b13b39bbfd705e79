"""Statistics of verdicts: thresholds, agreement, intervals, tests. Pure functions of numbers.

A verdict is what a service does with the logits: with a threshold, whether the positive
class's logit reaches it (0 or 1); without one, the class with the largest logit.
"""

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


# --- thresholds ----------------------------------------------------------------------


def cut_points(scores):
    """Every threshold that gives other verdicts, ascending: below all scores, then between neighbours.

    Between, not at, a score: at one, the last bit of another model's arithmetic would decide.
    """
    values = np.unique(scores)
    return np.concatenate([[values[0] - 1.0], (values[1:] + values[:-1]) / 2])


def at_or_above(scores, positive, thresholds):
    """(texts, positive ones among them) whose score reaches each threshold, int [thresholds] each."""
    order = np.argsort(scores)
    first = np.searchsorted(scores[order], thresholds, side="left")
    right = np.concatenate([np.cumsum(positive[order][::-1])[::-1], [0]])[first]
    return len(scores) - first, right


def choose_threshold(scores, positive, wanted):
    """Threshold with the best recall among those of at least the wanted precision.

    scores: float [texts]; positive: bool [texts]. Of equal recall the highest precision wins.
    Raises ValueError with the best precision there is, where none reaches it.
    """
    thresholds = cut_points(scores)
    taken, right = at_or_above(scores, positive, thresholds)
    precision, recall = right / np.maximum(taken, 1), right / max(int(positive.sum()), 1)
    good = np.flatnonzero(precision >= wanted)
    if not len(good):
        best = int(np.argmax(precision))
        raise ValueError(
            f"expected a threshold with precision {wanted:g}, found at best {precision[best]:.4f} "
            f"(recall {recall[best]:.4f}, at threshold {thresholds[best]:.4f})"
        )
    best = max(good, key=lambda i: (recall[i], precision[i]))
    return float(thresholds[best])


def closest_threshold(scores, verdicts, near):
    """Threshold whose verdicts on `scores` differ least from `verdicts`; of several the nearest to `near`."""
    # above all scores too: the other model may have taken none
    thresholds = np.append(cut_points(scores), [scores.max() + 1.0, near])
    taken, right = at_or_above(scores, verdicts == 1, thresholds)
    flips = (taken - right) + ((verdicts == 1).sum() - right)  # zeros at or above the threshold, ones below it
    best = np.flatnonzero(flips == flips.min())
    return float(min(thresholds[best], key=lambda t: abs(t - near)))


def restored(scores, verdicts, near):
    """What the closest threshold brings: flips with it, and on texts it was not chosen on.

    The last is cross-validated: chosen on one half of the texts and counted on the other, and
    the other way round.
    """
    threshold = closest_threshold(scores, verdicts, near)
    unseen = 0
    for side in (0, 1):
        chosen = closest_threshold(scores[side::2], verdicts[side::2], near)
        unseen += int(((scores[1 - side :: 2] >= chosen) != verdicts[1 - side :: 2]).sum())
    after = int(((scores >= threshold) != verdicts).sum())
    return {"threshold": threshold, "flips_after": after, "flips_cross_validated": unseen}


# --- intervals and tests -------------------------------------------------------------


def resample(count, resamples, seed):
    """How often each text is drawn in each bootstrap resample: float32 [resamples, count]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def ratio_interval(pairs, weights):
    """Mean over (hit, counted) pairs of share hit/counted, with its percentile bootstrap interval.

    hit, counted: bool [texts]; weights: what resample returns. None where nothing is counted.
    """
    values, drawn = [], []
    for hit, counted in pairs:
        hit = hit & counted
        values.append(hit.sum() / counted.sum() if counted.any() else np.nan)
        below = weights @ counted.astype(np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn.append(np.where(below > 0, (weights @ hit.astype(np.float32)) / below, np.nan))
    if np.isnan(values).all():
        return None
    tail = (1 - CONFIDENCE) / 2 * 100
    means = np.nanmean(np.stack([d for d, v in zip(drawn, values, strict=True) if not np.isnan(v)]), axis=0)
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return {"value": float(np.nanmean(values)), "low": float(low), "high": float(high)}


def exact_interval(hits, count):
    """Clopper-Pearson interval of a share. Unlike a bootstrap it has a width where all agree."""
    interval = stats.binomtest(int(hits), int(count)).proportion_ci(CONFIDENCE, method="exact")
    return {"value": hits / count, "low": float(interval.low), "high": float(interval.high)}


def texts_for(bound):
    """How many texts, all agreeing, lift the exact interval's lower end above `bound`."""
    return int(np.floor(np.log((1 - CONFIDENCE) / 2) / np.log(bound))) + 1


def mcnemar(reference_right, right):
    """Exact McNemar test of two models on the same texts (McNemar 1947): who is right alone, and p."""
    only_reference = int((reference_right & ~right).sum())
    only_other = int((~reference_right & right).sum())
    discordant = only_reference + only_other
    p = stats.binomtest(only_other, discordant, 0.5).pvalue if discordant else 1.0
    return {"only_torch_right": only_reference, "only_this_right": only_other, "p": float(p)}


def quality(verdicts, classes, over, weights):
    """Accuracy, precision and recall against the labels, averaged over the classes in `over`."""
    right = verdicts == classes
    every = np.ones_like(right)
    return {
        "accuracy": ratio_interval([(right, every)], weights),
        "precision": ratio_interval([(classes == c, verdicts == c) for c in over], weights),
        "recall": ratio_interval([(verdicts == c, classes == c) for c in over], weights),
    }


def confusion(reference, verdicts, classes):
    """Counts [reference verdict][verdict]."""
    return np.bincount(reference * classes + verdicts, minlength=classes**2).reshape(classes, classes).tolist()


def deviation(reference, logits):
    """Signed and absolute differences of logits from the reference's."""
    difference = (logits - reference).astype(np.float64).ravel()
    return {
        "mean": float(difference.mean()),
        "min": float(difference.min()),
        "max": float(difference.max()),
        "max_abs": float(np.abs(difference).max()),
    }
