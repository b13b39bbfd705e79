#!/usr/bin/env bash
# Lint, then test: against the real server with the packaged MiniLM's real weights.
# Usage: ./test.sh [--examples] [pytest options]
#   options: those tests, in one process; without any, the whole suite in two
#   --examples: also what installs packages of examples or trains their models for minutes
# Reads:  the whole project. Writes: .venv/, build/test*/; build/kubectl/ and build/promtool/ where PATH has neither.
# Prints: ruff's, shellcheck's, hadolint's and pytest's summaries.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT BIN=$ROOT/.venv/bin

main() {
  case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
  cd "$ROOT"
  if [ "${1:-}" = --examples ]; then
    export EXAMPLES=1 ALL_PAIRS=1
    shift
  fi
  ./install.sh
  "$BIN/ruff" check --config .ci/ruff.toml .
  "$BIN/ruff" format --config .ci/ruff.toml --check .
  "$BIN/shellcheck" ./*.sh deploy/*.sh serving/*.sh .ci/run
  echo "shellcheck: no findings"
  "$BIN/hadolint" deploy/Dockerfile
  echo "hadolint: no findings"
  "$BIN/python" report.py --check
  if [ $# -gt 0 ]; then
    "$BIN/python" -m pytest -ra --durations 25 "$@"
    return
  fi
  # a file's tests share a server, so a file stays in one process
  "$BIN/python" -m pytest -ra --durations 25 -n 2 --dist loadfile --no-loadscope-reorder
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
