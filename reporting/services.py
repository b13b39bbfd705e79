"""The section on services: a row per exported checkpoint of another task than the task's own."""

from core.engines import TITLES
from core.tables import REFERENCE
from reporting.markdown import NOT_MEASURED, caption, interval, is_encoder, percent, table
from reporting.speed import levels

SERVICE = "ensemble"  # key of the whole service in perf.json, texts to answers


def origin(card):
    """Name, weights and source of a checkpoint, and its licence."""
    notes = [card["source"], *(card[key] for key in ("label", "licence") if card.get(key))]
    return f"{card['name']} ({'; '.join(notes)})"


def precision_served(card):
    """ONNX is the name of the reference, which computes in FP32."""
    found = card["service"]["precision"]
    return "FP32" if found == REFERENCE else found


def row(model):
    """One service: its task, model, error to torch, and speed."""
    card, perf = model["card"], model["perf"]
    if model["generation"]:
        return generation_row(card, model["generation"])
    found = levels(perf)
    high = max((c for m, c in found if m == SERVICE), default=8)
    alone, loaded = (found.get((SERVICE, c)) for c in (1, high))
    return {
        "task": card["task"],
        "model": origin(card),
        "largest error to torch": f"{card['max_abs_error_to_torch']:.1e}",
        "precision served": precision_served(card),
        "p50 ms, concurrency 1": f"{alone['latency_p50_ms']:.1f}" if alone else NOT_MEASURED,
        f"answers/s, concurrency {high}": f"{loaded['throughput_infer_per_s']:.1f}" if loaded else NOT_MEASURED,
    }


def generation_row(card, record):
    """One service that generates: tokens per second, and that as a multiple of transformers' generate()."""
    speeds = {row["batch"]: row["tokens_per_s"]["served"] for row in record["rows"]}
    ratios = [f"{row['served_to']['generate()']:.2f}" for row in record["rows"] if "generate()" in row["served_to"]]
    heading = f"tokens/s, batch {' / '.join(map(str, speeds))} (× transformers' generate())"
    return {
        "task": card["task"],
        "model": origin(card),
        "largest error to torch": f"{card['max_error_to_torch']:.1e}",
        "precision served": precision_served(card),
        heading: f"{' / '.join(f'{speed:.1f}' for speed in speeds.values())} ({' / '.join(ratios) or NOT_MEASURED})",
    }


def generation(model):
    """Every way to generate that was measured, at each batch."""
    record = model["generation"]
    lead = (
        f"As many as {record['max_new_tokens']} tokens for each of the first texts of {record['texts']}: over the server, by "
        "the same loop with the same graphs in one process, and by transformers' generate() in torch. The median of the "
        f"rounds, and the slowest and the fastest of them. {caption(record)}."
    )
    return [lead, table(generation_level(row, way) for row in record["rows"] for way in row["tokens_per_s"])]


def generation_level(row, way):
    """One way at one batch, beside what was served."""
    rounds, equal = row["rounds_tokens_per_s"][way], row["equal_answers"].get(way)
    return {
        "way": f"{way}, batch {row['batch']}",
        "tokens/s": f"{row['tokens_per_s'][way]:.1f} ({min(rounds):.1f} to {max(rounds):.1f})",
        "served, as a multiple": f"{row['served_to'][way]:.2f}" if way in row["served_to"] else "",
        "answers equal to those served": "" if equal is None else f"{equal} of {row['batch']}",
    }


def candidate(found, chosen):
    """One engine and precision that was measured for a service on this CPU."""
    agreement = found.get("agreement")
    name = f"{TITLES[found['engine']]}, {found['precision']}"
    same = {key: found[key] for key in ("engine", "precision")} == chosen
    return {
        "engine, precision": f"**{name}**" if same else name,
        "texts/s alone": f"{found['alone_texts_per_s']:.1f}",
        "texts/s, eight together": f"{found['together_texts_per_s']:.1f}",
        "relative L2 error": percent(found["relative_l2_error"]),
        "agreement": interval(agreement) if agreement else "",
        "holds": "yes" if found["holds"] else "no",
    }


def chosen(models):
    """For each service whose engine was chosen, which one, of what."""
    return [
        f"Without a server, the fastest engine and precision for {m['title']} on this CPU whose answers hold is "
        f"{TITLES[m['choice']['chosen']['engine']]}, {m['choice']['chosen']['precision']}, of {len(m['choice']['rows'])} candidates."
        for m in models
        if m["choice"]
    ]


def details(model):
    """The candidates among which a service's engine and precision were chosen."""
    record = model["choice"]
    lead = f"Measured without a server on {record['texts']}; the choice is in bold. {caption(record)}."
    return [lead, table(candidate(found, record["chosen"]) for found in record["rows"])]


def services(models):
    """A table of every service that was measured, and on what; those beside peers have a section of their own."""
    shown = [m for m in models if not is_encoder(m) and not m["peers"] and (m["perf"] or m["generation"])]
    if not shown:
        return [f"Services of other tasks: {NOT_MEASURED}."]
    lead = (
        f"Texts go in and answers come out, over the server. {caption(*(m['perf'] or m['generation'] for m in shown))}."
    )
    return [table(map(row, shown)), lead, *chosen(models)]
