"""How many replicas a load needs, and how many machine hours a job takes: answers from measurements, each a line.

A record that was not measured is None; its answer says so, and which command measures it.
"""

import math
import statistics

from core.files import read_json
from core.tables import SERVED
from reporting.markdown import NOT_MEASURED, caption, listing
from reporting.records import read_record
from reporting.speed import levels
from roofline.model import PRACTICAL_BATCH, fuse, least_time

KINDS = ("perf", "length", "peers", "embed", "complexity")
SPARE = 1  # replicas, for one that is down or exchanged
KEPT_UP = 0.9  # of the rate asked for: below, the queue at the end of a window is more than a tenth of it
MEASURE_RATES = "./perf.py --rates"
MEASURE_LENGTH = "python -m bench.length"


def number(value):
    """A number for a reader: 30,222, 57.9, 0.12."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


# --- records -------------------------------------------------------------------------


def read_records(folder):
    """{kind: record} of the export that the first of KINDS is of; None where there is none, or one of another.

    complexity.json needs only the same weights, also of another folder of the results.
    """
    records = {kind: read_record(folder / f"{kind}.json") for kind in KINDS}
    card = card_of(records)
    for kind in ("length", "peers", "embed"):
        if records[kind] and records[kind]["model"].get("reference_sha256") != card.get("reference_sha256"):
            records[kind] = None
    if not records["complexity"] and (weights := card.get("weights_sha256")):
        counted = (read_json(path, "count again") for path in sorted(folder.parent.parent.glob("*/*/complexity.json")))
        records["complexity"] = next((r for r in counted if r["model"].get("weights_sha256") == weights), None)
    return records


def card_of(records):
    return next(record["model"] for record in records.values() if record)


def describe_source(records, served):
    """What was measured, on which machine."""
    perf, name = records["perf"], card_of(records)["name"]
    if not perf:
        return f"measured: {name}; {caption(next(filter(None, records.values())))}"
    server, settings = perf["server"], perf["settings"]
    by = (
        server.get("executed_by") or server["engines"].get(served) or listing(dict.fromkeys(server["engines"].values()))
    )
    return (
        f"measured: {served} of {name}, {settings['inputs']}, {settings['batch_size']} a request, {by}"
        f"{', in a quick run' if perf['quick'] else ''}; {caption(perf)}"
    )


# --- requests ------------------------------------------------------------------------


def rates_of(records, served):
    """Measured rates of a model, the lowest first."""
    rows = [row for row in (records["perf"] or {}).get("rates", ()) if row["model"] == served]
    return sorted(rows, key=lambda row: row["asked_requests_per_s"])


def answered(row):
    """Requests per second that were answered."""
    return row["throughput_infer_per_s"] / row["batch_size"]


def why_not(row, p99_ms):
    """Why a rate does not meet the target, in words; "" where it does."""
    if "error" in row:
        return f"refused: {row['error']}"
    if row["latency_p99_ms"] is None:
        return "too few requests for a p99"
    if row["lost"]:
        return "requests were lost"
    if answered(row) < KEPT_UP * row["asked_requests_per_s"]:
        return "fell behind, or the window was too short"
    return "" if row["latency_p99_ms"] <= p99_ms else "p99 is too high"


def highest_rate(rates, p99_ms):
    """The last row up to which every rate meets the target; None where the lowest does not."""
    best = None
    for row in rates:
        if why_not(row, p99_ms):
            break
        best = row
    return best


def describe_rates(rates, p99_ms):
    """A table of the rates, with whether each meets the target."""
    yield "  asked/s  answered/s    p50 ms    p95 ms    p99 ms  queue ms  mean batch        n  lost"
    for row in rates:
        reason, asked = why_not(row, p99_ms), f"{row['asked_requests_per_s']:9.1f}"
        if "error" in row:
            yield f"{asked}  {reason}"
            continue
        p99 = "" if row["latency_p99_ms"] is None else f"{row['latency_p99_ms']:.1f}"
        batch = f"{row['mean_batch_size']:.2f}" if "mean_batch_size" in row else ""
        yield (
            f"{asked}  {answered(row):10.1f}  {row['latency_p50_ms']:8.1f}  {row['latency_p95_ms']:8.1f}  {p99:>8}  "
            f"{row['server_queue_ms']:8.1f}  {batch:>10}  {row['n']:7}  {row['lost']:4}  {reason or 'meets it'}"
            f"{'' if row['stable'] else ', unstable'}"
        )


def refusal(rates, served, p99_ms):
    """What is said where no rate meets the target: the nearest, and what may help."""
    if not rates:
        return f"rates of {served}: expected some, found them {NOT_MEASURED}; {MEASURE_RATES} measures them"
    measured = [row for row in rates if row.get("latency_p99_ms") is not None]
    if near := min(measured, key=lambda row: row["latency_p99_ms"], default=None):
        found = f"the nearest has {near['latency_p99_ms']:.1f} ms at {near['asked_requests_per_s']:.1f} requests/s: {why_not(near, p99_ms)}"
    else:
        found = "no p99 was measured, which takes a run without --quick"
    return (
        f"--p99-ms {p99_ms:g}: expected a rate that meets it, found none; {found}; measure lower shares "
        f"({MEASURE_RATES} 0.1 0.2), a faster machine or precision, or shorter texts"
    )


def describe_replicas(row, needed, peak):
    """How many replicas, from the highest rate that meets the target."""
    return (
        f"replicas: {needed + SPARE}: {number(peak)} requests/s at the peak ÷ {number(answered(row))} of one, rounded up, "
        f"and {SPARE} to spare"
    )


def replicas_needed(row, peak):
    """Without the spare."""
    return math.ceil(peak / answered(row))


def measured_start(records):
    """(seconds from a start to the first right answer, its service's name) in peers.json, or None.

    Of the service that the rates are of where it was measured there, else of the one to which ratios are.
    """
    peers, perf = records["peers"], records["perf"] or {"server": {}}
    if not peers:
        return None
    started = [system for system in peers["systems"] if system.get("start_s")]
    same = [s for s in started if s.get("executed_by") and s["executed_by"] == perf["server"].get("executed_by")]
    base = [s for s in started if s["name"] == peers["settings"]["base"]]
    return next(((statistics.median(s["start_s"]), s["name"]) for s in (*same, *base)), None)


def describe_start(found, share):
    """What the time from a replica's start to its first answer costs. share: its requests per second at the peak."""
    if found is None:
        return f"start of a replica: {NOT_MEASURED}; bench/peers.py measures a classifier's, or say it with --start-s"
    seconds, source = found
    return (
        f"start of a replica: {seconds:.1f} s ({source}), without an image's and a machine's own; "
        f"{number(share * seconds)} requests come for it meanwhile at the peak"
    )


def describe_lengths(length):
    """What a longer text costs, a line for each length."""
    if not length:
        return [f"longer texts: {NOT_MEASURED}; {MEASURE_LENGTH} measures them"]
    first, lines = length["rows"][0], [f"longer texts, one at a time, {length['executed_by']}:"]
    for row in length["rows"]:
        median = row["seconds"]["median"]
        lines.append(f"  {row['tokens']:4} tokens {1000 * median:9.1f} ms, × {median / first['seconds']['median']:.2f}")
    return lines


# --- texts once ----------------------------------------------------------------------


def hours(seconds):
    return f"{number(seconds / 3600):>10} machine hours"


def bulk(records, served, texts):
    """Machine hours for so many texts, from everything that was measured."""
    perf, length, embed = (records[kind] for kind in ("perf", "length", "embed"))
    lines = [f"{texts:,.0f} texts once, on machines like this:"]
    rows = [row for (name, _), row in levels(perf).items() if name == served]
    if best := max(rows, key=lambda row: row["throughput_infer_per_s"], default=None):
        seconds, at = texts / best["throughput_infer_per_s"], f"concurrency {best['concurrency']}"
        lines.append(f"{hours(seconds)}: {perf['settings']['inputs']}, through the server, {at}")
    else:
        lines.append(f"  through the server: {NOT_MEASURED}; ./perf.py measures it")
    if embed:
        run, mean = embed["summary"]["run"], embed["summary"]["tokens"] / embed["summary"]["rows"]
        lines.append(f"{hours(texts * run['wall_s'] / run['rows'])}: texts of {mean:.0f} tokens in the mean, embed.py")
    for row in length["rows"] if length else ():
        seconds = texts * row["seconds"]["median"]
        lines.append(f"{hours(seconds)}: texts of {row['tokens']} tokens, one at a time as above")
    if not length:
        lines.append(f"  by length: {NOT_MEASURED}; {MEASURE_LENGTH} measures it")
    return lines


def gpu_bounds(records, texts, gpu):
    """Hours below which a GPU cannot compute so many texts: a bound of its data sheet, nothing that was measured."""
    complexity, length = records["complexity"], records["length"]
    if not complexity:
        return [f"hours of one {gpu['name']} at best: not counted; ./complexity.py counts the model's layers"]
    kinds, batch = complexity["kinds"], PRACTICAL_BATCH
    # a table of positions is as long as the texts that were counted
    fixed = any({"rows", "positions"} & kind["shape"].keys() for kind in kinds)
    lines = [
        f"hours of one {gpu['name']} at best, the encoder alone, batch {batch:,}: a bound from its data sheet, not a measurement"
    ]
    for n in [row["tokens"] for row in length["rows"]] if length and not fixed else [complexity["length"]]:
        seconds = {p: least_time(fuse(kinds, batch, n), batch, n, p, gpu) for p in SERVED}
        found = [f"{p} {number(texts * s / batch / 3600)}" for p, s in seconds.items() if s]
        lines.append(f"  texts of {n} tokens: {', '.join(found)}")
    return lines
