"""Environments of models that need other packages, or another Python, than the server."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

MADE_OF = "made_of.txt"  # the requirements that an environment was made of, in its folder
ASK = (
    "import json, sys, sysconfig; get = sysconfig.get_config_var; "
    "print(json.dumps(['%d.%d' % sys.version_info[:2], get('LIBDIR'), get('MULTIARCH'), get('INSTSONAME')]))"
)


def run(*command):
    """Run a command quietly and return what it prints; exits with its last words where it fails."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{command[0]}: expected a program, found {error.strerror}; name another") from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no words"]
        raise SystemExit(f"{' '.join(command)}: expected success, found exit {done.returncode}: {last[0]}")
    return done.stdout


def python_of(python):
    """(version such as 3.11, path of its shared library or None) of a Python."""
    version, libraries, machine, library = json.loads(run(python, "-c", ASK))
    places = [Path(libraries) / library, Path(libraries) / str(machine) / library]
    return version, next((path for path in places if ".so" in library and path.exists()), None)


def make_environment(folder, *requirements, python=sys.executable, without=()):
    """A venv in this folder with the packages of the files, unless it is there; returns the version of Python.

    Of several files each is installed over the one before. A file called …no-deps.txt is taken as it stands.
    without: packages that come with others and are taken away again.
    """
    version, library = python_of(python)
    made_of = version + "\n" + "".join(path.read_text(encoding="utf-8") for path in requirements)
    record = folder / MADE_OF
    if record.is_file() and record.read_text(encoding="utf-8") == made_of:
        return version
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise SystemExit(f"{folder}: expected no folder or an environment, found another folder; name another")
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    for path in requirements:
        options = ["--no-deps"] if path.name.endswith("no-deps.txt") else []
        run(folder / "bin/python", "-m", "pip", "install", "--quiet", *options, "-r", path)
    if without:
        run(folder / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", *without)
    # the stub is linked against it, and takes what lies here before the system's of another patch release
    if library:
        (folder / "lib" / library.name).symlink_to(library)
    record.write_text(made_of, encoding="utf-8")
    return version


def environment_parameter(folder):
    """Lines of a config.pbtxt that name the environment of a model, for a server without the stock backend."""
    return f'parameters: {{\n  key: "EXECUTION_ENV_PATH"\n  value: {{ string_value: "{folder}" }}\n}}\n'
