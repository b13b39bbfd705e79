"""What a service survived: bad requests beside good ones for a long time, kills, and more requests than it can answer."""

from reporting.markdown import caption, listing, number, table


def soak(model):
    """A row for each precision that was soaked."""
    rows = []
    for precision, run in model["soak"]["runs"].items():
        found, memory = run["outcomes"], run["memory_mib"]
        bad, refused = sum(n for k, n in found.items() if k.startswith("bad")), found.get("bad, refused", 0)
        rows.append(
            {
                "service": f"{model['title']}, {precision}",
                "minutes": f"{run['seconds'] / 60:.0f}",
                "good: right / wrong / lost": " / ".join(
                    str(found.get(f"good, {word}", 0)) for word in ("right", "wrong", "lost")
                ),
                "bad: refused / not": f"{refused} / {bad - refused}",
                "MiB at first / at last": f"{memory[0][1]:.0f} / {memory[-1][1]:.0f}",
                "MiB for each 100,000 requests": f"{run['mib_per_100000_requests']:+.1f} ± {run['standard_error']:.1f}",
            }
        )
    return rows


def recovery(model):
    """Sentences on kills and on the overload."""
    record = model["recovery"]
    kills = listing(
        f"never after {name}" if seconds is None else f"{seconds:.1f} s after {name}"
        for name, seconds in record["kills"].items()
    )
    load = record["overload"]
    told = ", ".join(f"{n} {what}" for what, n in sorted(load["outcomes"].items()))
    return [
        f"{model['title']} under `--supervise --guard` answers right again {kills}.",
        f"{load['clients']} clients at once for {load['seconds']:g} s: {told}; p99 of the "
        f"answers {load['p99_s_of_answered']:.1f} s.",
    ]


def shortly(model):
    """recovery without the kinds of kill."""
    seconds, overload = model["recovery"]["kills"].values(), recovery(model)[1]
    longest = "not always" if None in seconds else f"within {max(seconds):.1f} s"
    return [f"{model['title']} under `--supervise --guard` answers again {longest} after {len(seconds)} kinds of kill.", overload]  # fmt: skip


def failover_rows(record):
    """A row for each fault, protocol and client."""
    for fault, rows in record["faults"].items():
        for row in rows:
            yield {
                "fault": fault,
                "over": row["protocol"],
                **{word: row[word] for word in ("client", "requests", "lost", "wrong")},
                "p99 s": number(row["p99_s"], ".2f"),
                "slowest s": number(row["slowest_s"], ".2f"),
            }


def failover(model):
    """One sentence: all faults together."""
    record = model["failover"]
    rows = [row for rows in record["faults"].values() for row in rows]
    requests, lost, wrong = (sum(row[word] for row in rows) for word in ("requests", "lost", "wrong"))
    slowest = max(row["slowest_s"] for row in rows if row["slowest_s"] is not None)
    rates = listing(f"{rate:.0f}" for rate in record["requests_per_s"])
    return f"{record['servers']} servers behind HAProxy in {len(record['faults'])} kinds of fault, {rates} requests/s: of {requests}, {lost} lost and {wrong} wrong; the slowest answer took {slowest:.1f} s."


def details(model):
    """Of one model: the soak's table, and what it recovered from."""
    return [
        *([caption(model["soak"]), table(soak(model))] if model["soak"] else []),
        *([caption(model["recovery"]), " ".join(recovery(model))] if model["recovery"] else []),
        *([caption(model["failover"]), failover(model)] if model["failover"] else []),
        *([table(failover_rows(model["failover"]))] if model["failover"] else []),
    ]


def survived(models):
    """Of all: one table, then one paragraph a model."""
    rows = [row for m in models if m["soak"] for row in soak(m)]
    told = [" ".join(shortly(m)) for m in models if m["recovery"]]
    told += [failover(m) for m in models if m["failover"]]
    return [table(rows), *told]
