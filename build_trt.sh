#!/usr/bin/env bash
# Build the four TensorRT plans FP32, FP16, INT8 and BEST with trtexec, and prove them.
# Usage: ./build_trt.sh [options]
#   --only P               FP32, FP16, INT8 or BEST
#   --dry-run              print the exact commands and run nothing
#   --docker               use the pinned Triton image, the one that serves
#   --no-tf32              FP32 arithmetic with a 23-bit mantissa; by default GPUs from
#                          compute capability 8.0 on multiply FP32 as TF32 (10 bits)
#   --plain-int8           TensorRT 10 only: --int8 and --best on the reference graph,
#                          for comparison; without Q/DQ and calibration TensorRT has no
#                          ranges, so transformers fall back to FP32 and FP16
#   --opt-batch N          the batch that tactics are chosen for, 1 to 8, default 4
#   --workspace MIB        memory that a tactic may use, default: all
#   --timing-cache FILE    default build/trt/timing.cache
#   --model-repository DIR  --results DIR
# Reads:  model_ONNX/1/model.onnx, model_TRT_*/1/model.onnx (torch2onnx.py, quantize.py).
# Writes: model_TRT_*/1/model.plan, layers.json, manifest.json; build/trt/*.log;
#         results/<model>/plans.json.
# Prints: one line per plan: size, build time, weight MatMuls per precision.
# trtexec: $TRTEXEC, PATH, /usr/src/tensorrt/bin, else the pinned image through Docker.
set -euo pipefail

readonly IMAGE=nvcr.io/nvidia/tritonserver:26.05-py3 # the last Triton with TensorRT 10
readonly IN_IMAGE=/usr/src/tensorrt/bin/trtexec MAX_BATCH=8
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT LOGS=$ROOT/build/trt

fail() {
  echo "build_trt.sh: $1" >&2
  exit "${2:-1}"
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse_args() {
  precisions=(FP32 FP16 INT8 BEST) dry_run='' docker='' tf32=() plain='' opt_batch=4 workspace=()
  cache=$LOGS/timing.cache repository=$ROOT/model_repository results=$ROOT/results
  while [ $# -gt 0 ]; do
    case $1 in
      --only | --opt-batch | --workspace | --timing-cache | --model-repository | --results)
        [ $# -gt 1 ] || fail "$1: expected a value; see -h" 2
        ;;
    esac
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --docker) docker=1 ;;
      --no-tf32) tf32=(--noTF32) ;;
      --plain-int8) plain=--plain ;;
      --only)
        [[ $2 =~ ^(FP32|FP16|INT8|BEST)$ ]] || fail "--only: expected FP32, FP16, INT8 or BEST, found '$2'" 2
        precisions=("$2") && shift
        ;;
      --opt-batch)
        [[ $2 =~ ^[1-$MAX_BATCH]$ ]] || fail "--opt-batch: expected 1 to $MAX_BATCH, found '$2'" 2
        opt_batch=$2 && shift
        ;;
      --workspace)
        [[ $2 =~ ^[0-9]+$ ]] || fail "--workspace: expected MiB, found '$2'" 2
        workspace=("--memPoolSize=workspace:$2") && shift
        ;;
      --timing-cache) cache=$2 && shift ;;
      --model-repository) repository=$2 && shift ;;
      --results) results=$2 && shift ;;
      *) fail "$1: unknown option; see -h" 2 ;;
    esac
    shift
  done
  [ -d "$repository" ] || fail "--model-repository: expected a folder, found none at $repository"
  repository=$(cd "$repository" && pwd)
  python=$ROOT/.venv/bin/python
  [ -x "$python" ] || python=$(command -v python3) || fail "expected python3 on PATH, found none; run ./install.sh"
  plans=("$python" "$ROOT/plans.py" --repository "$repository" --assets "$(dirname "$repository")/assets" --results "$results")
}

# Sets trtexec (the command), and models and cache as that command sees them.
find_trtexec() {
  models=$repository
  local found
  [ -n "$docker" ] || [ -z "${TRTEXEC:-}" ] || [ -x "$TRTEXEC" ] || fail "\$TRTEXEC: expected a program, found none at $TRTEXEC"
  for found in "${TRTEXEC:-}" "$(command -v trtexec || true)" "$IN_IMAGE"; do
    if [ -z "$docker" ] && [ -n "$found" ] && [ -x "$found" ]; then
      trtexec=("$found")
      return
    fi
  done
  # --user: the files in the mounted folders belong to whoever builds
  trtexec=(docker run --rm --init --gpus all --user "$(id -u):$(id -g)" -v "$repository:/models" -v "$(dirname "$cache"):/cache" "$IMAGE" "$IN_IMAGE")
  models=/models
  cache=/cache/${cache##*/}
  [ -n "$dry_run" ] && return
  docker info >/dev/null 2>&1 || fail "expected trtexec or a running Docker, found neither; three ways on: 1. TRTEXEC=/path/to/trtexec; 2. install TensorRT, whose trtexec lies in /usr/src/tensorrt/bin; 3. install Docker and the NVIDIA container toolkit"
}

# Major version from the line that trtexec prints first: "[TensorRT v101601]" is 10.16.1.
read_version() {
  if [ -n "$dry_run" ] && [ "${trtexec[0]}" = docker ]; then
    version=101601 # the pinned image's
  else
    "${trtexec[@]}" --help >"$LOGS/version.log" 2>&1 || true
    version=$(sed -n '/\[TensorRT v[0-9]/{s/.*\[TensorRT v\([0-9]*\)\].*/\1/p;q}' "$LOGS/version.log")
    if [ -z "$version" ]; then
      tail -n 5 "$LOGS/version.log" >&2
      fail "${trtexec[*]}: expected a line with its TensorRT version, found none: $(explain "$LOGS/version.log")"
    fi
  fi
  major=$((version / 10000))
  [ "$major" -ge 10 ] || fail "${trtexec[*]}: expected TensorRT 10 or later, found version $version; use --docker"
  [ -z "$plain" ] || [ "$major" -eq 10 ] || fail "--plain-int8: expected TensorRT 10, found $major, whose trtexec has no precision flags"
}

# Sets graph, flags and built_as of a precision. TensorRT 10 takes flags; from 11 on the
# types in the graph are the precision.
choose_graph() {
  local reference=model_ONNX/1/model.onnx typed=model_TRT_$1/1/model.onnx
  built_as=flags
  if [ "$major" -ge 11 ]; then
    graph=$typed flags=() built_as=typed
    return
  fi
  case $1 in
    FP32) graph=$reference flags=() ;;
    FP16) graph=$reference flags=(--fp16) ;;
    INT8) graph=$typed flags=(--int8) ;;
    BEST) graph=$typed flags=(--best) ;;
  esac
  [ -z "$plain" ] || graph=$reference
}

# Sets command; $2 and $3 are the plan and the layer file to write.
make_command() {
  choose_graph "$1"
  command=(
    "${trtexec[@]}"
    "--onnx=$models/$graph"
    "--saveEngine=$2"
    "--minShapes=${shapes[0]}"
    "--optShapes=${shapes[1]}"
    "--maxShapes=${shapes[2]}"
    --skipInference
    --profilingVerbosity=detailed
    "--exportLayerInfo=$3"
    "--timingCacheFile=$cache"
    ${flags[@]+"${flags[@]}"}
    ${tf32[@]+"${tf32[@]}"}
    ${workspace[@]+"${workspace[@]}"}
  )
}

check_space() {
  local needed available
  needed=$((2 * $(stat -c %s "$repository/$graph") / 1024))
  available=$(df -Pk "$repository" | awk 'NR == 2 {print $4}')
  [ "$available" -ge "$needed" ] && return
  echo "build_trt.sh: $repository: expected $((needed / 1024)) MiB of free disk, found $((available / 1024)) MiB; free some" >&2
  return 1
}

# One clear line for the failures that machines without a fitting GPU give.
explain() {
  if grep -qiE 'no CUDA-capable device|CUDA initialization failure|Failed to initialize NVML|could not select device driver' "$1"; then
    echo "no GPU can be seen; check nvidia-smi, and with --docker the NVIDIA container toolkit"
  elif grep -qiE 'driver version is insufficient|CUDA error 35|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH' "$1"; then
    echo "the GPU's driver is too old for this TensorRT; update it"
  elif grep -qiE 'no space left' "$1"; then
    echo "the disk is full; free some"
  else
    echo "see $1"
  fi
}

build() {
  local plain_here=''
  [[ $1 =~ INT8|BEST ]] && plain_here=$plain
  local precision=$1 folder=$repository/model_TRT_$1/1 log=$LOGS/$1.log started=$SECONDS name
  name=.$1.$$.tmp # hidden neighbours of the plan, removed whatever happens
  temporary=("$folder/model.plan$name" "$folder/layers.json$name")
  make_command "$precision" "$models/model_TRT_$precision/1/model.plan$name" "$models/model_TRT_$precision/1/layers.json$name"
  check_space || return 1
  echo "building $precision, minutes (log: $log)" >&2
  if ! "${command[@]}" >"$log" 2>&1; then
    tail -n 10 "$log" >&2
    echo "build_trt.sh: $precision: expected trtexec to build it, found it failing: $(explain "$log")" >&2
    return 1
  fi
  [ -s "${temporary[0]}" ] || { echo "build_trt.sh: $precision: expected a plan, found none or an empty file; see $log" >&2 && return 1; }
  "${plans[@]}" record --precision "$precision" --graph "$repository/$graph" --plan "${temporary[0]}" \
    --layers "${temporary[1]}" --log "$log" --built-as "$built_as" $plain_here --seconds $((SECONDS - started)) -- "${command[@]}"
}

clean() { rm -f ${temporary[@]+"${temporary[@]}"}; }

main() {
  parse_args "$@"
  mkdir -p "$LOGS"
  find_trtexec
  read_version
  length=$("${plans[@]}" length) || exit 1
  mapfile -t shapes < <("${plans[@]}" shapes --opt-batch "$opt_batch")
  [ ${#shapes[@]} -eq 3 ] || fail "expected the graph's shapes, found none; run torch2onnx.py"
  local precision failed=()
  if [ -n "$dry_run" ]; then
    echo "# TensorRT $major (${trtexec[0]}), length $length" >&2
    for precision in "${precisions[@]}"; do
      make_command "$precision" "$models/model_TRT_$precision/1/model.plan" "$models/model_TRT_$precision/1/layers.json"
      printf '%q ' "${command[@]}" && echo
    done
    return
  fi
  "${plans[@]}" graphs "${precisions[@]}" || exit 1
  [ -z "$plain" ] || echo "--plain-int8: no ranges are known, so INT8 layers are not to be expected; the table says what was built" >&2
  trap clean EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  for precision in "${precisions[@]}"; do
    build "$precision" || failed+=("$precision")
    clean
  done
  if [ ${#failed[@]} -lt ${#precisions[@]} ]; then "${plans[@]}" summary >/dev/null; fi
  [ ${#failed[@]} -eq 0 ] || fail "expected ${#precisions[@]} plans, found ${failed[*]} failing; the others were kept"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
