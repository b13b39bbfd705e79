"""The output folder of a bulk job: its record, which pieces are done, and what all of them counted."""

import importlib.metadata
import json
from concurrent.futures import ThreadPoolExecutor

from core.record import environment_record
from serving.bulk_input import AT_ONCE, absolute, open_place
from serving.bulk_rows import first_line, open_parquet
from serving.bulk_worker import COUNTS, part_name, remove

RECORD = "_embed.json"  # what reads a folder of Parquet files passes over names that begin so
PACKAGES = ("ray", "pyarrow", "pandas", "tokenizers", "openvino")


def open_output(output, inputs):
    """(file system, folder) of the output, made if need be; exits where it cannot be, or would be read as input."""
    if any(
        absolute(output) == absolute(given) or absolute(output).startswith(absolute(given) + "/") for given in inputs
    ):
        raise SystemExit(f"--output {output}: expected a folder outside of --input, found one in it; name another")
    system, folder = open_place(absolute(output))
    try:
        system.create_dir(folder, recursive=True)
    except OSError as error:
        raise unwritable(output, error) from None
    return system, folder


def unwritable(output, error):
    """The exit where the output cannot be written."""
    return SystemExit(f"--output {output}: expected a folder to write to, found: {first_line(error)}; name another")


def names_in(output):
    """Names of what lies in the folder."""
    from pyarrow import fs

    system, folder = output
    return {info.base_name for info in system.get_file_info(fs.FileSelector(folder))}


# --- the record -------------------------------------------------------------------------


def make_record(card, settings, piece_rows, pieces):
    """The record of a job that begins."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    record = {"model": card, "settings": settings, "piece_rows": piece_rows, "pieces": pieces}
    return record | {"environment": environment_record() | {"bulk_packages": versions}}


def read_record(output, settings):
    """The record of the job that the folder holds, {} of an empty one; exits for another job, and for other files."""
    system, folder = output
    if RECORD not in (names := names_in(output)):
        if names:
            raise SystemExit(f"--output {folder}: expected an empty folder, found {min(names)} in it; name another")
        return {}
    with system.open_input_file(f"{folder}/{RECORD}") as file:
        try:
            record = json.loads(file.read())
            before = record["settings"]
        except (ValueError, TypeError, KeyError):
            raise SystemExit(
                f"{folder}/{RECORD}: expected the record of a job, found another; name another --output"
            ) from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise SystemExit(
                f"--output {folder}: expected a job whose {name} is {shown(value)}, found one with {shown(before.get(name))}; "
                "name another folder, or ask as before"
            )
    return record


def shown(value):
    """A setting, short enough for a line."""
    return str(value)[:60]


def write_record(output, record):
    """Write the record, whole or not at all."""
    system, folder = output
    temporary = f"{folder}/.{RECORD}.tmp"
    try:
        with system.open_output_stream(temporary) as stream:
            stream.write((json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        system.move(temporary, f"{folder}/{RECORD}")
    except OSError as error:
        remove(system, temporary)
        raise unwritable(folder, error) from None


# --- the pieces -------------------------------------------------------------------------


def pieces_left(output, pieces):
    """Numbers of the pieces that have no file."""
    names = names_in(output)
    return [number for number in range(len(pieces)) if part_name(number) not in names]


def read_counts(output, number, piece):
    """What a piece's worker counted; exits where its file is not the piece."""
    system, folder = output
    metadata = open_parquet(system, part_name(number), f"{folder}/{part_name(number)}").metadata
    if metadata.num_rows != piece["rows"]:
        raise SystemExit(
            f"{folder}/{part_name(number)}: expected {piece['rows']} rows, found {metadata.num_rows}; remove it, and ask again"
        )
    return json.loads(metadata.metadata[COUNTS.encode()])


def summarize(output, pieces, left, wall_s):
    """All files' counts, and those of this run alone, which computed the pieces that were left in so many seconds."""
    system, folder = output
    with ThreadPoolExecutor(AT_ONCE) as pool:
        counts = list(pool.map(lambda number: read_counts(output, number, pieces[number]), range(len(pieces))))
    for name in names_in(output):
        if name.startswith(".part-"):  # of a worker that was killed
            remove(system, f"{folder}/{name}")
    total = {name: sum(each[name] for each in counts) for name in ("rows", "errors", "tokens", "positions")}
    own = [counts[number] for number in left]
    run = {name: sum(each[name] for each in own) for name in ("rows", "cpu_s")} | {"wall_s": wall_s}
    # the time without the start of Ray and of its workers
    run["compute_s"] = max(each["ended"] for each in own) - min(each["began"] for each in own) if own else 0
    return {"files": len(pieces)} | total | {"run": run}


def say(output, summary, by):
    """The line of a job that is done."""
    parts = [f"{summary['rows']} rows in {summary['files']} files", f"{summary['errors']} with an error"]
    run = summary["run"]
    parts += [f"{run['wall_s']:.1f} s, {run['rows'] / run['wall_s']:.0f} rows/s"] if run["rows"] else ["done before"]
    if 0 < run["rows"] < summary["rows"]:
        parts += [f"{run['rows']} of them in this run"]
    if summary["positions"]:
        parts += [f"padding {1 - summary['tokens'] / summary['positions']:.1%} of the positions"]
    return f"{output}: {', '.join(parts)}; {by}"
