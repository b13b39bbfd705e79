"""How the MatMuls behind one tensor are computed in INT8: ranges, smoothing, bias correction.

Sources: SmoothQuant, Xiao et al. 2023 (arXiv:2211.10438): factors; Outlier Suppression+, Wei et al. 2023
(arXiv:2304.09145): offsets per channel; Nagel et al. 2021 (arXiv:2106.08295): range by squared error, bias correction.
"""

import hashlib
from collections import namedtuple

import ml_dtypes
import numpy as np
import onnx
from tqdm import tqdm

from core.onnx_runtime import open_session
from core.repository import weight_matmuls
from core.tables import ATTENTION_MASK, INPUT_IDS, MAX_BATCH_SIZE
from precision.int8_graph import GraphIndex, bias_add, flops_share, matmul_groups, matmul_weights

Form = namedtuple("Form", "largest dtype")  # numbers of eight bits
INT8 = Form(127, np.dtype(np.int8))  # symmetric: -128 is not used
FP8 = Form(448, np.dtype(ml_dtypes.float8_e4m3fn))
ALPHAS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # 0: no factors; 1: activations of equal range, weights take it all
CLIPS = (1.0, 1.1, 0.95, 0.9, 0.85, 0.8, 0.7)  # range over the largest calibrated value
MAX_RANGE_TOKENS = 8192  # calibrated per tensor; bounds memory
MAX_ERROR_TOKENS = 512  # on which smoothing and range are compared
SMALLEST = 1e-5  # a channel that never differs from zero has no range
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


def round_values(values, scale, form=INT8):
    """Nearest values, in units of `scale`, that a form can hold; in FP32."""
    values = np.clip(values / scale, -form.largest, form.largest)
    return (np.rint(values) if form is INT8 else values.astype(form.dtype).astype(np.float32)) * scale


def smoothing_factors(activations, weight, alpha):
    """SmoothQuant, equation 4: amax(x)^alpha / amax(w)^(1 - alpha) per input channel; ones for alpha 0."""
    if not alpha:
        return np.ones(len(weight), dtype=np.float32)
    of_x = np.maximum(np.abs(activations).max(axis=0), SMALLEST)
    of_w = np.maximum(np.abs(weight).max(axis=1), SMALLEST)
    factors = of_x**alpha / of_w ** (1 - alpha)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)  # mean 1: FP16 must hold the values


class Candidate:
    """One way to compute the MatMuls behind a tensor: offsets, alpha, clip."""

    def __init__(self, activations, weight, use_offsets, alpha, form=INT8):
        low, high = activations.min(axis=0), activations.max(axis=0)
        self.use_offsets, self.alpha, self.clip, self.form = use_offsets, alpha, 1.0, form
        self.offsets = (low + high) / 2 * np.float32(use_offsets)
        self.factors = smoothing_factors(activations - self.offsets, weight, alpha)
        self.largest = float(np.abs(self.smooth(activations)).max())
        self.weight = weight * self.factors[:, None]
        self.weight_scale = np.maximum(np.abs(self.weight).max(axis=0), SMALLEST) / form.largest  # per output channel
        self.rounded = round_values(self.weight, self.weight_scale, form)

    def smooth(self, activations):
        return (activations - self.offsets) / self.factors

    def scale(self):
        return np.float32(max(self.largest * self.clip, SMALLEST) / self.form.largest)

    def outputs(self, activations):
        return round_values(self.smooth(activations), self.scale(), self.form) @ self.rounded

    def error(self, activations, expected, weight):
        """Mean squared error of the outputs after bias correction, each over its MatMul's own power."""
        difference = self.outputs(activations) - expected
        difference -= difference.mean(axis=0)
        return float((np.square(difference).mean(axis=0) * weight).sum())


def find_recipe(activations, held_out, weights, biased, form=INT8):
    """The candidate with the least error on tokens that set no range; alpha first, then the range.

    activations, held_out: float32 [tokens, in]; weights: {node name: [in, out]}; biased:
    whether every one of them has a bias, without which offsets are not exact.
    """
    weight = np.concatenate(list(weights.values()), axis=1)
    outputs = [held_out @ w for w in weights.values()]
    expected = np.concatenate(outputs, axis=1)
    power = np.concatenate([np.full(o.shape[1], 1 / np.square(o).sum()) for o in outputs])
    best, least = None, np.inf
    for use_offsets in (False, True) if biased and form is INT8 else (False,):  # FP8 is as fine around any value
        for alpha in ALPHAS:
            candidate = Candidate(activations, weight, use_offsets, alpha, form)
            error = candidate.error(held_out, expected, power)
            if error < least:
                best, least = candidate, error
    chosen = best.clip
    for clip in CLIPS[1:]:
        best.clip = clip
        error = best.error(held_out, expected, power)
        if error < least:
            chosen, least = clip, error
    best.clip = chosen
    return write_recipe(best, activations, weights)


def write_recipe(candidate, activations, weights):
    """Candidate -> what int8_graph.insert_int8 takes, and the settings for the record."""
    weight = np.concatenate(list(weights.values()), axis=1)
    errors = (candidate.outputs(activations) - activations @ weight).mean(axis=0)
    recipe = {key: getattr(candidate, key) for key in ("offsets", "factors")}
    recipe |= {"scale": candidate.scale(), "weights": {}, "mean_errors": {}}
    recipe["settings"] = {"alpha": candidate.alpha, "offsets": candidate.use_offsets, "clip": candidate.clip}
    start = 0
    for name, own in weights.items():
        columns = slice(start, start + own.shape[1])
        scale = candidate.weight_scale[columns]
        values = candidate.rounded[:, columns] / scale  # on the form's grid but for the division
        values = (np.rint(values) if candidate.form is INT8 else values).astype(candidate.form.dtype)
        recipe["weights"][name] = (values, scale)
        recipe["mean_errors"][name] = errors[columns]
        start = columns.stop
    return recipe


def candidate_matmuls(reference, recipes=None):
    """Names of the weight MatMuls with enough FLOPs for INT8 to matter, and a recipe if there are recipes."""
    shapes = weight_matmuls(reference)
    names = shapes if recipes is None else {name for recipe in recipes.values() for name in recipe["weights"]}
    return [name for name in shapes if name in names and flops_share([name], shapes) >= NEGLIGIBLE_SHARE]


def find_recipes(reference, calibration, held_out, seed, form=INT8):
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
        recipes[tensor] = find_recipe(ranges.pop(tensor), held_out.pop(tensor)[:MAX_ERROR_TOKENS], own, biased, form)
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


def recipe_digest(recipes, chosen):
    """SHA-256 of what a search found: INT8 and BEST of the same search have the same."""
    digest = hashlib.sha256()
    for tensor, recipe in sorted(recipes.items()):
        for name in sorted(chosen & recipe["weights"].keys()):
            arrays = (recipe["offsets"], recipe["factors"], recipe["scale"], *recipe["weights"][name])
            digest.update(f"{tensor} {name}".encode())
            for array in (*arrays, recipe["mean_errors"][name]):
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
