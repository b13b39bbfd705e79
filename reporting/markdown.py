"""Pieces of Markdown, and what every section says of a model and of a measurement.

A model is what report.py loads: {"title", "card", "slug", "machine", "folder"} and a record per file of
results/<slug>/<machine>/, None where that was not measured.
"""

from math import floor, log10

NOT_MEASURED = "not measured"
OF_RECORD = "distilbert-base-uncased"
DETAILS = "tables.md"


def table(header, rows):
    """Markdown table; the first column is left aligned, the others right aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def columns(rows, spec):
    """Markdown table of {heading: what a row's cell is}; rows that differ only in their first cell are one."""
    return table(spec, fold([[cell(row) for cell in spec.values()] for row in rows]))


def fold(rows):
    """Rows that differ only in their first cell as one row: Q, K, V."""
    groups = {}
    for first, *rest in rows:
        groups.setdefault(tuple(rest), []).append(first)
    return [[", ".join(map(str, names)), *rest] for rest, names in groups.items()]


def listing(items, last="and"):
    """a, b and c; none"""
    *rest, end = map(str, items) if (items := list(items)) else ["none"]
    return f"{', '.join(rest)} {last} {end}" if rest else end


def number(value, form):
    """A number, or "not measured"."""
    return NOT_MEASURED if value is None else format(value, form)


def percent(value):
    """A share in percent with two significant digits: 0.034%, 6.7%, 120%."""
    if value is None:
        return NOT_MEASURED
    value *= 100
    return f"{value:.{max(0, 1 - floor(log10(abs(value))))}f}%" if value else "0%"


def relative(model, name):
    """Path of a result as report.md links it."""
    return f"results/{model['slug']}/{model['machine']}/{name}"


def is_encoder(model):
    return model["card"].get("task", "embedding") == "embedding"


def machine_of(environment):
    """The machine in a few words."""
    e = environment
    gpu = f"{e['gpu']['name']}, driver {e['gpu']['driver']}" if e["gpu"] else "no GPU"
    return f"{e['cpu']}, {e['cores']} cores, {e['memory_gib']} GiB, {gpu}"


def caption(record):
    """One line: machine, date, code."""
    e = record["environment"]
    commit = f"commit {e['commit'][:10]}{' with changes' if e['dirty'] else ''}" if e["commit"] else "no commit"
    return f"{machine_of(e)}; {e['utc'][:10]}; {commit}"


def on_gpu(record):
    """Whether TensorRT executed the models that are named after it."""
    return any(engine.startswith("TensorRT") for engine in record["server"]["engines"].values())
