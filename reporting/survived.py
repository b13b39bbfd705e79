"""What a service survived: bad requests beside good ones for a long time, kills, and more requests than it can answer."""

from reporting.markdown import caption, listing, table


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
                "good requests: right / wrong / lost": " / ".join(
                    str(found.get(f"good, {word}", 0)) for word in ("right", "wrong", "lost")
                ),
                f"bad ones, {run['kinds_of_bad_requests']} kinds: refused / not": f"{refused} / {bad - refused}",
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
        f"{load['clients']} clients at once for {load['seconds']:g} s: {told}; the slowest hundredth of the answers took "
        f"{load['p99_s_of_answered']:.1f} s or more.",
    ]


def details(model):
    """Of one model: the soak's table, and what it recovered from."""
    return [
        *([caption(model["soak"]), table(soak(model))] if model["soak"] else []),
        *([caption(model["recovery"]), " ".join(recovery(model))] if model["recovery"] else []),
    ]


def survived(models):
    """Of all: one table, then one paragraph a model."""
    rows = [row for m in models if m["soak"] for row in soak(m)]
    told = [" ".join(recovery(m)) for m in models if m["recovery"]]
    return [table(rows), *told]
