"""Rows of Parquet, CSV and JSONL files, each called after its file and number; one that cannot be read says why.

A row is {"id", "texts"}, or {"id", "error"}. columns: {"id": its column, or None where a row's id is file:number, the
first row being number 0; "texts": theirs}. system: one of pyarrow's file systems.
"""

import csv
import io
import json
from pathlib import PurePosixPath

BLOCK = 1024  # rows that are read, sorted by length and computed together
LONGEST_FIELD = 16 << 20  # characters of CSV: a quote that nobody closes would take in the rest of the file
PARQUET, CSV, JSONL = SUFFIXES = ".parquet", ".csv", ".jsonl"
csv.field_size_limit(LONGEST_FIELD)


def read_rows(system, piece, columns):
    """Yield the rows of a piece of a file, in their order; pieces as serving.bulk_input makes them.

    Raises what pyarrow raises where the file is broken inside.
    """
    suffix = PurePosixPath(piece["name"]).suffix
    if suffix == PARQUET:
        records = parquet_records(system, piece, [*filter(None, [columns["id"]]), *columns["texts"]])
        for number, record in enumerate(records, piece["first"]):
            yield make_row(record, columns, f"{piece['name']}:{number}")
        return
    with open_text(system, piece["path"]) as stream:
        stream.seek(piece["start"])
        records = text_records(suffix, stream, piece["header"], piece["start"], piece["stop"])
        for number, (_, record) in enumerate(records, piece["first"]):
            row = make_row(record, columns, f"{piece['name']}:{number}")
            yield row if row["id"] is None else row | {"id": str(row["id"])}  # CSV has strings alone


def make_row(record, columns, place):
    """The row of {column: value}, or of the words of an error; place: file:number."""
    row = {"id": place if columns["id"] is None else None}
    if isinstance(record, str):
        return row | {"error": f"{place}: {record}"}
    if columns["id"] is not None:
        row["id"] = readable(record.get(columns["id"]))
    texts = tuple(record.get(name) for name in columns["texts"])
    for name, text in zip(columns["texts"], texts, strict=True):
        if not isinstance(text, str | bytes):
            found = "none" if text is None else f"{type(text).__name__} {str(text)[:40]}"
            return row | {"error": f"{place}: expected a text in {name}, found {found}"}
    try:
        return row | {"texts": tuple(map(utf8, texts))}
    except UnicodeError as error:
        return row | {"error": f"{place}: expected UTF-8, found: {error}"}


def utf8(value):
    """A text of bytes or a string. Raises UnicodeError where it is none: bytes that were no UTF-8, half a character."""
    if isinstance(value, bytes):
        return value.decode()
    value.encode()
    return value


def readable(value):
    """An id as it is, but for what is no UTF-8 in it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


# --- CSV and JSONL --------------------------------------------------------------------


def open_text(system, path):
    """A binary stream that has lines."""
    return io.BufferedReader(system.open_input_file(path), 1 << 20)


def read_lines(stream, position, stop=None):
    """Yield (position behind it, line) of a stream that stands at the position, up to stop."""
    while (stop is None or position < stop) and (line := stream.readline()):
        position += len(line)
        yield position, line


def read_csv(stream, position, stop=None):
    """Yield (position behind it, fields, or the words of an error) of each row."""

    def lines():
        nonlocal position
        for behind, line in read_lines(stream, position, stop):
            position = behind
            yield line.decode("utf-8", "surrogateescape")

    rows = csv.reader(lines())
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fields = f"expected CSV, found: {error}"
        yield position, fields


def read_header(stream):
    """(position behind it, names) of a CSV file's first row."""
    position, names = next(read_csv(stream, 0), (0, []))
    return position, [] if isinstance(names, str) else [name.removeprefix("\ufeff") for name in names]


def text_records(suffix, stream, header, position, stop=None):
    """Yield (position behind it, {column: value} or the words of an error) of each row from the position on."""
    if suffix == CSV:
        for behind, fields in read_csv(stream, position, stop):
            if isinstance(fields, list) and len(fields) != len(header):
                fields = f"expected {len(header)} fields, found {len(fields)}"
            yield behind, fields if isinstance(fields, str) else dict(zip(header, fields, strict=True))
        return
    for behind, line in read_lines(stream, position, stop):
        try:
            record = json.loads(line)
            yield behind, record if isinstance(record, dict) else "expected a JSON object, found another value"
        except (ValueError, RecursionError) as error:
            yield behind, f"expected JSON, found: {error}"


# --- Parquet --------------------------------------------------------------------------


def open_parquet(system, name, path):
    """pyarrow's ParquetFile; exits where it is none."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(system.open_input_file(path))
    except (OSError, ArrowException) as error:
        raise SystemExit(
            f"{name}: expected a Parquet file, found: {first_line(error)}; mend it or leave it out"
        ) from None


def first_line(error):
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def parquet_records(system, piece, names):
    """Yield {column: value} of a piece; texts are bytes: one that is no UTF-8 must not spoil the others."""
    file = open_parquet(system, piece["name"], piece["path"])
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    first, skipped = piece["first"], 0
    while groups[skipped] <= first:  # whole groups before the piece are not read
        first -= groups[skipped]
        skipped += 1
    last = first + piece["rows"]
    for batch in file.iter_batches(BLOCK, row_groups=range(skipped, len(groups)), columns=names):
        wanted = batch.slice(min(first, len(batch)), max(0, last - first))
        values = [plain(wanted.column(name)) for name in names]
        yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
        first, last = max(0, first - len(batch)), last - len(batch)
        if last <= 0:
            return


def plain(values):
    """The values of a column; bytes in the place of strings."""
    import pyarrow

    if isinstance(values, pyarrow.DictionaryArray):
        values = values.dictionary_decode()
    kinds = pyarrow.types
    string = kinds.is_string(values.type) or kinds.is_large_string(values.type) or kinds.is_string_view(values.type)
    return (values.cast(pyarrow.large_binary()) if string else values).to_pylist()
