"""Names of a checkpoint's classes, from the checkpoint or from --labels."""

import json
import sys

GENERIC = "LABEL_"  # what transformers calls classes that nobody named


def warn_of_labels(name, labels):
    """Say it where nobody named the classes."""
    if labels and all(label.startswith(GENERIC) for label in labels):
        found = ", ".join(labels)
        print(
            f"WARNING: {name}: expected labels in id2label, found only {found}; name them with --labels FILE",
            file=sys.stderr,
        )


def read_labels(given, config, folder):
    """Names of the classes in the order of the logits, from a record, --labels or the checkpoint's id2label.

    given: a list of names, the path of a file, or None.
    """
    if isinstance(given, list):
        return given if len(given) == config.num_labels else [f"{GENERIC}{i}" for i in range(config.num_labels)]
    where = given or folder / "config.json"
    table = parse_labels(given) if given else {int(i): name for i, name in (config.id2label or {}).items()}
    count = config.num_labels
    if len(table) != count or set(table) != set(range(count)):
        raise SystemExit(
            f"{where}: expected labels for the {count} logits, 0 to {count - 1}; found {len(table)}, for "
            f"{', '.join(map(str, sorted(table)))}; name every class once with --labels FILE"
        )
    labels = [str(table[i]) for i in range(count)]
    doubled = sorted({name for name in labels if labels.count(name) > 1 or not name.strip()})
    if doubled:
        raise SystemExit(
            f"{where}: expected {count} different names, found {doubled[0]!r} doubled or empty; correct it"
        )
    return labels


def parse_labels(path):
    """{index: name} of {"0": "negative", …} or of the inverted {"negative": 0, …}."""
    form = 'write {"0": "negative", "1": "positive"} or {"negative": 0, "positive": 1}'

    def refuse_doubled(pairs):
        keys = [key for key, _ in pairs]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise SystemExit(f"{path}: expected every label once, found {doubled!r} doubled; {form}")
        return dict(pairs)

    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_doubled)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--labels {path}: expected a JSON file of labels, found: {error}; {form}") from None
    if isinstance(table, dict) and table and all(key.isdecimal() for key in table):
        return {int(key): name for key, name in table.items()}
    if isinstance(table, dict) and table and all(type(value) is int for value in table.values()):
        if len(set(table.values())) < len(table):
            raise SystemExit(f"{path}: expected every class once, found two labels for one; {form}")
        return {index: name for name, index in table.items()}
    raise SystemExit(f"{path}: expected labels by class, found {str(table)[:60]}; {form}")
