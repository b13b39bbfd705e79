#!/usr/bin/env bash
# Build the four TensorRT plans FP32, FP16, INT8 and BEST with trtexec, and prove them.
# Usage: ./build_trt.sh [options]
#   --precisions P...      of FP32 FP16 INT8 BEST, the default, and the further BF16 FP8
#                          of quantize.py --precisions; --only P is one of them
#   --dry-run              print the exact commands and run nothing
#   --docker               use the pinned Triton image, the one that serves
#   --typed                TensorRT 10 builds the typed graphs with --stronglyTyped, as 11
#                          always does; by default 10 takes the flags --fp16, --int8, --best
#   --no-tf32              FP32 arithmetic with a 23-bit mantissa; by default GPUs from
#                          compute capability 8.0 on multiply FP32 as TF32 (10 bits)
#   --plain-int8           TensorRT 10 only: --int8 and --best on the reference graph, for
#                          comparison; it has no Q/DQ and no calibration, so trtexec sets
#                          placeholder ranges of -2 to 2 and -4 to 4 on every tensor: what
#                          becomes INT8 is fast, and its embeddings mean nothing
#   --opt-batch N          the batch that tactics are chosen for, default 4
#   --opt-length N         and the length, where it is dynamic, default 128
#   --workspace MIB        memory that a tactic may use, default: all
#   --timing-cache FILE    default build/trt/timing.cache
#   --model-repository DIR  --results DIR
# Reads:  model_ONNX/1/model.onnx, model_TRT_*/1/model.onnx (torch2onnx.py, quantize.py).
# Writes: model_TRT_*/1/model.plan, layers.json, manifest.json; build/trt/*.log;
#         results/<model>/<machine>/plans.json.
# Prints: one line per plan: size, build time, weight MatMuls per precision.
# trtexec: $TRTEXEC, PATH, /usr/src/tensorrt/bin, else the pinned image through Docker.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT LOGS=$ROOT/build/trt IN_IMAGE=/usr/src/tensorrt/bin/trtexec

fail() {
  echo "build_trt.sh: $1" >&2
  exit "${2:-1}"
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Run a module of the project; from its folder, so that nothing in the user's shadows it.
module() { (cd "$ROOT" && "$python" -m "$@"); }

parse_args() {
  python=$ROOT/.venv/bin/python
  [ -x "$python" ] || python=$(command -v python3) || fail "expected python3 on PATH, found none; run ./install.sh"
  dry_run='' docker='' build_options=() tf32=() plain='' optimal=() workspace=()
  cache=$LOGS/timing.cache repository=$ROOT/model_repository results=$ROOT/results
  read -ra precisions <<<"$(module serving.ask precisions)"
  local known
  known="${precisions[*]} $(module serving.ask further)"
  while [ $# -gt 0 ]; do
    case $1 in
      --only | --precisions | --opt-batch | --opt-length | --workspace | --timing-cache | --model-repository | --results)
        [ $# -gt 1 ] || fail "$1: expected a value; see -h" 2
        ;;
    esac
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --docker) docker=1 ;;
      --typed) build_options=(--typed) ;;
      --no-tf32) tf32=(--noTF32) ;;
      --plain-int8) plain=--plain ;;
      --only | --precisions)
        precisions=()
        while [ $# -gt 1 ] && [[ $2 != -* ]]; do
          [[ " $known " == *" $2 "* ]] || fail "--precisions: expected of $known, found '$2'" 2
          precisions+=("$2") && shift
        done
        [ ${#precisions[@]} -gt 0 ] || fail "--precisions: expected of $known, found none" 2
        ;;
      --opt-batch | --opt-length | --workspace)
        [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1: expected a number from 1, found '$2'" 2
        if [ "$1" = --workspace ]; then workspace=("--memPoolSize=workspace:$2"); else optimal+=("$1" "$2"); fi
        shift
        ;;
      --timing-cache) cache=$2 && shift ;;
      --model-repository) repository=$2 && shift ;;
      --results) results=$2 && shift ;;
      *) fail "$1: unknown option; see -h" 2 ;;
    esac
    shift
  done
  [ -z "$plain" ] || [ ${#build_options[@]} -eq 0 ] || fail "--plain-int8: expected it without --typed, found both" 2
  [ -d "$repository" ] || fail "--model-repository: expected a folder, found none at $repository"
  repository=$(realpath "$repository") results=$(realpath -m "$results") cache=$(realpath -m "$cache")
}

# Sets trtexec (the command), and models and timing as that command sees repository and cache.
find_trtexec() {
  local found
  models=$repository timing=$cache
  [ -n "$docker" ] || [ -z "${TRTEXEC:-}" ] || [ -x "$TRTEXEC" ] || fail "\$TRTEXEC: expected a program, found none at $TRTEXEC"
  for found in "${TRTEXEC:-}" "$(command -v trtexec || true)" "$IN_IMAGE"; do
    if [ -z "$docker" ] && [ -n "$found" ] && [ -x "$found" ]; then
      trtexec=("$found")
      return
    fi
  done
  local image mounted_models mounted_cache
  image=$(module serving.ask image)
  mounted_models=$(module serving.ask mount "$repository" /models --writable) || exit 1
  mounted_cache=$(module serving.ask mount "$(dirname "$cache")" /cache --writable) || exit 1
  # --user: the files in the mounted folders belong to whoever builds
  trtexec=(
    docker run --rm --init --gpus all --user "$(id -u):$(id -g)"
    --mount "$mounted_models" --mount "$mounted_cache" "$image" "$IN_IMAGE"
  )
  models=/models timing=/cache/${cache##*/}
  [ -n "$dry_run" ] && return
  docker info >/dev/null 2>&1 || fail "expected trtexec or a running Docker, found neither; three ways on: 1. TRTEXEC=/path/to/trtexec; 2. install TensorRT, whose trtexec lies in /usr/src/tensorrt/bin; 3. install Docker and the NVIDIA container toolkit"
}

# Sets major from the line that trtexec prints first: "[TensorRT v101601]" is 10.16.1.
read_version() {
  local version log=$LOGS/version.$$.log
  if [ -n "$dry_run" ] && [ "${trtexec[0]}" = docker ]; then
    version=$(module serving.ask tensorrt)
    major=${version%%.*}
  else
    "${trtexec[@]}" --help >"$log" 2>&1 || true
    version=$(sed -n '/\[TensorRT v[0-9]/{s/.*\[TensorRT v\([0-9]*\)\].*/\1/p;q}' "$log")
    if [ -z "$version" ]; then
      tail -n 5 "$log" >&2
      fail "${trtexec[*]}: expected a line with its TensorRT version, found none: $(explain "$log")"
    fi
    major=$((version / 10000))
    rm -f "$log"
  fi
  [ "$major" -ge 10 ] || fail "${trtexec[*]}: expected TensorRT 10 or later, found version $version; use --docker$(module serving.ask needs "${precisions[@]}")"
  [ -z "$plain" ] || [ "$major" -eq 10 ] || fail "--plain-int8: expected TensorRT 10, found $major, whose trtexec has no precision flags"
  [ -z "$plain" ] || build_options=(--plain)
}

# Sets built_as, graph, folder and command of a precision; $2 ends the names of the files that it writes.
make_command() {
  local line flags
  line=$(module serving.ask build --precision "$1" --major "$major" "${build_options[@]}") || exit 1
  read -r built_as graph folder line <<<"$line"
  read -ra flags <<<"$line"
  command=(
    "${trtexec[@]}"
    "--onnx=$models/$graph"
    "--saveEngine=$models/$folder/model.plan$2"
    "--minShapes=${shapes[0]}"
    "--optShapes=${shapes[1]}"
    "--maxShapes=${shapes[2]}"
    --skipInference
    --profilingVerbosity=detailed
    "--exportLayerInfo=$models/$folder/layers.json$2"
    "--timingCacheFile=$timing"
    "${flags[@]}"
    "${tf32[@]}"
    "${workspace[@]}"
  )
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
  local precision=$1 log=$LOGS/$1.log started=$SECONDS hidden=.$1.$$.tmp
  make_command "$precision" "$hidden"
  # neighbours of the plan, removed whatever happens
  temporary=("$repository/$folder/model.plan$hidden" "$repository/$folder/layers.json$hidden")
  echo "building $precision, minutes (log: $log)" >&2
  if ! "${command[@]}" >"$log" 2>&1; then
    tail -n 10 "$log" >&2
    echo "build_trt.sh: $precision: expected trtexec to build it, found it failing: $(explain "$log")" >&2
    return 1
  fi
  module serving.build record --repository "$repository" --precision "$precision" --graph "$graph" \
    --plan "${temporary[0]}" --layers "${temporary[1]}" --log "$log" --built-as "$built_as" \
    ${plain:+"$plain"} --seconds $((SECONDS - started)) -- "${command[@]}" || return 1
  # from now on the plan is what a GPU serves
  module serving.repository --repository "$repository" >/dev/null
}

clean() { rm -f "${temporary[@]}"; }

main() {
  parse_args "$@"
  mkdir -p "$LOGS"
  find_trtexec
  [ -n "$dry_run" ] || mkdir -p "$(dirname "$cache")" # Docker mounts only what is there
  read_version
  local precision failed=() lines
  lines=$(module serving.build shapes --repository "$repository" "${optimal[@]}") || exit $?
  mapfile -t shapes <<<"$lines"
  if [ -n "$dry_run" ]; then
    echo "# TensorRT $major (${trtexec[0]})" >&2
    for precision in "${precisions[@]}"; do
      make_command "$precision" ''
      printf '%q ' "${command[@]}" && echo
    done
    return
  fi
  module serving.check --repository "$repository" >/dev/null || exit 1
  module serving.build graphs --repository "$repository" "${precisions[@]}" || exit 1
  [ -z "$plain" ] || echo "--plain-int8: the ranges are trtexec's placeholders, so these plans show a speed and no quality; the table says what was built" >&2
  temporary=()
  trap clean EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  for precision in "${precisions[@]}"; do
    build "$precision" || failed+=("$precision")
    clean
  done
  if [ ${#failed[@]} -lt ${#precisions[@]} ]; then
    module serving.build summary --repository "$repository" --results "$results" >/dev/null
  fi
  [ ${#failed[@]} -eq 0 ] || fail "expected ${#precisions[@]} plans, found ${failed[*]} failing; the others were kept"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
