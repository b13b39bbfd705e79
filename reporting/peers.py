"""The section on peers: the project's services beside published servers, on the same texts, in the same rounds."""

import statistics

from core.engines import TITLES
from reporting.markdown import DETAILS, NOT_MEASURED, caption, listing, number, relative, table

OWN = ("project", "named by the user")
RIVALS = {"published": "the best published peer", "by hand": "a server that batches by hand"}
WRONG = {"failed": "failed", "wrong_label": "with another label", "wrong_score": "with another score"}


def span(found, form=".2f"):
    """A median with its range over the rounds."""
    return f"{found['median']:{form}} ({found['min']:{form}} to {found['max']:{form}})" if found else NOT_MEASURED


def titled(system):
    """A system's name, and the engine and precision of the project's own: BF16 (OpenVINO, BF16)."""
    by = ", ".join(system.get("executed_by", "").split(", ")[:2])
    return f"{system['name']} ({by})" if by else system["name"]


def wrong(system):
    """What was wrong with a system's answers over all levels: "none", or how many of what."""
    totals = {name: sum(row["answers"][name] for row in system["levels"].values()) for name in WRONG}
    found = [f"{count} {WRONG[name]}" for name, count in totals.items() if count]
    return listing(found)


def speeds(record):
    """A row for each system: throughput and ratio at each concurrency, and wrong answers."""
    for system in record["systems"]:
        row = {"system": system["name"]}
        for concurrency in map(str, record["settings"]["concurrency"]):
            level = system["levels"].get(concurrency)
            row[f"texts/s, concurrency {concurrency}"] = (
                f"{level['texts_per_s']['median']:.1f}" if level else NOT_MEASURED
            )
            row[f"× project, {concurrency}"] = span(level["ratio"]) if level else ""
        yield row | {"wrong answers": wrong(system) if system["levels"] else ""}


def costs(record):
    """A row for each system: latency and processor time under load, cold start and memory."""
    top = str(max(record["settings"]["concurrency"]))
    for system in record["systems"]:
        level = system["levels"].get(top)
        if not level:
            continue
        p99 = "n too small" if level["latency_p99_ms"] is None else f"{level['latency_p99_ms']:.0f}"
        yield {
            "system": system["name"],
            f"p50 / p99 ms, concurrency {top}": f"{number(level['latency_p50_ms'], '.0f')} / {p99}",
            f"CPU-ms a text, {top}": number(level["cpu_ms_per_text"], ".1f"),
            f"mean batch, {top}": number(level["mean_batch_size"], ".2f") if level["mean_batch_size"] else "not told",
            "s to the first right answer": number(statistics.median(system["start_s"]), ".1f"),
            "MiB idle → after load": " → ".join(
                number(system.get(f"memory_{when}_mib"), ".0f") for when in ("idle", "loaded")
            ),
        }


# --- against the best peer -----------------------------------------------------------


def versus(record, own, rival, concurrency):
    """{"median", "min", "max"} of own ÷ rival in the same rounds; None where they share none."""
    found = {}
    for window in record["windows"]:
        if window["concurrency"] == concurrency:
            found.setdefault(window["system"], {})[window["round"]] = window["texts_per_s"]
    first, second = found.get(own, {}), found.get(rival, {})
    ratios = [first[r] / second[r] for r in first if second.get(r)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None


def best(record, kind, concurrency):
    """The system of a kind with the highest median throughput whose answers were all right; None without any."""
    levels = {
        s["name"]: s["levels"][str(concurrency)]
        for s in record["systems"]
        if s["kind"] == kind and str(concurrency) in s["levels"] and wrong(s) == "none"
    }
    return max(levels, key=lambda name: levels[name]["texts_per_s"]["median"], default=None)


def comparisons(record):
    """A row for each service of the project and each kind of rival: how many times as fast, and the p99's ratio."""
    by_name = {system["name"]: system["levels"] for system in record["systems"]}
    for system in record["systems"]:
        if system["kind"] not in OWN or not system["levels"]:
            continue
        for kind, title in RIVALS.items():
            rivals = [best(record, kind, c) for c in record["settings"]["concurrency"]]
            one = rivals[0] if len(set(rivals)) == 1 and rivals[0] else None  # named once, then
            name = f"{system['name']} ÷ {title}" + (f" ({one})" if one else "")
            row, tail = {"": name}, {"": f"p99, {name}"}
            for concurrency, rival in zip(record["settings"]["concurrency"], rivals, strict=True):
                heading = f"concurrency {concurrency}"
                found = rival and versus(record, system["name"], rival, concurrency)
                row[heading] = (span(found) + ("" if one else f", {rival}")) if found else NOT_MEASURED
                pair = [
                    by_name[name].get(str(concurrency), {}).get("latency_p99_ms")
                    for name in (system["name"], rival)
                    if name
                ]
                tail[heading] = f"{pair[0] / pair[1]:.2f}" if len(pair) == 2 and all(pair) else NOT_MEASURED
            yield from (r for r in (row, tail) if set(list(r.values())[1:]) != {NOT_MEASURED})


def sentences(record):
    """Tables of sentence embeddings, where they were measured."""
    if not record["embeddings"]:
        return []
    rows = [
        {
            "sentence embeddings of all texts": row["name"],
            "texts/s": f"{row['texts_per_s']['median']:.1f}"
            if "error" not in row
            else f"{NOT_MEASURED}: {row['error']}",
            "× project": span(row["ratio"]) if "error" not in row else "",
            "least cosine to torch": number(row.get("least_cosine"), ".5f"),
        }
        for row in record["embeddings"]
    ]
    lead = "The project's service is asked over gRPC; sentence-transformers computes without a server."
    return [f"{lead} The texts are the same.", table(rows)]


def differing(record, own):
    """A sentence on each of the project's services whose answers are not all those of transformers."""
    return [
        f"Of its {sum(sum(level['answers'].values()) for level in s['levels'].values())} answers, {titled(s)} gave {wrong(s)} "
        f"(by more than {record['settings']['score_tolerance']:g}) than transformers."
        for s in record["systems"]
        if s["name"] in own and s["levels"] and wrong(s) != "none"
    ]


def peers(models):
    """What is shown of every classifier that was measured beside its peers."""
    shown = [model for model in models if model["peers"]]
    if not shown:
        return [f"Peers of the service: {NOT_MEASURED}."]
    return [part for model in shown for part in section(model)]


def section(model):
    record = model["peers"]
    settings = record["settings"]
    lead = (
        f"**{model['title']}**. {caption(record)}. {settings['texts']['count']} texts ({settings['texts']['file']}), one a "
        f"request; {settings['rounds']} rounds of {listing(settings['requests'])} requests at concurrency {listing(settings['concurrency'])}. Each cell is the median over the rounds of the ratio of texts per "
        f"second, with the lowest and the highest round in brackets. `project` is this project's service in FP32. "
        f"[All systems]({relative(model, DETAILS)})."
    )
    chosen = model["choice"] and model["choice"]["chosen"]
    begin = f"{TITLES[chosen['engine']]}, {chosen['precision']}," if chosen else None
    own = {s["name"] for s in record["systems"] if begin and s.get("executed_by", "").startswith(begin)}
    own |= {record["settings"].get("base", "project")}
    missing = [f"{s['name']} ({s['error']})" for s in record["systems"] if "error" in s]
    return [
        lead,
        table(row for row in comparisons(record) if row[""].split(" ÷")[0] in own),
        *differing(record, own),
        *([f"Not measured, or not to the end: {'; '.join(missing)}."] if missing else []),
        f"![Throughput as a multiple of the project's]({relative(model, 'peers.png')})",
    ]


def details(model):
    """Comparisons, costs, versions and settings of every system."""
    rows = (
        {
            "system": s["name"],
            "versions": ", ".join(f"{name} {version}" for name, version in s["versions"].items()),
            "settings": "; ".join(filter(None, (s["settings"], s.get("executed_by")))),
            "cores used idle": number(s.get("idle_cpu_cores"), ".2f"),
        }
        for s in model["peers"]["systems"]
    )
    record = model["peers"]
    return [*map(table, (speeds(record), comparisons(record), costs(record), rows)), *sentences(record)]
