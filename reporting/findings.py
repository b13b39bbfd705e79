"""What a reader should know first: what was executed, five findings, and the table of results."""

import re

from core.tables import EMBEDDERS, REFERENCE, TRITON_TENSORRT
from reporting import markdown as md
from reporting.complexity import least_us, precisions_of
from reporting.quality import EMULATED, averages, deviation
from reporting.speed import levels, noise_factor, noise_line, padding_line, tail
from reporting.verdicts import deployable

HUBS = {"hub": "the Hugging Face hub", "clearml": "ClearML", "wandb": "Weights & Biases", "mlflow": "MLflow"}
SHOWN = ("quality", "perf", "plans", "compile", "complexity", "sensitivity", "sts", "verdicts")
SHOWN += ("peers", "choice", "length", "limits", "generation", "soak", "recovery", "failover", "engines")
KINDS = (*SHOWN, "surface", "precisions", "ablation", "entities")  # computed or emulated: they tell no machine's worth


def rank(model):
    """Which machine's measurements of a model are shown: those on a GPU, then those with speeds, then the newest."""
    dates = [model[kind]["environment"]["utc"] for kind in SHOWN if model[kind]]
    return bool(model["perf"] and md.on_gpu(model["perf"])), bool(model["perf"]), max(dates, default="")


def best_of_each(models):
    """Each model once, on the machine that ranks highest; the others have their own tables."""
    ranked = sorted(models, key=rank)
    best = {model["slug"]: model["folder"] for model in ranked}
    return [model for model in models if model["folder"] == best[model["slug"]]]


def model_of_record(models):
    """The encoder that the report is about: DistilBERT, with its own weights and on a GPU where it was so measured."""

    def standing(model):
        card = model["card"]
        fixed = card.get("fixed_length", True)  # the task's own length
        return fixed, card["name"] == md.OF_RECORD, card["weights"] == "real", *rank(model)

    return max(filter(md.is_encoder, models), key=standing, default=None)


def record_line(model):
    """Which model stands for the task's, and what its weights are worth."""
    if model is None:
        return f"No encoder was measured: {md.OF_RECORD} is the model of record."
    card = model["card"]
    text = f"The model of record is **{model['title']}**"
    if card["name"] != md.OF_RECORD:
        text += f", in the place of {md.OF_RECORD}, which was not measured"
    if card["weights"] != "real":
        text += (
            f". Its weights are {card['weights']}, because those of the checkpoint were not at hand: its speed and its complexity "
            "are DistilBERT's own; its deviations show what the arithmetic does to a network whose activations are well "
            "behaved, not what it does to a trained one"
        )
    return f"{text}. {card['architecture']}, {card['parameters'] / 1e6:.1f} M parameters, {card['max_length']} tokens a text."


# --- what was executed ---------------------------------------------------------------


def executed(models):
    """What the authors executed, and what they never did, as far as the records say."""
    records = [model[kind] for model in models for kind in SHOWN if model[kind]]
    servers = [r["server"] for r in records if r.get("server")]
    engines = {e for s in servers for e in s.get("engines", {}).values()}
    engines |= {
        row["executed_by"] for m in models if m["engines"] for row in m["engines"]["rows"] if "error" not in row
    }
    versions = sorted({s["version"] for s in servers})
    cards = [m["card"] for m in models]
    origins = {}  # models of one origin are named together
    for card in cards:
        source = "pip package" if card["source"].startswith("pip package") else card["source"]
        origins.setdefault(f"(weights: {card['weights']}; {source})", {})[card["name"]] = None
    named = [f"{md.listing(names)} {origin}" for origin, names in origins.items()]
    sources = {c["source"] for c in cards} | {m["training"]["encoder"]["source"] for m in models if m["training"]}
    own = any(c["name"] == md.OF_RECORD and c["weights"] == "real" for c in cards)
    facts = {
        "anything on a GPU": any(r["environment"]["gpu"] for r in records) or any("GPU" in e for e in engines),
        "TensorRT plans": any(m["plans"] for m in models) or any(e.startswith("TensorRT") for e in engines),
        "Docker and the pinned image": set(versions) & TRITON_TENSORRT.keys()
        or any("--docker" in r["environment"]["argv"] for r in records),
        f"{md.OF_RECORD} with its own weights": own,
    }
    never = [what for what, found in facts.items() if not found]
    hubs = [name for prefix, name in HUBS.items() if not any(s.startswith(f"{prefix}:") for s in sources)]
    never += [f"a download from {md.listing(hubs, 'or')}"] if hubs else []
    return [
        f"**What the authors executed.** The models are {md.listing(named)}. What executed them was {named_engines(engines)}"
        f"{f', behind a Triton server of version {md.listing(versions)}' if versions else ''}. Everything was measured on "
        f"{named_machines(record['environment'] for record in records)}.",
        f"**What the authors never executed:** {md.listing(never)}.",
    ]


def named_engines(engines):
    """ONNX Runtime, OpenVINO and PyTorch (CPU)"""
    devices = {}
    for engine in sorted(engines):  # "OpenVINO, CPU, BF16"
        name, device, *_ = *engine.split(", "), "device unknown"
        devices.setdefault(device, {})[name] = None
    return md.listing(f"{md.listing(names)} ({device})" for device, names in devices.items())


def named_machines(environments):
    """AMD EPYC (family 25, models 1 and 17; 2 cores, 23.5 GiB, no GPU)"""
    machines = {}
    for e in environments:
        # an older record has the processor's name alone
        name, family, number = re.fullmatch(r"(.+?)(?:, (family \d+), model (\d+))?", e["cpu"]).groups()
        families = machines.setdefault((name, md.machine_of(e).removeprefix(f"{e['cpu']}, ")), {})
        if family:
            families.setdefault(family, set()).add(int(number))
    said = []
    for (name, rest), families in machines.items():
        kinds = [f"{f}, model{'s'[: len(ns) > 1]} {md.listing(sorted(ns))}" for f, ns in sorted(families.items())]
        said.append(f"{name} ({'; '.join([*kinds, rest])})")
    return md.listing(said)


# --- findings ------------------------------------------------------------------------


def findings(models):
    """Five findings, each of the data alone, or that it was not measured."""
    record = model_of_record(models)
    found = {
        "What FP16 changes": find_deviation(models, ("TRT_FP16", EMULATED)),
        "What INT8 changes": find_deviation(models, ("TRT_INT8", "TRT_BEST")),
        "What it brings here": find_speed(record),
        "What bounds a layer": find_bounds(record),
        "What may be deployed": find_deployable(models),
    }
    lines = (f"{i}. **{name}.** {text or md.NOT_MEASURED + '.'}" for i, (name, text) in enumerate(found.items(), 1))
    return "\n".join(lines)


def find_deviation(models, plans):
    """The relative L2 error of some plans for every encoder, and how much of INT8's is in INT8."""
    said = []
    for m in filter(md.is_encoder, models):
        found = {p.removeprefix("TRT_"): deviation(m, p) for p in plans}
        errors = md.listing(f"{md.percent(e)} in {p}" for p, e in found.items() if e is not None)
        written = (m["sensitivity"] or {}).get("int8_flops_share") if "INT8" in found else None
        inside = f", with {md.share(written)} of the FLOPs of its weight MatMuls in INT8" if written else ""
        if errors != "none":
            what = "it" if said else "the relative L2 error of the embeddings"
            said.append(f"For {m['title']}, {what} is {errors}{inside}.")
    return " ".join(said)


def common_concurrency(perf):
    """The concurrency that short tables show: 8, or the largest below it, or the smallest there is."""
    found = sorted({c for m, c in levels(perf) if m in EMBEDDERS})
    return max((c for c in found if c <= 8), default=found[0]) if found else None


def find_speed(model):
    perf = model and model["perf"]
    c = perf and common_concurrency(perf)
    base = c and levels(perf).get((REFERENCE, c))
    if not base:
        return ""
    factor, said = noise_factor(perf), []
    for key in (k for k in EMBEDDERS if k != REFERENCE and (k, c) in levels(perf)):
        ratio = levels(perf)[key, c]["throughput_infer_per_s"] / base["throughput_infer_per_s"]
        said.append(f"{key} {ratio:.2f}{'' if ratio > factor or ratio < 1 / factor else ' (within the noise)'}")
    worth = "" if md.on_gpu(perf) else " These are ratios of graphs on a CPU and say nothing about TensorRT."
    engines = md.listing(dict.fromkeys(perf["server"]["engines"].values()))
    return (
        f"At concurrency {c}, executed by {engines}, the throughput of {model['title']} as a multiple of {REFERENCE}'s is: "
        f"{', '.join(said)}. The noise is a factor of {factor:.2f}.{worth}"
    )


def find_bounds(model):
    record = model and model["complexity"]
    if not record:
        return ""
    gpu, largest = record["gpu"]["name"], max(record["kinds"], key=lambda k: k["share"])
    solved = {p: largest["precisions"][p]["threshold"] for p in precisions_of(record)}
    batches = (f"{found['batch'] or found['verdict']} in {p}" for p, found in solved.items() if found)
    text = (
        f"A text of {record['length']} tokens costs {model['title']} {record['totals']['flops'] / 1e9:.1f} GFLOPs. On {gpu}, by its "
        f"data sheet, arithmetic bounds {largest['kind']} ({largest['share']:.0%} of the FLOPs) from this batch on: {', '.join(batches)}."
    )
    least = {p: least_us(record, p, "8") for p in ("FP16", "INT8", "BEST")}
    if None in least.values():
        return text
    text += f" The least latency at batch 8 is {md.listing(f'{us:.0f} µs in {p}' for p, us in least.items())}."
    if least["INT8"] > least["FP16"]:
        text += " INT8's is above FP16's: FP32 stands around its products."
    return text


def find_deployable(models):
    parts = []
    for model in (m for m in models if m["verdicts"]):
        record, (passed, failed) = model["verdicts"], deployable(model["verdicts"])
        what = "it" if parts else "agreement with the original model in torch"
        parts.append(
            f"For {model['title']}, {what} is shown to be above {record['conclusion']['agreement']:.1%} "
            f"on {record['data']['count']} texts for {md.listing(passed)}{f'; it is not shown for {md.listing(failed)}' if failed else ''}."
        )
    return " ".join(parts)


# --- results -------------------------------------------------------------------------


def engine_of(model, key):
    """What executed an embedder; both where quality and speed were measured on different engines."""
    if key == EMULATED:
        return "ONNX Runtime, CPU"
    measured = [kind for kind in ("quality", "perf") if model[kind]]
    engines = {kind: model[kind]["server"]["engines"].get(key, md.NOT_MEASURED) for kind in measured}
    if len(set(engines.values())) > 1:
        return "; ".join(f"{kind}: {engine}" for kind, engine in engines.items())
    return next(iter(engines.values()), md.NOT_MEASURED)


def result_row(model, key, high):
    """One embedder: engine, quality, speed alone and under load."""
    row, found = averages(model).get(key, {}), levels(model["perf"])
    error = row.get("error") or md.percent(row.get("relative_l2_error"))
    cells = {
        "embedder": key,
        "executed by": engine_of(model, key),
        "relative L2 error": "reference" if key == REFERENCE else error,
        "mean cosine": "reference" if key == REFERENCE else md.number(row.get("mean_cosine"), ".5f"),
    }
    if key == EMULATED:  # no server has it
        return cells
    for c in (1, high):
        cells[f"texts/s, concurrency {c}"] = md.number(found.get((key, c), {}).get("throughput_infer_per_s"), ".1f")
    level = found.get((key, high))
    latency = f"{level['latency_p50_ms']:.1f} / {tail(level)}" if level else md.NOT_MEASURED
    return cells | {f"p50 / p99 ms, concurrency {high}": latency, "n": level["n"] if level else ""}


def result_table(model):
    """The table of one encoder."""
    high = (model["perf"] and common_concurrency(model["perf"])) or 8
    keys = [*EMBEDDERS, EMULATED] if EMULATED in averages(model) else EMBEDDERS
    caption = md.caption(*(model[kind] for kind in ("quality", "perf") if model[kind]))
    return [f"**{model['title']}**. {caption}.", md.table(result_row(model, key, high) for key in keys)]


def results(models, everything):
    """A table of every encoder, with its noise; the model of record first. everything: also those at dynamic length."""
    record, parts = model_of_record(models), []
    for model in sorted(filter(md.is_encoder, models), key=lambda m: m is not record):
        parts += result_table(model)
        if model["perf"]:
            parts.append(noise_line(model["perf"]))
        parts += [padding_line(m) for m in everything if m["padded"] and m["padded"]["slug"] == model["slug"]]
        parts.append(f"[All its tables]({md.relative(model, md.DETAILS)}).")
    return parts or [f"Results of an encoder: {md.NOT_MEASURED}."]


def summary(models):
    """The model of record's table and a line on the rest, for the README."""
    record = model_of_record(models)
    others = dict.fromkeys(m["title"] for m in models if m is not record)
    rest = f"[report.md](report.md) has the findings{f', and also {md.listing(others)}' if others else ''}."
    return [*(result_table(record) if record else [record_line(record)]), rest]
