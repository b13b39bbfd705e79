"""The marked blocks of report.md and README.md, and the tables of one model: which section stands where."""

from reporting import complexity, findings, quality, speed, verdicts
from reporting.markdown import NOT_MEASURED, relative

REPORT_ONLY = (
    "executed", "findings", "results", "embedders", "deviations", "complexity", "int8", "deploy", "plans", "environment",
)  # fmt: skip


def blocks(models):
    """{name: text} of every block."""
    record = findings.model_of_record(models)

    def of_record(kind, section, alt):
        """Sections of the model of record with its picture."""
        if not record:
            return [f"{alt}: {NOT_MEASURED}."]
        picture = [f"![{alt}]({relative(record, f'{kind}.png')})"] if record[kind] else []
        return [*section(record), *picture]

    parts = {
        "executed": [findings.executed(models)],
        "findings": [findings.findings(models)],
        "results": [findings.record_line(record), *findings.results(models)],
        "embedders": of_record("perf", speed.performance, "Throughput and latency against concurrency"),
        "deviations": of_record("quality", quality.deviations, "Share of texts against relative L2 error"),
        "complexity": of_record("complexity", complexity.summary, "Intensity and roofline of every kind of layer"),
        "int8": of_record("sensitivity", lambda _: [quality.searches(models)], "Quality against the share in INT8"),
        "deploy": verdicts.deploy(models),
        "plans": quality.plans(models),
        "environment": [findings.environments(models)],
        "summary": findings.summary(models),
    }
    parts["deviations"].append(quality.similarity(models))
    return {name: "\n\n".join(part) for name, part in parts.items()}


def details(model):
    """tables.md of one model on one machine."""
    perf = model["perf"]
    levels = (
        [speed.how_measured(perf), speed.noise_line(perf), speed.level_table(perf), speed.bare_table(perf)]
        if perf
        else []
    )
    sections = {
        "Deviations": [*quality.deviations(model), quality.similarity([model])]
        if model["quality"] or model["sts"]
        else [],
        "Every level": levels,
        "Complexity": [*complexity.summary(model), *complexity.details(model)] if model["complexity"] else [],
        "Search for INT8": quality.search(model) if model["sensitivity"] else [],
        "Plans": quality.plans([model]),
    }
    lead = f"# {model['title']}: every table\n\nWritten by `report.py` from the files beside it."
    return (
        "\n\n".join([lead, *(f"## {name}\n\n" + "\n\n".join(parts) for name, parts in sections.items() if parts)])
        + "\n"
    )
