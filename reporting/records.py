"""Records of results/, as the measuring scripts left them."""

from core.files import read_json


def read_record(path):
    """The record of a measurement; None where there is none."""
    if not path.is_file():
        return None
    record = read_json(path, "measure again")
    if not (isinstance(record, dict) and {"model", "environment"} <= record.keys()):
        raise SystemExit(f"{path}: expected a record of a measurement, found another; measure again")
    return record
