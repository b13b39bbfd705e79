"""What the table of targets shows: each number from the records of one model, None where it was not measured.

A function that measures takes the model, as markdown.py tells of it, and returns a list: a number, or one for each
concurrency.
"""

import statistics

from core.engines import TITLES
from reporting.length import growth
from reporting.peers import OWN, RIVALS, best, versus

LEVELS = (1, 8, 32)
AGREEMENT = 0.994  # of INT8: below, its speed meets no target
FP32_PAIR = ("onnxruntime", "FP32")
INT8_PAIR = ("openvino", "INT8")
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


def of_fp32(model):
    return FP32_PAIR


def of_int8(model):
    return INT8_PAIR


def the_chosen(model):
    """Name of the system that serves what was chosen."""
    return served_as(model, chosen(model))


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


def unserved(measure, pair_of):
    """Throughputs as they would be if serving cost nothing beside the bare engine on the same batches."""

    def bound(model):
        shares = served_to_bare(pair_of)(model)
        return [value and share and value / share for value, share in zip(measure(model), shares, strict=True)]

    return bound


def carried(pair_of):
    """served ÷ bare of a text alone, if it took what its code takes in one process and a refused request on its way."""

    def bound(model):
        level = limits_of(model, pair_of(model)).get("levels", {}).get("1", {})
        if "refused_ms" not in level:
            return [None] * len(LEVELS)
        least_ms = middle(level["in_process_ms"]) + middle(level["refused_ms"])
        return [1000 / middle(level["bare_texts_per_s"]) / least_ms, *[None] * (len(LEVELS) - 1)]

    return bound


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
