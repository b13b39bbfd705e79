"""The section on what a text costs as its length grows: results/<slug>/<machine>/length.json."""

from reporting.markdown import caption, table
from reporting.peers import span


def growth(record):
    """[(tokens, median time, FLOPs)] as multiples of those of the shortest text."""
    first = record["rows"][0]
    return [
        (row["tokens"], row["seconds"]["median"] / first["seconds"]["median"], row["flops"] / first["flops"])
        for row in record["rows"]
    ]


def details(model):
    """A row for each length."""
    record = model["length"]
    lead = (
        f"One text at a time, {record['executed_by']}; {record['texts_each']} texts of each length in turn, {record['rounds']} "
        f"rounds: the median of the rounds, and the lowest and the highest. {caption(record)}."
    )
    rows = (
        {
            "tokens": tokens,
            "ms": span({key: 1000 * value for key, value in row["seconds"].items()}),
            "GFLOPs": f"{row['flops'] / 1e9:.2f}",
            "× the shortest, time": f"{times:.2f}",
            "× the shortest, FLOPs": f"{flops:.2f}",
            "time ÷ FLOPs": f"{times / flops:.2f}",
        }
        for row, (tokens, times, flops) in zip(record["rows"], growth(record), strict=True)
    )
    return [lead, table(rows), "![Growth of time and FLOPs with the length](length.png)"]
