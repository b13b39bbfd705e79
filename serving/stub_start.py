# What serve.sh adds to triton_python_backend_utils.py, which the process of every Python model imports first.
# ruff: noqa: F821

import locale as _locale
import sys as _sys

# the stub's interpreter reads no environment and starts in ASCII: print and open would fail on any other character
_locale.setlocale(_locale.LC_CTYPE, "C.UTF-8")
for _stream in (_sys.stdout, _sys.stderr):
    _stream.reconfigure(encoding="utf-8", errors="backslashreplace")

# the stub is built for NumPy 1 and ends without a word at the first array of a later one
if int(np.__version__.split(".")[0]) >= 2:
    raise ImportError(
        f"expected NumPy below 2 in the environment of a Python model, found {np.__version__} in {_sys.prefix}; "
        "pip install 'numpy<2' there"
    )
