#!/usr/bin/env bash
# Bake a model repository into an image that needs no network to start.
# Usage: deploy/make_image.sh MODEL [options]      make it
#        deploy/make_image.sh clean [--name N]     remove what this script made, nothing else
#   MODEL                  a repository of any task; or a package of verdicts.py; or a
#                          checkpoint, as torch2onnx.py takes it
#   --task T               of a checkpoint (default: classification)
#   --name N               of the service and of the build context (default: MODEL's own)
#   --tag T                of the image (default: <name>:<precision>)
#   --precision P          ONNX, FP32, FP16, INT8 or BEST; ONNX or FP16 of a task that generates
#                          (default: ONNX, or the package's)
#   --max-batch-size B     texts in one request (default: 8, or the repository's)
#   --gpu                  for a GPU: serve the TensorRT plan where there is one
#   --dry-run              print the commands and run nothing
#   --no-build             write the build context and leave the image out
# Reads:  MODEL, deploy/Dockerfile. Writes: build/image/<name>/, the build context; the image.
# Prints: "made: T" and the commands that run it, here and in a cluster.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT

fail() {
  echo "make_image.sh: $1" >&2
  exit "${2:-1}"
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Find python, and how a module of the project runs: from its folder, so that nothing in the user's shadows it.
find_python() {
  python=$ROOT/.venv/bin/python
  [ -x "$python" ] || python=$(command -v python3) || fail "expected python3 on PATH, found none; run ./install.sh"
  module=(env -C "$ROOT" "$python" -m)
}

parse_args() {
  model=${1:-} name='' tag='' precision='' batch=() gpu='' dry_run='' build=1 task=classification
  case $model in
    -h | --help) usage && exit 0 ;;
    '' | --*) fail "expected MODEL or clean first, found '$model'; see -h" 2 ;;
  esac
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --name | --tag | --task | --precision | --max-batch-size) [ $# -gt 1 ] || fail "$1: expected a value; see -h" 2 ;;
    esac
    case $1 in
      -h | --help) usage && exit 0 ;;
      --name) name=$2 && shift ;;
      --tag) tag=$2 && shift ;;
      --task) task=$2 && shift ;;
      --precision) precision=$2 && shift ;;
      --max-batch-size) batch=(--max-batch-size "$2") && shift ;;
      --gpu) gpu=1 ;;
      --dry-run) dry_run=1 ;;
      --no-build) build='' ;;
      *) fail "$1: unknown option; see -h" 2 ;;
    esac
    shift
  done
  find_python
  [[ ${batch[1]-1} =~ ^[1-9][0-9]*$ ]] || fail "--max-batch-size: expected a number from 1, found '${batch[1]}'" 2
}

# Run a command, or with --dry-run only print it.
run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# Sets kind (package, repository or checkpoint), name, precision and tag.
read_model() {
  local own_name own_precision own_task source known
  [ ! -e "$model" ] || model=$(realpath "$model")
  source=$("${module[@]}" serving.ask source "$model") || exit 1
  read -r kind own_precision own_name own_task <<<"$source"
  name=${name:-$own_name} precision=${precision:-$own_precision} task=${own_task:-$task}
  known=$("${module[@]}" serving.ask models "$task") || exit 2
  [[ " $known " == *" $precision "* ]] || fail "--precision: expected one of $known for --task $task, found '$precision'" 2
  check_name
  tag=${tag:-${name,,}:${precision,,}}
  [[ $tag =~ ^[a-z0-9][a-z0-9._/-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?$ ]] || fail "--tag: expected an image's name such as reviews:1, found '$tag'" 2
  [[ $tag == *:* ]] || tag=$tag:latest # as Docker reads it
}

check_name() {
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || fail "--name: expected letters, digits, dots and dashes, found '$name'" 2
  context=$ROOT/build/image/$name
}

# Exit with Docker's own reason where it does not run; $1 is the way out.
need_docker() {
  local reason
  reason=$(docker info 2>&1 >/dev/null) || fail "expected a running Docker, found: ${reason//$'\n'/; }; $1"
}

# Sets repository, with the graphs: that of the model or package, or an export of the checkpoint.
find_repository() {
  repository=$model
  if [ "$kind" = package ]; then
    run rm -rf "$context/package"
    run mkdir -p "$context/package"
    run tar -xzf "$model" -C "$context/package" --strip-components=1
    run "${module[@]}" serving.ask manifest "$context/package"
    repository=$context/package/model_repository
  elif [ "$kind" = checkpoint ]; then
    # not build/<name>: that may be the checkpoint, or a repository with graphs that are still wanted
    repository=$context/export
    run rm -rf "$repository"
    run "$python" "$ROOT/torch2onnx.py" --task "$task" --model "$model" --name "$name" --repository "$repository"
    [ "$precision" = ONNX ] || run "$python" "$ROOT/quantize.py" --repository "$repository" --only "$precision"
  fi
}

write_context() {
  if [ -e "$context" ] && [ ! -f "$context/made" ]; then
    fail "$context: expected a build context of this script, found something else; choose another --name"
  fi
  run mkdir -p "$context"
  run touch "$context/made"
  find_repository
  local engine=() # as the repository's record says
  [ -z "$gpu" ] || [ ! -f "$repository/model_TRT_$precision/1/model.plan" ] || engine=(--engine tensorrt)
  run "${module[@]}" serving.repository --repository "$repository" --precision "$precision" \
    --name "$name" "${engine[@]}" "${batch[@]}" --output "$context/model_repository"
  # the server is another user than the one who builds
  run chmod -R a+rX,go-w "$context/model_repository"
  run cp "$ROOT/deploy/Dockerfile" "$ROOT/deploy/.dockerignore" "$ROOT/serving/health.py" "$context"
  [ -n "$dry_run" ] || write_kustomization
}

# The manifests of a cluster, with this image.
write_kustomization() {
  local overlay=base
  [ -z "$gpu" ] || overlay=gpu
  cat >"$context/kustomization.yaml" <<EOF
# kubectl apply -k this folder, after the image is in a registry; see deploy/kubernetes/README.md
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../../../deploy/kubernetes/$overlay]
images: [{name: expected-the-image-of-make_image.sh, newName: ${tag%:*}, newTag: "${tag##*:}"}]
EOF
}

# Remove the images whose ids come in; by id: a tag may by now be another's image.
remove_images() {
  local id reason
  while read -r id; do
    docker image inspect "$id" >/dev/null 2>&1 || continue # removed already
    reason=$(docker image rm "$id" 2>&1) || fail "$id: expected an image that can be removed, found: ${reason//$'\n'/; }; correct that, then clean again"
    echo "removed: image $id"
  done
}

clean() {
  local made ids
  for made in "$ROOT"/build/image/${name:-*}/made; do
    [ -f "$made" ] || continue
    made=${made%/made}
    # image.id too: an interrupted run did not come to the list
    ids=$(cat "$made/images" "$made/image.id" 2>/dev/null | sort -u) || true
    if [ -n "$ids" ]; then
      need_docker "start it, so that the images of ${made#"$ROOT"/} can be removed with it"
      remove_images <<<"$ids"
    fi
    rm -rf "$made"
    echo "removed: ${made#"$ROOT"/}"
  done
}

main() {
  parse_args "$@"
  if [ "$model" = clean ]; then
    [ -z "$name" ] || check_name
    clean
    return
  fi
  read_model
  # before minutes are spent on an export
  if [ -n "$build" ] && [ -z "$dry_run" ]; then need_docker "start it, or see --no-build and --dry-run"; fi
  write_context
  local options=(--rm -p 127.0.0.1:8000:8000) profile=cpu
  [ -z "$gpu" ] || options+=(--gpus all) profile=gpu
  if [ -n "$build" ]; then
    # no network: the base image has all that is needed
    run docker build --network none --tag "$tag" --iidfile "$context/image.id" --label "service=$name" "$context"
    # the file has no line end, and the next image of this name overwrites it
    [ -n "$dry_run" ] || echo "$(<"$context/image.id")" >>"$context/images"
  fi
  [ -n "$dry_run" ] || echo "made: ${build:+$tag, }${context#"$ROOT"/}"
  echo "run: docker run ${options[*]} $tag, or IMAGE=$tag docker compose -f $ROOT/deploy/compose.yaml --profile $profile up --wait"
  echo "cluster: docker push $tag, then kubectl apply -k $context; see deploy/kubernetes/README.md"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
