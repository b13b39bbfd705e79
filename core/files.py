"""Where things lie, and how files are read and written: never half of one, never lost."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ROOT / "model_repository"
ASSETS = ROOT / "assets"
RESULTS = ROOT / "results"
TEXTS = ASSETS / "texts.txt"


@contextlib.contextmanager
def replace_when_done(path):
    """Yield a temporary neighbour of `path`; move it there only if the block succeeds.

    An interrupted or failed step therefore leaves the previous file or none, never half
    of one. Raises whatever the block raises.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SystemExit(f"{path}: expected room for it on the disk, found: {error.strerror}; free some") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise SystemExit(f"{path}: expected a place to write to, found: {error.strerror}; name another") from None
        raise
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written there is nothing to remove
            temporary.unlink()


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    with replace_when_done(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path, remedy):
    """Read a JSON file; exit with `remedy` if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path}: expected a file, found none; {remedy}") from None
    except ValueError as error:
        raise SystemExit(f"{path}: expected JSON, found {error}; {remedy}") from None


def sha256(*paths):
    """SHA-256 of the content of files, one after the other, as hexadecimal text."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_texts(path, option="--texts"):
    """Texts of a UTF-8 file, one a line; empty lines are skipped. Exits if none is left; `option` names the file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise SystemExit(f"{path}: expected a text file, found {error.strerror}; name one with {option}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: expected UTF-8, found {error}; convert the file") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise SystemExit(f"{path}: expected at least one text, found none; write one text a line")
    return texts


def spread(texts, limit):
    """At most `limit` texts, evenly spread, so that a short run sees every kind of text."""
    if limit is None or limit >= len(texts):
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]


def split_texts(texts):
    """(calibration texts, evaluation texts): every second line each, so both are varied."""
    return texts[0::2], texts[1::2]


def evaluation_texts(file=None):
    """The texts that measure: those of a file, by default the half of assets/texts.txt that neither calibrates nor selects."""
    return read_texts(file) if file else split_texts(read_texts(TEXTS))[1]


@contextlib.contextmanager
def replace_folder_when_done(folder):
    """replace_when_done for a folder: yield an empty neighbour, and swap the two only if the block succeeds.

    The old folder is moved aside, the new one into its place, and only then is the old one deleted: at every
    moment one of the two is there whole. A running server keeps the files that it has open.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    old = temporary.with_suffix(".old")
    try:
        temporary.chmod(0o755)  # mkdtemp's is for one user; the server in a container is another
        yield temporary
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():  # else the old one could not be put back, and is all that there is
            shutil.rmtree(old, ignore_errors=True)


def slug(name):
    """A folder name for a model or machine: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")
