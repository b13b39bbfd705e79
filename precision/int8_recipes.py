"""How the MatMuls behind one tensor are computed in INT8: ranges, smoothing, rounding, bias correction.

Sources: SmoothQuant, Xiao et al. 2023 (arXiv:2211.10438): factors; Outlier Suppression+, Wei et al. 2023
(arXiv:2304.09145): offsets per channel; Nagel et al. 2021 (arXiv:2106.08295): range by squared error, bias correction.
"""

import hashlib

import numpy as np
import onnx
from tqdm import tqdm

from core.onnx_runtime import open_session
from core.repository import weight_matmuls
from core.tables import ATTENTION_MASK, INPUT_IDS, MAX_BATCH_SIZE
from precision.int8_graph import flops_share, matmul_groups, matmul_weights
from precision.int8_rounding import INT8, outlier_channels, round_second_order, round_values
from precision.surgery import GraphIndex, bias_add

ALPHAS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # 0: no factors; 1: activations of equal range, weights take it all
CLIPS = (1.0, 1.25, 0.9)  # range over the largest calibrated value: other texts have larger ones
OUTLIERS = 8  # channels of a tensor that are left in floating point
WORTH = 0.6  # where the squared error falls to this share: they cost a product and a sum for each MatMul
WAYS = ("second_order", "outliers")  # each can be left out, to show what it brings
MAX_RANGE_TOKENS = 8192  # calibrated per tensor; bounds memory
MAX_ERROR_TOKENS = 512  # on which smoothing and range are compared
SMALLEST = 1e-5  # a channel that never differs from zero has no range
TINY = np.finfo(np.float32).tiny  # a weight of zeros has no power
MIN_CHANNELS = 16  # for each channel in floating point
NEGLIGIBLE_SHARE = 1e-3  # of the FLOPs: INT8 there can save nothing, and the output layer is such a MatMul


# --- activations ---------------------------------------------------------------------


def feeds(encoded, start=0):
    """One batch of the encoded texts as the graph's inputs."""
    return {name: values[start : start + MAX_BATCH_SIZE] for name, values in encoded.items()}


def capture_activations(reference, tensors, encoded, seed):
    """{tensor: float32 [tokens, channels]} of real tokens: padding has values no answer depends on.

    A tensor with one row per text, behind a classifier's pooling, is left out: its MatMul costs next to nothing.
    """
    model = onnx.ModelProto()
    model.CopyFrom(reference)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    session = open_session(model)
    total = int(encoded[ATTENTION_MASK].sum())
    keep = np.zeros(total, dtype=bool)  # the same tokens of every tensor
    keep[np.random.default_rng(seed).permutation(total)[:MAX_RANGE_TOKENS]] = True
    found, seen = {name: [] for name in tensors}, 0
    for start in range(0, len(encoded[INPUT_IDS]), MAX_BATCH_SIZE):
        batch = feeds(encoded, start)
        real = batch[ATTENTION_MASK].astype(bool)
        kept = keep[seen : seen + real.sum()]
        seen += real.sum()
        for name, values in zip(tensors, session.run(list(tensors), batch), strict=True):
            if values.shape[:-1] == real.shape:
                found[name].append(values[real][kept])
    return {name: np.concatenate(parts) for name, parts in found.items() if parts}


# --- the recipe of one tensor --------------------------------------------------------


def smoothing_factors(activations, weight, alpha):
    """SmoothQuant, equation 4: amax(x)^alpha / amax(w)^(1 - alpha) per input channel; ones for alpha 0."""
    if not alpha:
        return np.ones(len(weight), dtype=np.float32)
    of_x = np.maximum(np.abs(activations).max(axis=0), SMALLEST)
    of_w = np.maximum(np.abs(weight).max(axis=1), SMALLEST)
    factors = of_x**alpha / of_w ** (1 - alpha)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)  # mean 1: FP16 must hold the values


class Candidate:
    """One way to compute the MatMuls behind a tensor: offsets, alpha, clip, channels left in floating point."""

    def __init__(self, activations, weight, biased, alpha, form=INT8, power=None, outliers=0):
        low, high = activations.min(axis=0), activations.max(axis=0)
        self.biased, self.alpha, self.clip, self.form = biased, alpha, 1.0, form
        self.use_offsets = biased and form is INT8  # FP8's steps grow with the values: offsets bring nothing
        self.offsets = (low + high) / 2 * np.float32(self.use_offsets)
        self.factors = smoothing_factors(activations - self.offsets, weight, alpha)
        self.weight, values = weight * self.factors[:, None], self.smooth(activations)
        self.floating = np.zeros(len(weight), dtype=bool)
        if outliers:
            self.floating = outlier_channels(values, self.weight, power, outliers, biased)
        self.largest = float(np.abs(values[:, ~self.floating]).max())
        # per output channel
        self.weight_scale = np.maximum(np.abs(self.weight[~self.floating]).max(axis=0), SMALLEST) / form.largest
        rounded = round_values(self.weight, self.weight_scale, form)
        self.rounded = np.where(self.floating[:, None], self.weight, rounded)

    def smooth(self, activations):
        return (activations - self.offsets) / self.factors

    def scale(self):
        return np.float32(max(self.largest * self.clip, SMALLEST) / self.form.largest)

    def values(self, activations):
        """What the MatMul reads: rounded, but for the channels in floating point."""
        smooth = self.smooth(activations)
        return np.where(self.floating, smooth, round_values(smooth, self.scale(), self.form))

    def error(self, activations, expected, power):
        """Squared error of the outputs, after bias correction where there are biases, each over its MatMul's own power."""
        difference = self.values(activations) @ self.rounded - expected
        if self.biased:
            difference -= difference.mean(axis=0)
        return float((np.square(difference) @ power).sum())


def find_recipe(activations, held_out, weights, biased, form=INT8, ways=WAYS):
    """The candidate with the least error on tokens that set no range.

    activations, held_out: float32 [tokens, in]; weights: {node name: [in, out]}; biased: whether every one of them has
    a bias, without which offsets are not exact and nothing takes the mean error.
    """
    weight = np.concatenate(list(weights.values()), axis=1)
    outputs = [held_out @ w for w in weights.values()]
    expected = np.concatenate(outputs, axis=1)
    power = np.concatenate([np.full(o.shape[1], 1 / max(np.square(o).sum(), TINY)) for o in outputs])
    # in FP8 outliers harm no others
    outliers = form is INT8 and "outliers" in ways and len(weight) > MIN_CHANNELS * OUTLIERS
    counts = [0, OUTLIERS] if outliers else [0]

    def best_with(outliers):
        best, chosen, least = None, 1.0, np.inf
        for alpha in ALPHAS:
            candidate = Candidate(activations, weight, biased, alpha, form, power, outliers)
            for candidate.clip in CLIPS:
                error = candidate.error(held_out, expected, power)
                if error < least:
                    best, chosen, least = candidate, candidate.clip, error
        best.clip = chosen
        if "second_order" in ways:
            values = best.values(activations)
            best.rounded = round_second_order(best.weight, best.weight_scale, values, best.floating, form, biased)
        return best, best.error(held_out, expected, power)

    (best, error), *others = map(best_with, counts)
    best = next((other for other, less in others if less <= WORTH * error), best)
    return write_recipe(best, activations, weights)


def write_recipe(candidate, activations, weights):
    """Candidate -> what int8_graph.insert_int8 takes, and the settings for the record."""
    weight, floating = np.concatenate(list(weights.values()), axis=1), candidate.floating
    errors = (candidate.values(activations) @ candidate.rounded - activations @ weight).mean(axis=0)
    recipe = {key: getattr(candidate, key) for key in ("offsets", "factors")}
    recipe |= {"scale": candidate.scale(), "weights": {}, "mean_errors": {}, "rows": {}}
    recipe["outliers"] = np.flatnonzero(floating)
    recipe["settings"] = {"alpha": candidate.alpha, "offsets": candidate.use_offsets, "clip": candidate.clip}
    start = 0
    for name, own in weights.items():
        columns = slice(start, start + own.shape[1])
        scale = candidate.weight_scale[columns]
        # on the form's grid but for the division
        rounded = np.where(floating[:, None], 0, candidate.rounded[:, columns]) / scale
        rounded = (np.rint(rounded) if candidate.form is INT8 else rounded).astype(candidate.form.dtype)
        recipe["weights"][name] = (rounded, scale)
        recipe["rows"][name] = candidate.rounded[floating, columns]
        recipe["mean_errors"][name] = errors[columns]
        start = columns.stop
    return recipe


def candidate_matmuls(reference, recipes=None):
    """Names of the weight MatMuls with enough FLOPs for INT8 to matter, and a recipe if there are recipes."""
    shapes = weight_matmuls(reference)
    names = shapes if recipes is None else {name for recipe in recipes.values() for name in recipe["weights"]}
    return [name for name in shapes if name in names and flops_share([name], shapes) >= NEGLIGIBLE_SHARE]


def find_recipes(reference, calibration, held_out, seed, form=INT8, ways=WAYS):
    """{tensor: recipe} of every tensor that weight MatMuls worth quantizing read."""
    weights, nodes = matmul_weights(reference), {n.name: n for n in reference.graph.node}
    index, candidates = GraphIndex(reference), candidate_matmuls(reference)
    groups = {t: [n for n in names if n in candidates] for t, names in matmul_groups(reference).items()}
    groups = {t: names for t, names in groups.items() if names}
    ranges = capture_activations(reference, list(groups), calibration, seed)
    held_out = capture_activations(reference, list(groups), held_out, seed)
    recipes = {}
    for tensor in tqdm(list(ranges), desc="ranges", unit="tensor", mininterval=1):
        own = {name: weights[name] for name in groups[tensor]}
        biased = all(bias_add(index, nodes[name]) is not None for name in own)
        tokens = held_out.pop(tensor)[:MAX_ERROR_TOKENS]
        recipes[tensor] = find_recipe(ranges.pop(tensor), tokens, own, biased, form, ways)
    return recipes


def naive_recipes(reference, calibration, seed):
    """The usual recipe: largest absolute value as range, no smoothing, no bias correction."""
    groups, weights = matmul_groups(reference), matmul_weights(reference)
    recipes = {}
    for tensor, activations in capture_activations(reference, list(groups), calibration, seed).items():
        own = {name: weights[name] for name in groups[tensor]}
        candidate = Candidate(activations, np.concatenate(list(own.values()), axis=1), False, 0.0)
        recipes[tensor] = write_recipe(candidate, activations, own)
        for errors in recipes[tensor]["mean_errors"].values():
            errors[:] = 0
    return recipes


def recipe_digest(recipes, chosen, products=None):
    """SHA-256 of what a search found: INT8 and BEST of the same search have the same."""
    digest = hashlib.sha256()
    for tensor, recipe in sorted(recipes.items()):
        for name in sorted(chosen & recipe["weights"].keys()):
            arrays = (*(recipe[key] for key in ("offsets", "factors", "scale", "outliers")), *recipe["weights"][name])
            arrays += (recipe["rows"][name],)
            digest.update(f"{tensor} {name}".encode())
            for array in (*arrays, recipe["mean_errors"][name]):
                digest.update(np.ascontiguousarray(array).tobytes())
    for tensor, step in sorted((products or {}).items()):
        digest.update(f"{tensor} {step}".encode())
    return digest.hexdigest()
