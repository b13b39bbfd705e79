"""Find how a text encoder is computed in INT8 with its embeddings kept: ranges, smoothing, which MatMuls.

Three steps, none of which knows a layer's name: (1) per tensor that weight MatMuls read,
the smoothing and range with the least error of their outputs; (2) every MatMul's effect on
EMBEDDING when it alone is in INT8; (3) from all in INT8, the most harmful per FLOP goes back
to floating point until the target is met. quantize.py calls it.

Sources: SmoothQuant, Xiao et al. 2023 (arXiv:2211.10438): factors; Outlier Suppression+, Wei
et al. 2023 (arXiv:2304.09145): offsets per channel; Nagel et al. 2021 (arXiv:2106.08295):
range by squared error, bias correction, sensitivity per layer.
"""

import time

import numpy as np
import onnx
from tqdm import tqdm

from core.metrics import deviations
from core.onnx_runtime import open_session
from core.tables import ATTENTION_MASK, INPUT_IDS, MAX_BATCH_SIZE
from precision.int8_graph import (
    GraphIndex,
    bias_add,
    flops_share,
    insert_int8,
    matmul_groups,
    matmul_weights,
    weight_matmuls,
)

INT8_PRECISIONS = ("INT8", "BEST")  # the graphs that one search makes
INT8_MAX = 127  # symmetric: -128 is not used
ALPHAS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # 0: no factors; 1: activations of equal range, weights take it all
CLIPS = (1.0, 1.1, 0.95, 0.9, 0.85, 0.8, 0.7)  # range over the largest calibrated value
MAX_RANGE_TOKENS = 8192  # calibrated per tensor; bounds memory
MAX_ERROR_TOKENS = 512  # on which smoothing and range are compared
SMALLEST = 1e-5  # a channel that never differs from zero has no range
NEGLIGIBLE_SHARE = 1e-3  # of the FLOPs: INT8 there can save nothing, and the output layer is such a MatMul
CURVE_STEP = 0.1  # of the FLOPs, between points of the curve below the least share


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


def round_values(values, scale):
    """Nearest multiples of `scale` that INT8 can hold."""
    return np.clip(np.rint(values / scale), -INT8_MAX, INT8_MAX) * scale


def weight_scales(weight):
    """Step of each output channel: its largest absolute value over 127."""
    return np.maximum(np.abs(weight).max(axis=0), SMALLEST) / INT8_MAX


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

    def __init__(self, activations, weight, use_offsets, alpha):
        low, high = activations.min(axis=0), activations.max(axis=0)
        self.use_offsets, self.alpha, self.clip = use_offsets, alpha, 1.0
        self.offsets = (low + high) / 2 * np.float32(use_offsets)
        self.factors = smoothing_factors(activations - self.offsets, weight, alpha)
        self.largest = float(np.abs(self.smooth(activations)).max())
        self.weight = weight * self.factors[:, None]
        self.weight_scale = weight_scales(self.weight)
        self.rounded = round_values(self.weight, self.weight_scale)

    def smooth(self, activations):
        return (activations - self.offsets) / self.factors

    def scale(self):
        return np.float32(max(self.largest * self.clip, SMALLEST) / INT8_MAX)

    def outputs(self, activations):
        return round_values(self.smooth(activations), self.scale()) @ self.rounded

    def error(self, activations, expected, weight):
        """Mean squared error of the outputs after bias correction, each over its MatMul's own power."""
        difference = self.outputs(activations) - expected
        difference -= difference.mean(axis=0)
        return float((np.square(difference).mean(axis=0) * weight).sum())


def find_recipe(activations, held_out, weights, biased):
    """The candidate with the least error on tokens that set no range; alpha first, then the range.

    activations, held_out: float32 [tokens, in]; weights: {node name: [in, out]}; biased:
    whether every one of them has a bias, without which offsets are not exact.
    """
    weight = np.concatenate(list(weights.values()), axis=1)
    expected = held_out @ weight
    power = np.concatenate(
        [
            np.full(w.shape[1], 1 / np.square(part).sum())
            for w, part in zip(
                weights.values(),
                np.split(expected, np.cumsum([w.shape[1] for w in weights.values()])[:-1], axis=1),
                strict=True,
            )
        ]
    )
    best, least = None, np.inf
    for use_offsets in (False, True) if biased else (False,):
        for alpha in ALPHAS:
            candidate = Candidate(activations, weight, use_offsets, alpha)
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
        values = np.rint(candidate.rounded[:, columns] / scale).astype(np.int8)
        recipe["weights"][name] = (values, scale)
        recipe["mean_errors"][name] = errors[columns]
        start = columns.stop
    return recipe


def find_recipes(reference, calibration, held_out, seed):
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
        recipes[tensor] = find_recipe(ranges.pop(tensor), held_out.pop(tensor)[:MAX_ERROR_TOKENS], own, biased)
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


# --- which MatMuls -------------------------------------------------------------------


def candidate_matmuls(reference, recipes=None):
    """Names of the weight MatMuls with enough FLOPs for INT8 to matter, and a recipe if there are recipes."""
    shapes = weight_matmuls(reference)
    names = shapes if recipes is None else {name for recipe in recipes.values() for name in recipe["weights"]}
    return [name for name in shapes if name in names and flops_share([name], shapes) >= NEGLIGIBLE_SHARE]


def run_graph(graph, encoded):
    """The graph's one output for every text: EMBEDDING [texts, length, outputs], or LOGITS [texts, 1, classes]."""
    session = open_session(graph)
    starts = range(0, len(encoded[INPUT_IDS]), MAX_BATCH_SIZE)
    found = np.concatenate([session.run(None, feeds(encoded, start))[0] for start in starts])
    return found if found.ndim == 3 else found[:, None]


def measure(graph, expected, encoded):
    """Mean over texts of cosine and relative L2 error, as client.py measures them; None where not finite.

    Logits are compared over all texts at once: a text near the boundary has next to none, and no share of them counts.
    """
    found, mask = run_graph(graph, encoded), encoded[ATTENTION_MASK]
    try:
        if found.shape[1] == 1:
            rows = [deviations(expected, found, np.ones_like(mask[:, :1]))]
        else:
            rows = [deviations(expected[i : i + 1], found[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
    except ValueError:  # overflow
        return {"mean_cosine": None, "relative_l2_error": None}
    return {key: float(np.mean([row[key] for row in rows])) for key in ("mean_cosine", "relative_l2_error")}


def meets(row, target):
    """Whether a measured row reaches the target: {"mean_cosine": least, "relative_l2_error": most}."""
    if row["mean_cosine"] is None:
        return False
    return row["mean_cosine"] >= target["mean_cosine"] and row["relative_l2_error"] <= target["relative_l2_error"]


def most_harmful_first(rows):
    """Names by error per FLOP, the largest first; those that were not measured come last."""

    def harm(row):
        return -1.0 if row["relative_l2_error"] is None else row["relative_l2_error"] ** 2 / row["flops_share"]

    return [row["matmul"] for row in sorted(rows, key=harm, reverse=True)]


def curve_sets(order, shapes, min_share):
    """Sets of MatMuls in INT8: all, then ever fewer; each one down to the least share, then in coarse steps."""
    sets, last = [list(order)], 1.0
    for removed in range(1, len(order)):
        share = flops_share(order[removed:], shapes)
        if share >= min_share or share <= last - CURVE_STEP:
            sets.append(order[removed:])
            last = share
    return sets


class Search:
    """The measurements of one search: they share reference, texts and deadline."""

    def __init__(self, reference, recipes, selection, deadline, convert):
        self.reference, self.recipes, self.selection, self.deadline = reference, recipes, selection, deadline
        self.convert = convert
        self.shapes = weight_matmuls(reference)
        self.expected = run_graph(reference, selection)

    def out_of_time(self):
        return time.monotonic() > self.deadline

    def point(self, names):
        """Share of the FLOPs in INT8, and the quality with these MatMuls in INT8."""
        graph = insert_int8(self.reference, self.recipes, set(names))
        return {"int8_flops_share": flops_share(names, self.shapes)} | measure(graph, self.expected, self.selection)

    def graphs(self, names):
        """Quality of the graphs that would be written with these MatMuls in INT8."""
        graphs = ((p, self.convert(p, set(names))) for p in INT8_PRECISIONS)
        return {p: measure(graph, self.expected, self.selection) for p, graph in graphs}

    def sensitivity(self, names):
        """Every MatMul's own effect: one row each; null where the time was over."""
        rows = []
        for name in tqdm(names, desc="sensitivity", unit="MatMul", mininterval=1):
            row = {"mean_cosine": None, "relative_l2_error": None} if self.out_of_time() else self.point([name])
            share = flops_share([name], self.shapes)
            rows.append({"matmul": name, "shape": list(self.shapes[name]), "flops_share": share} | row)
            rows[-1].pop("int8_flops_share", None)
        return rows

    def curve(self, order, min_share, first):
        """Quality against the share in INT8: [(names, point)], from all in INT8 (measured: first) to few."""
        found = [(list(order), first)]
        for names in tqdm(curve_sets(order, self.shapes, min_share)[1:], desc="curve", unit="point", mininterval=1):
            if self.out_of_time():
                break
            found.append((names, self.point(names)))
        return found


def choose(curve, target, min_share, measure_graphs):
    """The largest share that meets the target in every graph that would be written.

    A point of the curve is INT8 with the rest in FP32, and BEST of the same MatMuls may miss
    what it meets. measure_graphs: names -> {precision: quality}. Returns (names or None,
    [{"int8_flops_share", precision: quality}] of what was tried, the chosen one last).
    """
    good = [(names, p["int8_flops_share"]) for names, p in curve if meets(p, target)]
    tried = []
    for names, share in sorted(good, key=lambda point: -point[1]):
        if share >= min_share:
            found = measure_graphs(names)
            tried.append({"int8_flops_share": share} | found)
            if all(meets(row, target) for row in found.values()):
                return names, tried
    return None, tried


def search_int8(reference, recipes, selection, target, min_share, deadline, convert, quick=False):
    """Steps 2 and 3: which MatMuls are in INT8, and what was measured on the way.

    convert: (precision, names) -> the graph that would be written. quick: stop where all in
    INT8 meet the target; the rows are then not measured. Returns (names in INT8 or None,
    {"int8_flops_share", "reached", "tried", "matmuls": rows, "curve": points, "time_was_over"}).
    """
    names = candidate_matmuls(reference, recipes)
    search = Search(reference, recipes, selection, deadline, convert)
    everything = search.point(names)  # first of all: it may be the answer, and is one if time runs out
    chosen, tried = choose([(names, everything)], target, min_share, search.graphs) if quick else (None, [])
    decided = chosen is not None
    if decided:  # what is left would be for the report alone
        search.deadline = time.monotonic()
    rows = search.sensitivity(names)
    curve = search.curve(most_harmful_first(rows), min_share, everything)
    time_was_over = search.out_of_time() and not decided
    if not decided:
        chosen, tried = choose(curve, target, min_share, search.graphs)
    settings = {name: recipe["settings"] for recipe in recipes.values() for name in recipe["weights"]}
    for row in rows:
        row |= {"int8": row["matmul"] in (chosen or ()), "why": reason(row, chosen)} | settings[row["matmul"]]
    for name in sorted(search.shapes.keys() - set(names)):
        rows.append(left_out(name, search.shapes))
    return (set(chosen) if chosen else None), {
        "int8_flops_share": tried[-1]["int8_flops_share"] if chosen else None,
        "reached": {p: tried[-1][p] for p in INT8_PRECISIONS} if chosen else None,
        "tried": tried,
        "matmuls": rows,
        "curve": [point for _, point in curve],
        "time_was_over": time_was_over,
    }


def reason(row, chosen):
    """Why a MatMul is in INT8 or not, in words for the report; chosen: names, None where nothing met the target."""
    if not chosen:
        return "no graph met the target"
    if row["matmul"] in chosen:
        return "the target is met with it"
    return "the target is missed with it, and it costs most quality per FLOP"


def left_out(name, shapes):
    """The row of a MatMul that is too small to be tried."""
    share = flops_share([name], shapes)
    row = {"matmul": name, "shape": list(shapes[name]), "flops_share": share}
    row |= {"mean_cosine": None, "relative_l2_error": None, "int8": False}
    small = (
        f"less than {NEGLIGIBLE_SHARE:.1%} of the FLOPs" if share < NEGLIGIBLE_SHARE else "one row a text, not a token"
    )
    row["why"] = f"{small}: INT8 could save nothing"
    return row | {"alpha": None, "offsets": None, "clip": None}
