"""The table of targets of a classifier's service: what was aimed at, what was measured, and whether it is met."""

from collections import namedtuple

from core.engines import TITLES
from reporting import measures
from reporting.markdown import NOT_MEASURED, table
from reporting.measures import (
    AGREEMENT,
    BY_HAND,
    LEVELS,
    PUBLISHED,
    carried,
    chosen,
    fp32,
    of_fp32,
    of_int8,
    the_chosen,
    to_rival,
    unserved,
)

# bounds: [(least or None, most or None)], one for each number; at_best: what this machine allows, a function as measure
Target = namedtuple("Target", "what bounds measure at_best", defaults=(None,))


def least(*values):
    return [(value, None) for value in values]


def most(*values):
    return [(None, value) for value in values]


TARGETS = (
    Target("the chosen engine and precision ÷ the best published peer", least(2.0, 2.5, 3.0), to_rival(the_chosen, PUBLISHED), unserved(to_rival(the_chosen, PUBLISHED), chosen)),
    Target("FP32 ÷ the best published peer", least(1.9, 1.7, 1.8), to_rival(fp32, PUBLISHED), unserved(to_rival(fp32, PUBLISHED), of_fp32)),
    Target("FP32 ÷ a server that batches by hand", least(1.0, 1.4, 1.5), to_rival(fp32, BY_HAND), unserved(to_rival(fp32, BY_HAND), of_fp32)),
    Target("FP32: served ÷ bare", least(0.80, 0.75, 0.85), measures.served_to_bare(of_fp32), carried(of_fp32)),
    Target("the chosen: served ÷ bare", least(0.80, 0.75, 0.85), measures.served_to_bare(chosen), carried(chosen)),
    Target(f"INT8 with an agreement of at least {AGREEMENT} ÷ FP32 served model by model", least(1.4, 3.0, 4.0), measures.to_ensemble, unserved(measures.to_ensemble, of_int8)),
    Target("mean executed batch, texts", least(1, 2.3, 7), measures.mean_batch),
    Target("FP32 / the chosen: positions computed ÷ tokens, concurrency 32", most(1.10, 1.10), measures.positions),
    Target("FP32: p99 at concurrency 8 ÷ the best published peer's", most(0.6), measures.tail(fp32)),
    Target("the chosen: p99 at concurrency 8 ÷ the best published peer's", most(0.6), measures.tail(the_chosen)),
    Target("bare FP32 ÷ the fastest GEMM", least(0.70), measures.to_roof("FP32")),
    Target("bare INT8 ÷ the fastest GEMM in INT8", least(0.40), measures.to_roof("INT8")),
    Target("sentence embeddings ÷ sentence-transformers in ONNX Runtime / OpenVINO", least(1.3, 1.0), measures.embeddings),
    Target("FP32: s from start to first answer / MiB idle", most(3, 300), measures.start_and_memory(fp32)),
    Target("the chosen: s from start to first answer / MiB idle", most(3, 300), measures.start_and_memory(the_chosen)),
    Target("FP32: throughput at overload ÷ the best level's", least(0.95), measures.overload(of_fp32)),
    Target("the chosen: throughput at overload ÷ the best level's", least(0.95), measures.overload(chosen)),
    Target("growth of a text's time ÷ of its FLOPs", [(0.9, 1.1)], measures.length),
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
    limit = target.at_best(model) if target.at_best else []
    return {
        "what": target.what,
        "target": in_words(target.bounds),
        "measured": show(found, target.bounds),
        "met": " / ".join(verdicts) if len(set(verdicts)) > 1 else verdicts[0],
        "at best": " / ".join(
            "–" if v is None else figure(v, *ends) for v, ends in zip(limit, target.bounds, strict=False)
        )
        if any(limit)
        else "",
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
        f"{choice_line(model)} Ratios are medians over rounds. A share of the fastest GEMM counts the FLOPs of real tokens. "
        "At best: as if serving cost nothing, beside the bare engine on the same batches; for served ÷ bare alone, as if a "
        "text took no more than its code in one process and a refused request on its way."
    )
    return [lead, table(row(target, model) for target in TARGETS)]
