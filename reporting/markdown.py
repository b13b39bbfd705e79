"""Pieces of Markdown, and what every section says of a model and of a measurement.

A model is what report.py loads: {"title", "card", "slug", "machine", "folder"} and a record per file of
results/<slug>/<machine>/, None where that was not measured.
"""

import re
from math import floor, log10

NOT_MEASURED = "not measured"
OF_RECORD = "distilbert-base-uncased"
DETAILS = "tables.md"


def table(rows):
    """Markdown table of rows {heading: cell}; those that differ only in their first cell are one row: Q, K, V.

    A column of figures stands at the right, one of words at the left.
    """
    rows, groups = list(rows), {}
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    for row in rows:
        first, *rest = (str(row.get(heading, "")) for heading in headings)
        groups.setdefault(tuple(rest), []).append(first)
    figures = [any(re.match(r"\W*\d", cell) for cell in column) for column in zip(*groups, strict=True)]
    lines = [headings, ["-", *("-:" if right else "-" for right in figures)]]
    lines += [[", ".join(names), *rest] for rest, names in groups.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else f"{NOT_MEASURED.capitalize()}."


def listing(items, word="and"):
    """a, b and c; none"""
    *rest, end = map(str, items) if (items := list(items)) else ["none"]
    return f"{', '.join(rest)} {word} {end}" if rest else end


def number(value, form):
    """A number, or "not measured"."""
    return NOT_MEASURED if value is None else format(value, form)


def percent(value):
    """A share in percent with two significant digits: 0.034%, 6.7%, 120%."""
    if value is None:
        return NOT_MEASURED
    value *= 100
    return f"{value:.{max(0, 1 - floor(log10(abs(value))))}f}%" if value else "0%"


def share(value):
    """A share in percent with one decimal, of which 100.0% are all."""
    return f"{min(value, 0.999) if value < 1 else value:.1%}"


def interval(found):
    """0.9123 [0.8990, 0.9255]"""
    return "undefined" if found is None else f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def relative(model, name):
    """Path of a result as report.md links it."""
    return f"results/{model['slug']}/{model['machine']}/{name}"


def is_encoder(model):
    return model["card"].get("task", "embedding") == "embedding"


def sizes_of(environment):
    return f"{environment['cores']} cores, {environment['memory_gib']} GiB"


def machine_of(environment):
    """The machine in a few words."""
    e = environment
    gpu = f"{e['gpu']['name']}, driver {e['gpu']['driver']}" if e["gpu"] else "no GPU"
    return f"{e['cpu']}, {sizes_of(e)}, {gpu}"


def caption(*records):
    """One line: each machine, with the dates and the commits of what was measured there."""
    machines = {}
    for e in (record["environment"] for record in records):
        commit = f"commit {e['commit'][:10]}{' with changes' if e['dirty'] else ''}" if e["commit"] else "no commit"
        machines.setdefault(machine_of(e), {}).setdefault(e["utc"][:10], {})[commit] = True
    return " and ".join(
        "; ".join([machine, *(f"{date}; {listing(commits)}" for date, commits in sorted(dates.items()))])
        for machine, dates in machines.items()
    )


def on_gpu(record):
    """Whether TensorRT executed the models that are named after it."""
    return any(engine.startswith("TensorRT") for engine in record["server"]["engines"].values())
