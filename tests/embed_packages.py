"""The packages of embed.py's own requirements, in an environment beside the project's that is made once, in build/."""

import fcntl
import importlib.util
import sys

import pytest
from conftest import ROOT

from bench import install

REQUIREMENTS = "requirements-embed"


@pytest.fixture(scope="session")
def python():
    """An interpreter that has Ray; this one finds its packages too. Skips where they cannot be installed."""
    ray = importlib.util.find_spec("ray")
    if ray and ray.origin.startswith(sys.prefix):  # not what another file's tests appended to the path below
        return sys.executable
    install.BUILD.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open(install.BUILD / "embed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the suite runs in two processes
        patch.setattr(install, "REQUIREMENTS", ROOT / "serving")
        reason = None if install.is_installed(REQUIREMENTS) else install.install(REQUIREMENTS)
    if reason:
        pytest.skip(f"serving/{REQUIREMENTS}.txt cannot be installed: {reason}")
    found = install.python_of(REQUIREMENTS)
    sys.path.append(str(next(found.parents[1].glob("lib/python*/site-packages"))))
    return str(found)
