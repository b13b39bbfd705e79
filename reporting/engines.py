"""The section on engines: what a service costs and answers on each of them, and which one serves what on this machine."""

import statistics

from core.tables import ENGINES
from reporting.markdown import caption, interval, listing, percent, table
from reporting.peers import span


def name_of(row):
    return f"{ENGINES[row['engine']].title}, {row['precision']}"


def speed(row, concurrency):
    """Median texts/s."""
    return row["levels"][concurrency]["texts_per_s"]["median"]


def candidate(row, base):
    """One engine and precision; base: the row of ONNX Runtime in FP32."""
    if "error" in row:
        return {"engine, precision": name_of(row), "executed by": f"not measured: {row['error']}"}
    agreement = row.get("agreement")
    cells = {"engine, precision": name_of(row), "relative L2 error": percent(row["relative_l2_error"])}
    cells["agreement"] = interval(agreement) if agreement else ""
    cells["holds"] = "yes" if row["holds"] else "no"
    for concurrency, level in row["levels"].items():
        cells[f"texts/s, concurrency {concurrency}"] = span(level["texts_per_s"], ".1f")
        cells[f"× {name_of(base)}, {concurrency}"] = f"{speed(row, concurrency) / speed(base, concurrency):.2f}"
    cells["MiB"] = f"{row['memory_mib']:.0f}"
    cells["s to the first answer"] = f"{row['start_s'][0]:.1f} first, {statistics.median(row['start_s']):.1f} median"
    return cells | {"executed by": row["executed_by"]}


def rejected(model):
    """{(engine, precision)} whose answers did not hold where the choice was made, mostly on more texts than here."""
    rows = model["choice"]["rows"] if model["choice"] else ()
    return {(row["engine"], row["precision"]) for row in rows if not row["holds"]}


def choices(rows, base, refused):
    """For each wish the engine that fulfils it best, and by how much: of those whose answers hold."""
    passing = [row for row in rows if row.get("holds") and (row["engine"], row["precision"]) not in refused]
    exact = [row for row in passing if row["precision"] == "FP32"]
    lone, *_, together = base["levels"]
    wishes = (
        (f"most texts/s, {together} together", passing, lambda row: -speed(row, together)),
        ("most texts/s, one at a time", passing, lambda row: -speed(row, lone)),
        (f"the same in FP32, {together} together", exact, lambda row: -speed(row, together)),
        ("least memory", passing, lambda row: row["memory_mib"]),
        ("earliest first answer", passing, lambda row: statistics.median(row["start_s"])),
    )
    for wish, among, cost in wishes:
        best = min(among, key=cost)
        ratio = cost(best) / cost(base)
        why = f"{ratio:.2f} × {name_of(base)}" if best is not base else "no other is better"
        yield {"wanted": wish, "engine, precision": name_of(best), "why": f"{abs(cost(best)):.1f}: {why}"}


def details(model):
    """The candidates, and which one serves what."""
    record = model["engines"]
    rows, settings = record["rows"], record["settings"]
    base = rows[0]
    windows = listing(f"{n} requests at concurrency {c}" for c, n in settings["requests"].items())
    lead = (
        f"The whole service through its server, model by model, one server at a time: {settings['rounds']} rounds, in each of "
        f"them every candidate once, {windows}. The median, and the lowest and the highest round. Deviations are those of "
        f"the graph's own output from ONNX Runtime in FP32 on {record['texts']['compared']} of {record['texts']['file']}. "
        f"{caption(record)}."
    )
    return [lead, table(candidate(row, base) for row in rows), *which(model)]


def which(model, short=False):
    """Which engine serves what; nothing where the base was not measured."""
    record, rows = model["engines"], model["engines"]["rows"]
    if "error" in rows[0] or not rows[0]["holds"]:
        return []
    lead = (
        f"Model by model through the server, of the engines whose answers hold on {record['texts']['compared']} texts"
        f"{' and in the choice above' if model['choice'] else ''}, these serve {model['title']} best here:"
    )
    found = list(choices(rows, rows[0], rejected(model)))
    return [lead, table(found[:2] + found[3:4] if short else found)]


def summary(models):
    """Most texts/s and least memory of every model that was measured, for the report."""
    return [part for m in models if m["engines"] for part in which(m, short=True)]
