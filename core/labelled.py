"""Labelled texts from a TSV or CSV file: what train_classifier.py and verdicts.py read; sts.py reads its pairs so too.

Columns are named as in the file's first line, or numbered from 1 where it has none. Whatever
does not fit is named with its line.
"""

import csv
from pathlib import Path

from core.files import ASSETS

REVIEWS = ASSETS / "reviews.tsv"  # sentences written for this project


def add_column_arguments(parser):
    """The options that say where text and label lie, the same in every script."""
    help_text = "name in the first line, or a number from 1 where there is none (default: %(default)s)"
    parser.add_argument("--text-column", default="text", help=help_text)
    parser.add_argument("--label-column", default="label", help=help_text)


def read_rows(path, what):
    """[(line number, cells)] of a UTF-8 file, with or without a BOM: .csv by commas and quotes, any other by tabs.

    what: names the file's content where it is missing or empty.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            # a tab-separated file has no quoting: a quotation mark is a part of its text
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            reader = csv.reader(file, **({} if path.suffix == ".csv" else tabs))
            rows = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise SystemExit(f"{path}: expected {what}, found {error.strerror}; check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: expected UTF-8 text in columns, found {error}; convert the file") from None
    if not rows:
        raise SystemExit(f"{path}: expected {what}, found an empty file; fill it")
    return rows


def find_columns(path, first, columns):
    """Indices of the columns, and whether the first line only names them."""
    missing = [c for c in columns if not c.isdecimal() and c not in first]
    if missing:
        raise SystemExit(
            f"{path}: expected a column named {missing[0]} in the first line, found {', '.join(first)[:80]}; "
            "name columns with --text-column and --label-column, or number them from 1"
        )
    indices = [int(c) - 1 if c.isdecimal() else first.index(c) for c in columns]
    return indices, not all(c.isdecimal() for c in columns)


def read_labelled(path, text_column, label_column):
    """(texts, labels) of a file, both lists of str. Exits on a wrong column or an empty cell."""
    rows = read_rows(path, "a file of labelled texts")
    indices, named = find_columns(path, rows[0][1], (text_column, label_column))
    texts, labels = [], []
    for line, cells in rows[1:] if named else rows:
        if max(indices) >= len(cells) or min(indices) < 0:
            raise SystemExit(
                f"{path}: expected {max(indices) + 1} columns in line {line}, found {len(cells)}; "
                "correct the line, or --text-column and --label-column"
            )
        text, label = (cells[i].strip() for i in indices)
        for what, value in (("text", text), ("label", label)):
            if not value:
                raise SystemExit(f"{path}: expected a {what} in line {line}, found none; fill it in or drop the line")
        texts.append(text)
        labels.append(label)
    if not texts:
        raise SystemExit(f"{path}: expected at least one labelled text, found none; write one a line")
    return texts, labels


def class_indices(path, labels, names):
    """Labels of a file -> class indices: all are the model's names, or else all are its numbers.

    Names first: of classes called 1, 2 and 3 a file with 1 and 2 means those.
    """
    by_name, by_number = {name: i for i, name in enumerate(names)}, {str(i): i for i in range(len(names))}
    for table in (by_name, by_number):
        if set(labels) <= set(table):
            return [table[label] for label in labels]
    unknown = sorted(set(labels) - set(by_name) - set(by_number))
    raise SystemExit(
        f"{path}: expected labels {', '.join(names)} or 0 to {len(names) - 1}, found "
        f"{unknown[0] if unknown else 'names and numbers mixed'}; name the column with --label-column, or correct the labels"
    )
