"""One process of a bulk job: pieces of the input -> a Parquet file of each, which is there whole or not at all.

A file's name follows from its piece alone, so a piece that is computed again, after a death, replaces its own file: no
row is lost, and none is there twice.
"""

import contextlib
import json
import time
import uuid

from core.repository import read_card
from serving.bulk_answers import open_in_process, open_served, outputs_of
from serving.bulk_input import open_place
from serving.bulk_rows import BLOCK, first_line, read_rows

CHARACTERS = 1 << 18  # of a block: long texts come in smaller ones
COUNTS = "embed"  # key of a file's metadata: what its worker counted
ERROR = "error"  # column of why a row has no answer


def part_name(number):
    """File of a piece."""
    return f"part-{number:06}.parquet"


def blocks_of(rows):
    """Yield lists of rows that are computed together: at most BLOCK, and fewer where they are long."""
    block, size = [], 0
    for row in rows:
        block.append(row)
        size += sum(map(len, row.get("texts", ())))
        if len(block) == BLOCK or size >= CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def arrow_schema(card, id_type):
    """Columns of the output: id, the task's outputs, error."""
    import pyarrow

    plain = {"STRING": pyarrow.string(), "INT64": pyarrow.int64(), "FP32": pyarrow.float32()}
    vector = pyarrow.list_(pyarrow.float32())  # what the graph gives; of an answer's list the best one is taken
    found = {n: vector if n in card["outputs"] else plain[kind] for n, (kind, _) in outputs_of(card).items()}
    return pyarrow.schema({"id": pyarrow.type_for_alias(id_type)} | found | {ERROR: pyarrow.string()})


def arrow_table(schema, rows, answers):
    """A table of rows and their answers, each {output: value} or the words of an error."""
    import pyarrow

    columns = {"id": [row["id"] for row in rows], ERROR: [a if isinstance(a, str) else None for a in answers]}
    for field in schema:
        if field.name not in columns:
            vector = pyarrow.types.is_list(field.type)
            values = (None if isinstance(answer, str) else answer[field.name] for answer in answers)
            columns[field.name] = [value if vector or value is None else scalar(value) for value in values]
    return pyarrow.table(columns, schema=schema)


def scalar(value):
    """The first of an output's values, as Python has it."""
    value = value.reshape(-1)[0]
    return (
        value.decode("utf-8", "replace")
        if isinstance(value, bytes)
        else value.item()
        if hasattr(value, "item")
        else value
    )


def answer_block(answer, rows):
    """(an answer or an error for each row, tokens, positions)."""
    good = [i for i, row in enumerate(rows) if "texts" in row]
    found, tokens, positions = answer([rows[i]["texts"] for i in good])
    answers = [row.get("error") for row in rows]
    for i, each in zip(good, found, strict=True):
        answers[i] = each
    return answers, tokens, positions


def write_piece(job, number, answer):
    """Compute a piece and write its file; yields how many rows are done, block by block."""
    from pyarrow import parquet

    piece, schema = job["pieces"][number], arrow_schema(job["card"], job["id_type"])
    source, (target, folder) = open_place(job["input"])[0], open_place(job["output"])
    path, temporary = f"{folder}/{part_name(number)}", f"{folder}/.{part_name(number)}.{uuid.uuid4().hex}.tmp"
    counts, began, cpu_s = {"rows": 0, "errors": 0, "tokens": 0, "positions": 0}, time.time(), time.process_time()
    try:
        with (
            target.open_output_stream(temporary) as stream,
            parquet.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False) as writer,
        ):
            for rows in blocks_of(read_rows(source, piece, job["columns"])):
                answers, tokens, positions = answer_block(answer, rows)
                writer.write_table(arrow_table(schema, rows, answers))
                errors = sum(isinstance(each, str) for each in answers)
                for name, value in zip(counts, (len(rows), errors, tokens, positions), strict=True):
                    counts[name] += value
                yield counts["rows"]
            if counts["rows"] != piece["rows"]:
                raise SystemExit(
                    f"{piece['name']}: expected {piece['rows']} rows, found {counts['rows']}; the file has changed"
                )
            counts |= {"began": began, "ended": time.time(), "cpu_s": time.process_time() - cpu_s}
            writer.add_key_value_metadata({COUNTS: json.dumps(counts)})
        target.move(temporary, path)
    except BaseException:
        remove(target, temporary)
        raise


def remove(system, path):
    """Remove a file, if it is there."""
    with contextlib.suppress(OSError):
        system.delete_file(path)


class Worker:
    """What Ray Data calls with numbers of pieces; it opens the model once."""

    def __init__(self, job):
        self.job, self.answer, self.failure = job, None, None
        try:
            card = read_card(job["repository"])
            if job["url"]:
                self.answer = open_served(card, job["url"], job["timeout_s"])
            else:
                self.answer = open_in_process(job["repository"], card, job["graph"])
        except (SystemExit, Exception) as error:  # raised here, Ray would start the worker again without end
            self.failure = said(error)

    def __call__(self, batch):
        """Yield what there is to tell of the pieces: {"piece", "rows" done, "failure" or ""}."""
        for number in map(int, batch["piece"]):
            try:
                if self.failure:
                    raise SystemExit(self.failure)
                for rows in write_piece(self.job, number, self.answer):
                    yield report(number, rows)
            except (SystemExit, Exception) as error:
                yield report(number, 0, f"{self.job['pieces'][number]['name']}: {said(error)}")
                return


def report(number, rows, failure=""):
    """A batch of one row, as Ray Data takes it."""
    return {"piece": [number], "rows": [rows], "failure": [failure]}


def said(error):
    """The words of an error, in one line."""
    return (
        first_line(error) if isinstance(error, SystemExit | OSError) else f"{type(error).__name__}: {first_line(error)}"
    )
