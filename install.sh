#!/usr/bin/env bash
# Make .venv and install requirements.txt into it, unless that was done already.
# Usage: ./install.sh
# Reads:  requirements.txt. Writes: .venv/.
# Prints: ".venv is up to date"
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT VENV=$ROOT/.venv

fail() {
  echo "install.sh: $1" >&2
  exit 1
}

find_python() {
  local name
  for name in python3 python3.12 python3.11 python3.10; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "expected Python 3.10 to 3.12 on PATH, found $(python3 --version 2>&1 || echo none); install one of them"
}

main() {
  case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
  if cmp -s "$ROOT/requirements.txt" "$VENV/installed.txt"; then
    echo ".venv is up to date"
    return
  fi
  local python
  python=$(find_python)
  "$python" -m venv "$VENV" || fail "expected $python to make a virtual environment, found it failing; see the line above: remove .venv, or install the venv module"
  echo "installing requirements.txt into .venv with $("$python" --version)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" ||
    fail "expected pip to install requirements.txt, found it failing; see the lines above"
  # only now: an interrupted installation is done again
  cp "$ROOT/requirements.txt" "$VENV/installed.txt"
  echo ".venv is up to date"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
