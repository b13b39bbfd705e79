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
                "service": f"{model['title']}, {precision.replace('of all five', 'all five embedders')}",
                "minutes": f"{run['seconds'] / 60:.0f}",
                "good requests: right / wrong / lost": " / ".join(
                    str(found.get(f"good, {word}", 0)) for word in ("right", "wrong", "lost")
                ),
                "bad requests: refused / let in": f"{refused} / {bad - refused}",
                "MiB at first / at last": f"{memory[0][1]:.0f} / {memory[-1][1]:.0f}",
                "MiB for each 100,000 requests": f"{run['mib_per_100000_requests']:+.1f} ± {run['standard_error']:.1f}",
            }
        )
    return rows


def recovery(model):
    """Sentences on what was killed or stopped, and on the overload."""
    record = model["recovery"]
    kills = listing(
        f"{'never' if seconds is None else f'{seconds:.1f} s'} after {name.replace(', ', ' got ')}"
        for name, seconds in record["kills"].items()
    )
    load = record["overload"]
    told = ", ".join(f"{n} {what}" for what, n in sorted(load["outcomes"].items()))
    return [
        f"{model['title']} under `--supervise --guard` answers right again {kills}.",
        f"{load['clients']} clients at once for {load['seconds']:g} s got these answers: {told}; the p99 of the right ones was "
        f"{load['p99_s_of_answered']:.1f} s.",
    ]


def shortly(model):
    """recovery without the kinds of fault."""
    seconds, overload = model["recovery"]["kills"].values(), recovery(model)[1]
    again = "does not always answer again" if None in seconds else f"answers again within {max(seconds):.1f} s"
    return [
        f"{model['title']} under `--supervise --guard` {again} when a process is killed or stopped ({len(seconds)} kinds of fault).",
        overload,
    ]


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
    return (
        f"{record['servers']} servers behind HAProxy got {rates} requests/s through {len(record['faults'])} kinds of fault: of "
        f"{requests} requests, {lost} were lost and {wrong} answered wrongly; the slowest answer took {slowest:.1f} s."
    )


def details(model):
    """Of one model: the soak's table, and what it recovered from."""
    return [
        *([caption(model["soak"]), table(soak(model))] if model["soak"] else []),
        *([caption(model["recovery"]), " ".join(recovery(model))] if model["recovery"] else []),
        *([caption(model["failover"]), failover(model)] if model["failover"] else []),
        *([table(failover_rows(model["failover"]))] if model["failover"] else []),
    ]


def newest(models, kind):
    """Of each model the machine that measured a kind last; the tables of the others have theirs."""
    found = sorted((m for m in models if m[kind]), key=lambda m: m[kind]["environment"]["utc"])
    return {m["slug"]: m for m in found}.values()


def survived(models):
    """Of all: one table, then one paragraph a model."""
    rows = [row for m in models if m["soak"] for row in soak(m)]
    told = [" ".join(shortly(m)) for m in newest(models, "recovery")]
    told += [failover(m) for m in newest(models, "failover")]
    return [table(rows), *told]
