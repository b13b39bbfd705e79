"""The section on a service beside the engine that it calls: results/<slug>/<machine>/limits.json."""

from core.engines import TITLES
from reporting.markdown import caption, listing, number, table
from reporting.peers import span


def details(model):
    """A row for each service and concurrency that was held against the bare engine, and the roofs."""
    record = model["limits"]
    settings, texts = record["settings"], record["texts"]
    roofs = listing(f"{v / 1e9:.0f} in {p}" for p, v in record["roofs_flops_per_s"].items() if v)
    lead = (
        f"{texts['count']} texts ({texts['file']}) of {record['flops_per_text'] / 1e9:.2f} GFLOPs each; {settings['rounds']} rounds. "
        f"The fastest GEMM, GFLOP/s: {roofs}. {caption(record)}."
    )
    rows = [
        {
            "service": f"{TITLES[service['engine']]}, {service['precision']}",
            "concurrency": concurrency,
            "texts/s served": span(level["texts_per_s"], ".1f"),
            "bare": span(level["bare_texts_per_s"], ".1f"),
            "served ÷ bare": span(level["served_to_bare"]),
            "mean batch": number(level["mean_batch_size"], ".2f"),
            "positions ÷ tokens": f"{level['positions_per_token']:.2f}",
            "ms a text, words to answer, in one process": span(level["in_process_ms"])
            if "in_process_ms" in level
            else "",
            "ms until a refusal": span(level["refused_ms"]) if "refused_ms" in level else "",
        }
        for service in record["services"]
        for concurrency, level in service.get("levels", {}).items()
    ]
    over = (
        {
            "service": f"{TITLES[s['engine']]}, {s['precision']}",
            f"texts/s at concurrency {settings['overload']}": span(s["overload"]["texts_per_s"], ".1f"),
            "÷ the best level": span(s["overload"]["to_best_level"]),
            "without an answer": s["overload"]["failed"],
        }
        for s in record["services"]
        if "overload" in s
    )
    missing = [f"{s['engine']}, {s['precision']} ({s['error']})" for s in record["services"] if "error" in s]
    return [lead, table(rows), table(over), *([f"Not measured: {'; '.join(missing)}."] if missing else [])]
