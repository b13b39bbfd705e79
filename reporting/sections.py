"""The marked blocks of report.md and README.md, and the tables of one model: which section stands where."""

from reporting import (
    complexity,
    engines,
    findings,
    length,
    limits,
    peers,
    quality,
    services,
    speed,
    survived,
    targets,
    thresholds,
    verdicts,
)
from reporting.markdown import NOT_MEASURED, listing, relative, sizes_of


def blocks(models):
    """{name: text} of every block; a model that several machines measured is shown on one."""
    everything = models
    models = findings.best_of_each([m for m in models if not m["padded"]])  # at dynamic length: tables of its own
    record = findings.model_of_record(models)

    def of_record(kind, alt, section):
        """What the model of record shows of a kind of measurement, with its picture."""
        if not record or not record[kind]:
            return [f"{alt}: {NOT_MEASURED}."]
        return [*section(record), f"![{alt}]({relative(record, f'{kind}.png')})"]

    parts = {
        "executed": findings.executed(everything),
        "findings": [findings.findings(models)],
        "results": [
            findings.record_line(record),
            *findings.results(models, everything),
            *elsewhere(everything, models),
        ],
        "embedders": of_record("perf", "Throughput and latency against concurrency", speed.performance),
        "deviations": [
            *of_record("quality", "Share of texts against relative L2 error", quality.deviations),
            *quality.similarity([m for m in models if m["sts"] and m["sts"]["pairs"]] or models),
        ],
        "complexity": of_record("complexity", "Roofline of every kind of layer", complexity.summary),
        "int8": quality.kept(models),
        "deploy": verdicts.deploy(models),
        "services": services.services(models) + engines.summary(models),
        "survived": survived.survived(everything),
        "peers": peers.peers(models) + targets.summary(models),
        "plans": quality.plans(models),
        "summary": findings.summary(models),
    }
    texts = {name: "\n\n".join(part) for name, part in parts.items()}
    return {name: text if name == "executed" else without_sizes(text, everything) for name, text in texts.items()}


def without_sizes(text, models):
    """A text that names machines by processor and GPU alone: cores, memory and the lack of a GPU stand in the first block."""
    for e in (model[kind]["environment"] for model in models for kind in findings.KINDS if model[kind]):
        text = text.replace(f", {sizes_of(e)}{'' if e['gpu'] else ', no GPU'}", "")
    return text


def elsewhere(everything, shown):
    """What other machines measured too: links to their folders."""
    others = [m for m in everything if m["folder"] not in [s["folder"] for s in shown] and not m["padded"]]
    links = dict.fromkeys(f"[{m['title']}](results/{m['slug']})" for m in others)
    return [f"Other machines measured {listing(links)} too."] if links else []


def details(model):
    """tables.md of one model on one machine."""
    sections = (
        ("quality", "Deviations", quality.deviations),
        ("sts", "Last hidden state", lambda m: quality.similarity([m])),
        ("perf", "Every level", speed.details),
        ("peers", "Targets", targets.details),
        ("verdicts", "Verdicts", verdicts.details),
        ("peers", "Peers", peers.details),
        ("limits", "Limits", limits.details),
        ("choice", "Engine and precision on this CPU", services.details),
        ("engines", "Engines through the server", engines.details),
        ("generation", "Generated tokens", services.generation),
        ("length", "Cost over length", length.details),
        ("soak", "What it survived", survived.details),
        ("complexity", "Complexity", lambda m: complexity.summary(m) + complexity.details(m)),
        ("complexity", "Measured on a GPU", thresholds.measured),
        ("precisions", "Every precision", thresholds.precisions),
        ("entities", "Entities", quality.entities),
        ("ablation", "What keeps INT8 close", quality.ablation),
        ("sensitivity", "Search for INT8", quality.search),
    )
    parts = [
        f"# {model['title']} on {model['machine']}: every table",
        "Written by `report.py` from the files beside it.",
    ]
    for kind, heading, section in sections:
        parts += [f"## {heading}", *section(model)] if model[kind] else []
    return "\n\n".join([*parts, "## Plans", *quality.plans([model])]) + "\n"
