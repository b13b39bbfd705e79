"""Files of texts -> the pieces of a job: Parquet, CSV and JSONL, on disks and in object stores.

A piece is {"name", "path", "first", "rows"}, so many rows of a file from the first on, and of CSV and JSONL also
{"start", "stop", "header"}, the bytes where they lie and the names of the columns. Everything that makes a job
impossible is found here, before anything is computed.
"""

import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from serving import bulk_rows
from serving.bulk_rows import BLOCK, CSV, JSONL, PARQUET, SUFFIXES

AT_ONCE = 16  # files that are looked into: an object store answers slowly
BLOCKS = 64  # of the largest piece: what a death costs, and the size of a file
PIECES = 16  # for each worker at least, where there are rows enough: all end at about the same time


def open_place(path):
    """(pyarrow's file system, path in it) of a path, or of a URI such as s3://bucket/folder."""
    import pyarrow
    from pyarrow import fs

    path = str(path)
    try:
        return fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SystemExit(f"{path}: expected a path or a URI that pyarrow reads, found: {error}") from None


def absolute(path):
    """A path that means the same in every process; a URI as it is."""
    return str(path) if "://" in str(path) else str(Path(path).resolve())


# --- files ------------------------------------------------------------------------------


def list_files(inputs):
    """(file system, {name: (path, bytes)}) of one folder, whose files are called after their place in it, or of files."""
    from pyarrow import fs

    found = {}
    for given in inputs:
        system, path = open_place(absolute(given))
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise SystemExit(f"--input {given}: expected a folder or files, found none")
        if info.type == fs.FileType.Directory and len(inputs) > 1:
            raise SystemExit(f"--input {given}: expected one folder or several files, found a folder among others")
        infos = [info]
        if info.type == fs.FileType.Directory:
            infos = [i for i in system.get_file_info(fs.FileSelector(path, recursive=True)) if not is_hidden(i, info)]
        for each in infos:
            name = str(PurePosixPath(each.path).relative_to(info.path)) if each is not info else each.base_name
            if name in found:
                raise SystemExit(f"--input: expected files of different names, found {name} twice; name their folder")
            found[name] = each.path, each.size
    check_files(inputs[0], found)
    return system, dict(sorted(found.items()))


def is_hidden(info, folder):
    """Whether what lies in a folder is none of its data: a folder itself, or _SUCCESS and .part of other programs."""
    parts = PurePosixPath(info.path).relative_to(folder.path).parts
    return not info.is_file or any(part[0] in "._" for part in parts)


def check_files(given, files):
    """Exit unless there are files, all of one format, none of them empty."""
    suffixes = {PurePosixPath(name).suffix for name in files}
    if len(suffixes) != 1 or not suffixes <= set(SUFFIXES):
        found = ", ".join(sorted(suffix or "one without a suffix" for suffix in suffixes)) or "none"
        raise SystemExit(f"--input {given}: expected files of one of {', '.join(SUFFIXES)}, found {found}")
    if empty := [name for name, (_, size) in files.items() if not size]:
        raise SystemExit(f"{empty[0]}: expected rows, found an empty file; leave it out")


def check_columns(name, found, columns):
    """Exit unless all columns are there, each once."""
    for column in filter(None, (columns["id"], *columns["texts"])):
        if list(found).count(column) != 1:
            said = "found it twice" if column in found else f"found {', '.join(found) or 'none'}"
            raise SystemExit(f"{name}: expected a column {column}, {said}; --text-column and --id-column name others")


# --- pieces -----------------------------------------------------------------------------


def scan_parquet(system, name, path, columns):
    """(rows, None, None, Arrow's type of the ids); exits where a column is missing or of another type."""
    from pyarrow import types

    file = bulk_rows.open_parquet(system, name, path)
    schema = file.schema_arrow
    check_columns(name, schema.names, columns)
    kinds = {c: schema.field(c).type for c in filter(None, (columns["id"], *columns["texts"]))}
    kinds = {c: kind.value_type if types.is_dictionary(kind) else kind for c, kind in kinds.items()}
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    others = types.is_binary, types.is_large_binary, types.is_null
    for column in columns["texts"]:
        if not any(test(kinds[column]) for test in (*strings, *others)):
            raise SystemExit(f"{name}: expected texts in {column}, found {kinds[column]}; name another --text-column")
    kind = kinds.get(columns["id"])
    if kind is not None and not any(test(kind) for test in (*strings, types.is_integer)):
        raise SystemExit(f"{name}: expected whole numbers or strings in {columns['id']}, found {kind}")
    return file.metadata.num_rows, None, None, str(kind) if kind is not None and types.is_integer(kind) else "string"


def scan_text(system, name, path, columns):
    """(rows, positions of every BLOCKth row and of the end, header, Arrow's type of the ids) of a CSV or JSONL file."""
    suffix, start, header, rows = PurePosixPath(name).suffix, 0, None, 0
    with bulk_rows.open_text(system, path) as stream:
        if suffix == CSV:
            start, header = bulk_rows.read_header(stream)
            check_columns(name, header, columns)
        marks = [start]
        for position, record in bulk_rows.text_records(suffix, stream, header, start):
            if suffix == JSONL and rows == 0 and isinstance(record, dict):
                check_columns(name, record, columns)
            rows += 1
            start = position
            marks += [position] if rows % BLOCK == 0 else []
    return rows, [*marks, start], header, "string"


def plan(system, files, columns, piece_rows=None, workers=1):
    """(pieces, rows of each that is not a file's last, Arrow's Arrow's type of the ids); exits where a file cannot be read.

    piece_rows: a multiple of BLOCK; None: by the number of all rows.
    """

    def scan(name):
        return (scan_parquet if name.endswith(PARQUET) else scan_text)(system, name, files[name][0], columns)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        scans = dict(zip(files, pool.map(scan, files), strict=True))
    if not (total := sum(rows for rows, *_ in scans.values())):
        raise SystemExit(f"--input: expected at least one row, found none in {len(files)} files")
    first, *kinds = ((name, kind) for name, (*_, kind) in scans.items())
    if other := next((found for found in kinds if found[1] != first[1]), None):
        raise SystemExit(
            f"{other[0]}: expected {columns['id']} of type {first[1]} as in {first[0]}, found {other[1]}; make them alike"
        )
    piece_rows = piece_rows or BLOCK * max(1, min(BLOCKS, total // (PIECES * workers * BLOCK)))
    pieces = []
    for name, (rows, marks, header, _) in scans.items():
        for start in range(0, rows, piece_rows):
            piece = {"name": name, "path": files[name][0], "first": start, "rows": min(piece_rows, rows - start)}
            if marks:
                ends = (marks[min(row // BLOCK, len(marks) - 1)] for row in (start, start + piece_rows))
                piece |= {"header": header} | dict(zip(("start", "stop"), ends, strict=True))
            pieces.append(piece)
    return pieces, piece_rows, first[1]


# --- ids --------------------------------------------------------------------------------


def check_ids(system, pieces, column):
    """Exit unless every row that can be read has an id of its own; eight bytes of each are in memory."""
    hashes = array.array("q", (hash(row) for row, _ in ids_of(system, pieces, column)))
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    repeated = set(values[counts > 1].tolist())
    seen = {}
    for row, place in ids_of(system, pieces, column) if repeated else ():
        if hash(row) in repeated and row in seen:
            raise SystemExit(f"{place}: expected an id of its own in {column}, found {row!r} of {seen[row]} again")
        seen |= {row: place} if hash(row) in repeated else {}


def ids_of(system, pieces, column):
    """Yield (id, file:number) of every row that can be read; exits where one has none."""
    for piece in pieces:
        for number, row in enumerate(bulk_rows.read_rows(system, piece, {"id": column, "texts": ()}), piece["first"]):
            place = f"{piece['name']}:{number}"
            if "error" not in row and row["id"] is None:
                raise SystemExit(f"{place}: expected an id in {column}, found none; leave --id-column out, or fill it")
            if "error" not in row:
                yield row["id"], place
