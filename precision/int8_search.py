"""Which MatMuls of a text model are in INT8, so that its answers are kept: the largest share that meets the target.

No step knows a layer's name: (1) int8_recipes.py finds range and smoothing per tensor; (2) every MatMul's effect on
the output is measured when it alone is in INT8; (3) from all in INT8, the most harmful per FLOP goes back to
floating point until the target is met (sensitivity per layer: Nagel et al. 2021, arXiv:2106.08295).
"""

import time

import numpy as np
from tqdm import tqdm

from core.metrics import deviations
from core.onnx_runtime import open_session
from core.repository import weight_matmuls
from core.tables import ATTENTION_MASK, INPUT_IDS, MAX_BATCH_SIZE, PRECISIONS, SERVED
from precision.int8_graph import flops_share, insert_int8, outlier_counts
from precision.int8_recipes import NEGLIGIBLE_SHARE, candidate_matmuls, feeds
from precision.makers import Learnt, learn_products, make_graph

SEARCHED = tuple(p for p in SERVED if PRECISIONS[p].target)  # one search makes their graphs
CURVE_STEP = 0.1  # of the FLOPs, between points of the curve below the least share


def run_graph(graph, encoded, task):
    """The task's output of a graph for every text: [texts, length, outputs], length 1 where it is not per token."""
    session = open_session(graph)
    starts = range(0, len(encoded[INPUT_IDS]), MAX_BATCH_SIZE)
    found = np.concatenate([session.run([task.output], feeds(encoded, start))[0] for start in starts])
    return found if task.per_token else found[:, None]


def measure(graph, expected, encoded, task):
    """Mean over texts of cosine and relative L2 error, as client.py measures them; None where not finite.

    Rows per text are compared over all texts at once: a text near the boundary has logits of next to nothing, and no
    share of them counts.
    """
    found, mask = run_graph(graph, encoded, task), encoded[ATTENTION_MASK]
    try:
        if task.per_token:
            rows = [deviations(expected[i : i + 1], found[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
        else:
            rows = [deviations(expected, found, np.ones_like(mask[:, :1]))]
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

    def __init__(self, reference, recipes, selection, task, deadline, precisions=SEARCHED, attention=None):
        self.reference, self.recipes, self.selection, self.deadline = reference, recipes, selection, deadline
        self.shapes, self.task, self.precisions = weight_matmuls(reference), task, precisions
        self.outliers, self.attention = outlier_counts(recipes), attention
        self.expected = run_graph(reference, selection, task)

    def out_of_time(self):
        return time.monotonic() > self.deadline

    def point(self, names):
        """Share of the FLOPs in INT8, and the quality with these MatMuls in INT8."""
        graph = insert_int8(self.reference, self.recipes, set(names))
        return {"int8_flops_share": flops_share(names, self.shapes, self.outliers)} | self.measure(graph)

    def graphs(self, names):
        """Quality of the graphs that would be written with these MatMuls in INT8."""
        learnt = Learnt(recipes=self.recipes, chosen=set(names))
        learnt = learn_products(self.reference, learnt, self.attention) if self.attention else learnt
        return {p: self.measure(make_graph(p, self.reference, learnt)) for p in self.precisions}

    def measure(self, graph):
        return measure(graph, self.expected, self.selection, self.task)

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


def search_int8(reference, recipes, selection, task, target, min_share, deadline, precisions=SEARCHED, attention=None):
    """Steps 2 and 3: which MatMuls are in INT8, and what was measured on the way.

    attention: {name of the part: encoded texts} where the graphs have attention's products in INT8 too; the curve does not.
    All in INT8 are measured in any case; what the deadline leaves no time for has null as its numbers. Returns (names
    in INT8 or None, {"int8_flops_share", "reached", "tried", "matmuls": rows, "curve": points, "time_was_over"}).
    """
    names = candidate_matmuls(reference, recipes)
    search = Search(reference, recipes, selection, task, deadline, precisions, attention)
    everything = search.point(names)  # first of all: it may be the answer, and is one if time runs out
    rows = search.sensitivity(names)
    curve = search.curve(most_harmful_first(rows), min_share, everything)
    time_was_over = search.out_of_time()
    chosen, tried = choose(curve, target, min_share, search.graphs)
    settings = {name: recipe["settings"] for recipe in recipes.values() for name in recipe["weights"]}
    for row in rows:
        row |= {"int8": row["matmul"] in (chosen or ()), "why": reason(row, chosen)} | settings[row["matmul"]]
    for name in sorted(search.shapes.keys() - set(names)):
        rows.append(left_out(name, search.shapes))
    return (set(chosen) if chosen else None), {
        "int8_flops_share": tried[-1]["int8_flops_share"] if chosen else None,
        "reached": {p: tried[-1][p] for p in precisions} if chosen else None,
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


# --- a target that is missed ---------------------------------------------------------


def closest(found, min_share, precisions=SEARCHED):
    """(share, {precision: quality}) of what came closest to a missed target."""
    rows = [(t["int8_flops_share"], {p: t[p] for p in precisions}) for t in found["tried"]]
    if not rows:  # no point of the curve was good enough to make BEST of it
        rows = [(p["int8_flops_share"], {precisions[0]: p}) for p in found["curve"]]
        rows = [row for row in rows if row[0] >= min_share] or rows

    def worst_cosine(row):
        return min(-1 if q["mean_cosine"] is None else q["mean_cosine"] for q in row[1].values())

    return max(rows, key=worst_cosine)


def missed_target(found, target, min_share, max_minutes, precisions=SEARCHED):
    """What was reached, in one line, where it is less than the target, and which option asks for less."""
    share, qualities = closest(found, min_share, precisions)
    finite = [q for q in qualities.values() if q["mean_cosine"] is not None]
    missed = {}
    if len(finite) < len(qualities) or min(q["mean_cosine"] for q in finite) < target["mean_cosine"]:
        missed["--target-cosine"] = "lower"
    if len(finite) < len(qualities) or max(q["relative_l2_error"] for q in finite) > target["relative_l2_error"]:
        missed["--target-l2"] = "raise"
    said = "; ".join(
        f"{p} " + (f"{q['mean_cosine']:.4f} and {q['relative_l2_error']:.3f}" if q in finite else "nothing finite")
        for p, q in qualities.items()
    )
    remedies = [f"{verb} {option}" for option, verb in missed.items()] + ["lower --min-int8-share"]
    return (
        f"{', '.join(missed) or '--min-int8-share'}: expected mean cosine {target['mean_cosine']:.12g} and relative L2 error "
        f"{target['relative_l2_error']:.12g} with at least {min_share:.0%} of the FLOPs in {precisions[0]}, "
        f"found at best {said} with {share:.0%}"
        f"{' in ' + format(max_minutes, 'g') + ' minutes' if found['time_was_over'] else ''}; "
        f"{' and '.join(precisions)} left as before; {' or '.join(remedies)}, or give more minutes or texts"
    )
