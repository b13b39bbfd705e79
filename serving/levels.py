"""The levels of perf.json on disk: what a run found, put beside what earlier ones did; the finished ones of one under way."""

import shutil

from core.files import read_json, replace_folder_when_done, write_json
from core.tables import MODELS

KEYS = (*MODELS, "tokenizer", "ensemble")


def read_earlier(path, record):
    """A perf.json of the same model, server and settings, whose levels may stand beside the new; else None."""
    if not path.exists():
        return None
    old = read_json(path, "move it away")
    same = all(old.get(key) == record[key] for key in ("settings", "server", "quick"))
    return old if same and old["model"]["reference_sha256"] == record["model"]["reference_sha256"] else None


def level_of(row):
    """(model, concurrency or share), by which levels are known and ordered."""
    return row["model"], row.get("concurrency", row.get("share"))


def position(level):
    return KEYS.index(level[0]), level[1]


def in_order(rows):
    return sorted(rows, key=lambda row: position(level_of(row)))


def merge(old, new):
    """The new record with what the old one has and it has not measured: levels, of which a refused one replaces none,
    and all rates of a model."""
    if old is None:
        return new
    rows = {level_of(row): row for row in new["rows"]}
    kept = {level_of(row): row for row in old["rows"] if "error" in rows.get(level_of(row), {"error": ""})}
    again = {row["model"] for row in new["rates"]}
    rates = new["rates"] + [row for row in old.get("rates", ()) if row["model"] not in again]
    planned = sorted(set(map(tuple, old["planned"] + new["planned"])), key=position)
    merged = new | {"planned": list(map(list, planned)), "rows": in_order((rows | kept).values())}
    merged["rates"] = in_order(rates)
    if kept:
        of_both = [record.get("earlier_environments", []) for record in (old, new)]
        merged["earlier_environments"] = [*of_both[0], old["environment"], *of_both[1]]
    return merged | {"bare_infer_per_s": old["bare_infer_per_s"] | new["bare_infer_per_s"]}


def add_served_to_bare(record):
    """Put each throughput beside the best that the same graph gives without a server."""
    for row in record["rows"]:
        bare = record["bare_infer_per_s"].get(row["model"])
        if bare and "error" not in row:
            # one request at a time cannot be batched; more can
            alone = row["concurrency"] == 1 and row["batch_size"] == 1
            row["served_to_bare"] = row["throughput_infer_per_s"] / (bare["1"] if alone else max(bare.values()))
    return record


def csv_name(row):
    at = f"rate_{row['share']:g}" if "share" in row else f"concurrency_{row['concurrency']}"
    return f"{row['model']}_{at}.csv"


def save_rows(rows, record, unfinished, partial):
    """Add the rows of one concurrency or share to the record and write perf.partial/."""
    if not unfinished and not record["rows"]:  # what lies there is of other settings
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if csv := row.pop("csv", None):
            (partial / csv_name(row)).write_text(csv, encoding="utf-8")
    kind = "rates" if "share" in rows[0] else "rows"
    record[kind] = in_order(record[kind] + rows)
    write_json(partial / "perf.json", add_served_to_bare(merge(unfinished, record)))


def publish(record, folder, partial):
    """Put perf.json and perf/ in the place of the earlier ones, whole, and delete perf.partial/."""
    with replace_folder_when_done(folder / "perf") as temporary:
        for name in map(csv_name, record["rows"] + record["rates"]):
            if source := next((p for p in (partial / name, folder / "perf" / name) if p.is_file()), None):
                shutil.copy(source, temporary / name)
    write_json(folder / "perf.json", add_served_to_bare(record))
    shutil.rmtree(partial)
