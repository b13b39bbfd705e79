"""The table of targets of a classifier's service: what was aimed at, what was measured, and whether it is met."""

import statistics
from collections import namedtuple

from core.engines import TITLES
from reporting.length import growth
from reporting.markdown import NOT_MEASURED, table
from reporting.peers import OWN, RIVALS, best, versus

LEVELS = (1, 8, 32)
AGREEMENT = 0.994  # of INT8: below, its speed meets no target
PUBLISHED, BY_HAND = RIVALS
ONNX, OPENVINO = "ONNX Runtime, FP32", ("OpenVINO, FP32", "OpenVINO, its default precision")


# --- finding what was measured -------------------------------------------------------


def chosen(model):
    """(engine, precision) of the choice; None where there is none."""
    record = model["choice"]
    return record and (record["chosen"]["engine"], record["chosen"]["precision"])


def systems(model):
    """[entries of the project's services that were measured beside peers], HTTP only."""
    return [s for s in (model["peers"] or {"systems": []})["systems"] if s["kind"] in OWN and s["levels"] and "gRPC" not in s["name"]]  # fmt: skip


def served_as(model, pair):
    """Name of the system that an engine and precision answers in; None where it was not measured beside peers."""
    begin = pair and f"{TITLES[pair[0]]}, {pair[1]},"
    return next((s["name"] for s in systems(model) if begin and s.get("executed_by", "").startswith(begin)), None)


def fp32(model):
    """The base of the ratios, which is FP32."""
    return model["peers"] and model["peers"]["settings"]["base"]


def model_by_model(model):
    return next((s["name"] for s in systems(model) if s.get("executed_by") == "model by model"), None)


def int8(model):
    """Name of the fastest system in INT8 among those whose agreement is high enough; None without any."""
    rows = [r for r in (model["choice"] or {"rows": []})["rows"] if r["precision"] == "INT8" and "agreement" in r]
    names = [served_as(model, (r["engine"], "INT8")) for r in rows if r["agreement"]["value"] >= AGREEMENT]
    speeds = {s["name"]: max(level["texts_per_s"]["median"] for level in s["levels"].values()) for s in systems(model)}
    return max(filter(None, names), key=speeds.get, default=None)


def limits_of(model, pair):
    """The entry of an engine and precision in limits.json; {} without one."""
    rows = (model["limits"] or {"services": []})["services"]
    return next((r for r in rows if pair and (r["engine"], r["precision"]) == tuple(pair) and "levels" in r), {})


# --- one function for each kind of row -----------------------------------------------


def to_rival(name_of, kind):
    """Throughput ÷ that of the best of a kind, in the same rounds."""

    def measure(model):
        name = name_of(model)
        rivals = [name and best(model["peers"], kind, c) for c in LEVELS]
        return [
            middle(rival and versus(model["peers"], name, rival, c)) for c, rival in zip(LEVELS, rivals, strict=True)
        ]

    return measure


def to_ensemble(model):
    name, base = int8(model), model_by_model(model)
    return [middle(versus(model["peers"], name, base, c)) if name and base else None for c in LEVELS]


def served_to_bare(pair_of):
    return lambda model: [
        middle(limits_of(model, pair_of(model)).get("levels", {}).get(str(c), {}).get("served_to_bare")) for c in LEVELS
    ]


def mean_batch(model):
    levels = next((s["levels"] for s in systems(model) if s["name"] == fp32(model)), {})
    return [levels.get(str(c), {}).get("mean_batch_size") for c in LEVELS]


def positions(model):
    rows = (limits_of(model, pair).get("levels", {}).get(str(LEVELS[-1])) for pair in (FP32_PAIR, chosen(model)))
    return [row and row["positions_per_token"] for row in rows]


def tail(name_of):
    """p99 at concurrency 8 ÷ that of the published peer with the highest throughput there."""

    def measure(model):
        record, name = model["peers"], name_of(model)
        rival = name and best(record, PUBLISHED, 8)
        found = {
            s["name"]: s["levels"].get("8", {}).get("latency_p99_ms") for s in (record or {"systems": []})["systems"]
        }
        pair = (found.get(name), found.get(rival))
        return [pair[0] / pair[1] if all(pair) else None]

    return measure


def to_roof(precision):
    """Bare texts/s × the FLOPs of a text, without padding, ÷ the fastest GEMM in that precision."""

    def measure(model):
        record = model["limits"]
        speeds = [
            level["bare_texts_per_s"]["median"]
            for row in (record or {"services": []})["services"]
            if row["precision"] == precision
            for level in row.get("levels", {}).values()
        ]
        roof = record and record["roofs_flops_per_s"].get(precision)
        return [max(speeds) * record["flops_per_text"] / roof if speeds and roof else None]

    return measure


def embeddings(model):
    """The project's fastest service of sentence embeddings ÷ sentence-transformers in ONNX Runtime, in OpenVINO."""
    rows = {
        r["name"]: r["texts_per_s"]["median"]
        for r in (model["peers"] or {"embeddings": []})["embeddings"]
        if "error" not in r
    }
    own = max((speed for name, speed in rows.items() if name.startswith("project")), default=None)
    rivals = [
        max((rows.get(f"sentence-transformers: {n}", 0) for n in names), default=0) for names in ((ONNX,), OPENVINO)
    ]
    return [own / rival if own and rival else None for rival in rivals]


def start_and_memory(name_of):
    def measure(model):
        found = next((s for s in systems(model) if s["name"] == name_of(model)), {})
        return [statistics.median(found["start_s"]) if "start_s" in found else None, found.get("memory_idle_mib")]

    return measure


def overload(pair_of):
    return lambda model: [middle(limits_of(model, pair_of(model)).get("overload", {}).get("to_best_level"))]


def length(model):
    _, times, flops = growth(model["length"])[-1] if model["length"] else (0, None, None)
    return [times and times / flops]


def middle(found):
    return found and found["median"]


# --- the table -----------------------------------------------------------------------

FP32_PAIR = ("onnxruntime", "FP32")
INT8_PAIR = ("openvino", "INT8")
# bounds: [(least or None, most or None)], one for each number; pair_of: whose bare speed bounds the numbers
Target = namedtuple("Target", "what bounds measure pair_of", defaults=(None,))


def least(*values):
    return [(value, None) for value in values]


def most(*values):
    return [(None, value) for value in values]


def the_chosen(model):
    """Name of the system that serves what was chosen."""
    return served_as(model, chosen(model))


TARGETS = (
    Target("the chosen engine and precision ÷ the best published peer", least(2.0, 2.5, 3.0), to_rival(the_chosen, PUBLISHED), chosen),
    Target("FP32 ÷ the best published peer", least(1.9, 1.7, 1.8), to_rival(fp32, PUBLISHED), lambda _: FP32_PAIR),
    Target("FP32 ÷ a server that batches by hand", least(1.0, 1.4, 1.5), to_rival(fp32, BY_HAND), lambda _: FP32_PAIR),
    Target("FP32: served ÷ bare", least(0.80, 0.75, 0.85), served_to_bare(lambda _: FP32_PAIR)),
    Target("the chosen: served ÷ bare", least(0.80, 0.75, 0.85), served_to_bare(chosen)),
    Target(f"INT8 with an agreement of at least {AGREEMENT} ÷ FP32 served model by model", least(1.4, 3.0, 4.0), to_ensemble, lambda _: INT8_PAIR),
    Target("mean executed batch, texts", least(1, 2.3, 7), mean_batch),
    Target("FP32 / the chosen: positions computed ÷ tokens, concurrency 32", most(1.10, 1.10), positions),
    Target("FP32: p99 at concurrency 8 ÷ the best published peer's", most(0.6), tail(fp32)),
    Target("the chosen: p99 at concurrency 8 ÷ the best published peer's", most(0.6), tail(the_chosen)),
    Target("bare FP32 ÷ the fastest GEMM", least(0.70), to_roof("FP32")),
    Target("bare INT8 ÷ the fastest GEMM in INT8", least(0.40), to_roof("INT8")),
    Target("sentence embeddings ÷ sentence-transformers in ONNX Runtime / OpenVINO", least(1.3, 1.0), embeddings),
    Target("FP32: s from start to first answer / MiB idle", most(3, 300), start_and_memory(fp32)),
    Target("the chosen: s from start to first answer / MiB idle", most(3, 300), start_and_memory(the_chosen)),
    Target("FP32: throughput at overload ÷ the best level's", least(0.95), overload(lambda _: FP32_PAIR)),
    Target("the chosen: throughput at overload ÷ the best level's", least(0.95), overload(chosen)),
    Target("growth of a text's time ÷ of its FLOPs", [(0.9, 1.1)], length),
)  # fmt: skip


def in_words(bounds):
    """≥ 1.9 / 1.7 / 1.8; ≤ 0.6; 0.9 to 1.1: the bounds of a row, which are of one kind"""
    lows, highs = (" / ".join(f"{end:g}" for end in ends if end is not None) for ends in zip(*bounds, strict=True))
    return f"{lows} to {highs}" if lows and highs else f"≥ {lows}" if lows else f"≤ {highs}"


def met(value, low, high):
    if value is None:
        return NOT_MEASURED
    return "yes" if (low is None or value >= low) and (high is None or value <= high) else "no"


def figure(value, low, high):
    """With two decimals, or with three where two would tell another verdict: 0.897 of at least 0.9."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.{2 if met(round(value, 2), low, high) == met(value, low, high) else 3}f}"


def show(values, bounds):
    """2.45 / 1.80 / not measured"""
    figures = [figure(value, *ends) for value, ends in zip(values, bounds, strict=True)]
    return " / ".join(figures) if any(values) else NOT_MEASURED


def row(target, model):
    found = target.measure(model)
    verdicts = [met(value, *ends) for value, ends in zip(found, target.bounds, strict=True)]
    limit = ""
    if target.pair_of and any(found):
        shares = served_to_bare(target.pair_of)(model)
        limit = show([v and share and v / share for v, share in zip(found, shares, strict=True)], target.bounds)
    return {
        "what": target.what,
        "target": in_words(target.bounds),
        "measured": show(found, target.bounds),
        "met": " / ".join(verdicts) if len(set(verdicts)) > 1 else verdicts[0],
        "if serving cost nothing": limit,
    }


def summary(models):
    """How many of the targets are met, and their table in short, for the report."""
    parts = []
    for model in (m for m in models if m["peers"] and m["limits"]):
        found = [v for target in TARGETS for v in map(met, target.measure(model), *zip(*target.bounds, strict=True))]
        lead = (
            f"Of the {len(found)} targets of {model['title']}, {found.count('yes')} are met; bold figures miss theirs."
        )
        parts.append(f"{lead} {choice_line(model)}\n\n{table(short_rows(model))}")
    return parts


def short_rows(model):
    """The rows without what they would be if serving cost nothing; FP32 and the chosen in one where both have a row."""
    rows = {}
    for target in TARGETS:
        whose, _, what = target.what.rpartition(": ")
        found = zip(target.measure(model), target.bounds, strict=True)
        figures = [f"**{figure(v, *ends)}**" if met(v, *ends) == "no" else figure(v, *ends) for v, ends in found]
        shown = " / ".join(figures if set(figures) != {NOT_MEASURED} else [NOT_MEASURED])
        rows.setdefault((what, in_words(target.bounds)), {})[whose] = shown
    for (what, bounds), found in rows.items():
        whose = " / ".join(filter(None, found))
        yield {"what": f"{whose}: {what}" if whose else what, "target": bounds, "measured": "; ".join(found.values())}


def choice_line(model):
    """What "the chosen" is in the table, and how a row with three figures is read."""
    pair = chosen(model)
    found = f"{TITLES[pair[0]]}, {pair[1]}" if pair else NOT_MEASURED
    return f"The chosen is {found}. Three figures in a row are those of concurrency {' / '.join(map(str, LEVELS))}."


def details(model):
    """The table, for a classifier that was measured beside its peers."""
    lead = (
        f"{choice_line(model)} Ratios are medians over rounds. Serving costs what the bare engine, on the same batches, is "
        "faster. A share of the fastest GEMM counts the FLOPs of real tokens."
    )
    return [lead, table(row(target, model) for target in TARGETS)]
