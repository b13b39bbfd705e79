#!/usr/bin/env bash
# Start, stop or look at the Triton server of the model repository.
# Usage: ./serve.sh start|stop|status|run [options]
#   start    start in the background, wait until every model is ready
#   run      the same in the foreground; Ctrl-C stops it
#   stop     stop the server that was started on this HTTP port
#   status   say whether it runs and answers a real question; exit 1 if not
# Options:
#   --device auto|cpu|gpu     gpu: docker run of the pinned Triton image; cpu: the
#                             pip-installed Triton (default auto: gpu where there is
#                             Docker and a GPU)
#   --model-repository DIR    of any task; default model_repository/ beside this script,
#                             which has record and tokenizer in assets/ beside it; again for
#                             several repositories in one server
#   --any-repository DIR      of any models, such as those of examples/, as they are; again for several. A model
#                             that does not load is named, the others serve
#   --path auto|ensemble      on a CPU a service is one model that does all in one pass; ensemble:
#                             the models of the repository one by one, as on a GPU (and as the
#                             measurements of single models need it)
#   --engine E --precision P  of the one pass: onnxruntime or openvino; default: the repository's
#   --http-port N  --grpc-port N  --metrics-port N      8000, 8001, 8002
#   --timeout-s N             how long models may load, 300
#   --drain-s N               how long requests in flight may go on after a stop, 30
#   --supervise               start the server anew when it dies or no longer answers a question
#   --guard                   HAProxy in front (deploy/haproxy.cfg): bounds on a body, on the time it takes to
#                             arrive, and on the requests at a time; above them 413, 408 and 429
# Reads:  the model repository. Writes: build/serve/<http port>/.
# Prints: "ready: http 127.0.0.1:8000, grpc 127.0.0.1:8001 (cpu)"
# The server of the pip package (Triton 2.51) is for programs of this machine that you trust.
set -euo pipefail
unset PYTHONPATH # a user's packages would stand before those of .venv

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT

fail() {
  echo "serve.sh: $1" >&2
  exit "${2:-1}"
}

# shellcheck source=serving/server_command.sh
source "$ROOT/serving/server_command.sh"

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Run a module of the project; from its folder, so that nothing in the user's shadows it.
module() { (cd "$ROOT" && "$python" -m "$@"); }

parse_args() {
  command=${1:-}
  case $command in
    start | stop | status | run) shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "expected start, stop, status or run, found '$command'; see -h" 2 ;;
  esac
  device=auto repositories=() others=() path=auto one_pass=()
  http_port=8000 grpc_port=8001 metrics_port=8002 timeout_s=300 drain_s=30 supervise=no guard=no
  while [ $# -gt 0 ]; do
    if [ "$1" = --supervise ]; then supervise=yes && shift && continue; fi
    if [ "$1" = --guard ]; then guard=yes && shift && continue; fi
    [ $# -gt 1 ] || fail "$1: expected a value; see -h" 2
    case $1 in
      --device) device=$2 ;;
      --model-repository) repositories+=("$2") ;;
      --any-repository) others+=("$2") ;;
      --path) path=$2 ;;
      --engine | --precision) one_pass+=("$1" "$2") ;;
      --http-port) http_port=$2 ;;
      --grpc-port) grpc_port=$2 ;;
      --metrics-port) metrics_port=$2 ;;
      --timeout-s) timeout_s=$2 ;;
      --drain-s) drain_s=$2 ;;
      *) fail "$1: unknown option; see -h" 2 ;;
    esac
    shift 2
  done
  [ $((${#repositories[@]} + ${#others[@]})) -gt 0 ] || repositories=("$ROOT/model_repository")
  local number
  for number in "$http_port" "$grpc_port" "$metrics_port" "$timeout_s" "$drain_s"; do
    [[ $number =~ ^[0-9]{1,5}$ ]] || fail "expected a number of at most five digits, found '$number'; see -h" 2
  done
  for number in "$http_port" "$grpc_port" "$metrics_port"; do
    [ "$number" -gt 0 ] && [ "$number" -lt 65536 ] || fail "expected a port from 1 to 65535, found $number; see -h" 2
  done
  [[ $path =~ ^(auto|ensemble)$ ]] || fail "--path: expected auto or ensemble, found '$path'" 2
  case $device in
    auto) device=cpu && has_gpu && device=gpu ;;
    cpu | gpu) ;;
    *) fail "--device: expected auto, cpu or gpu, found '$device'" 2 ;;
  esac
  state=$ROOT/build/serve/$http_port
  python=$ROOT/.venv/bin/python
  [ -x "$python" ] || python=$(command -v python3) || fail "expected python3 on PATH, found none; run ./run.sh"
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

# The pid of our own server on this port, or nothing. A pid may be reused by another
# program, so the start time noted with it has to match too.
server_pid() {
  local pid started
  read -r pid started 2>/dev/null <"$state/server.pid" || return 0
  [ "$(start_time "$pid")" = "$started" ] && echo "$pid"
  return 0
}

start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# Triton starts a model's process through a shell, with these paths unquoted.
plain_path() {
  [[ $1 =~ ^[A-Za-z0-9_./@%+=:,~-]+$ ]] ||
    fail "$1: expected a path of letters, digits and ._/@%+=:,~- only, found others; move the folder"
}

# The health check's question of a repository; the task's own keeps its record in assets/ beside it.
question_of() {
  if [ -f "$1/model.json" ]; then echo "$1/health.json"; else echo "$(dirname "$1")/assets/health.json"; fi
}

check() {
  local port i options=()
  [ "$device" = cpu ] || options=(--plans)
  for i in "${!repositories[@]}"; do
    [ -d "${repositories[i]}" ] || fail "--model-repository: expected a folder, found none at ${repositories[i]}"
    repositories[i]=$(realpath "${repositories[i]}")
    options+=(--repository "${repositories[i]}")
    questions+=("$(question_of "${repositories[i]}")")
    plain_path "${repositories[i]}"
  done
  for i in "${!others[@]}"; do
    [ -d "${others[i]}" ] || fail "--any-repository: expected a folder, found none at ${others[i]}"
    others[i]=$(realpath "${others[i]}")
    plain_path "${others[i]}"
  done
  plain_path "$ROOT"
  [ "$guard" = no ] || command -v haproxy >/dev/null ||
    fail "--guard: expected haproxy on PATH, found none; install the package haproxy of your system, or leave --guard out"
  # the one pass checks for itself: one start of Python less
  [ "$device:$path" = cpu:auto ] || [ ${#repositories[@]} -eq 0 ] || module serving.check "${options[@]}" || exit 1
  # every repository has its own tokenizer and model_ONNX
  shared=() && [ $((${#repositories[@]} + ${#others[@]})) -eq 1 ] || shared=(--model-namespacing=true)
  [ ${#others[@]} -eq 0 ] || shared+=(--exit-on-error=false --strict-readiness=false)
  for port in "$http_port" "$grpc_port" "$metrics_port"; do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      fail "port $port: expected it free, found a program listening; stop it or choose --http-port, --grpc-port, --metrics-port"
    fi
  done
}

# Whether all models are loaded, by Triton's own word.
ready() {
  local status=''
  { exec 3<>"/dev/tcp/127.0.0.1/$http_port"; } 2>/dev/null || return 1
  printf 'GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  read -r -t 5 _ status _ <&3 || true
  exec 3>&-
  [ "$status" = 200 ]
}

# What a killed server leaves: its models' processes and its guard, which are of its group, and their shared memory.
clean_up() {
  local pid
  if read -r pid _ 2>/dev/null <"$state/server.pid"; then pkill -KILL -g "$pid" -f "stub .* $regions|^haproxy .*$state" || true; fi
  rm -f "$state/server.pid" "/dev/shm/$regions"*
}

wait_ready() {
  local deadline=$((SECONDS + timeout_s))
  # a supervisor that has not seen the server loaded would take a fault for a long start
  until ready && { [ "$supervise" = no ] || [ -e "$state/loaded" ]; }; do
    if ! kill -0 "$pid" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
      echo "--- last lines of $state/server.log" >&2
      grep -E '^E[0-9]{4}|error:|Error' "$state/server.log" | tail -n 5 >&2 || true
      tail -n 15 "$state/server.log" >&2
      fail "expected every model ready within $timeout_s s, found the server stopped or not ready; see the lines above"
    fi
    sleep 0.05
  done
}

start() {
  [ -z "$(server_pid)" ] || fail "port $http_port: expected no server, found ours running (pid $(server_pid)); ./serve.sh stop --http-port $http_port"
  check
  clean_up
  rm -f "$state/loaded"
  "prepare_$device"
  printf '%s\n' "${questions[@]}" | sed '/^$/d' >"$state/questions"
  if [ "$supervise" = yes ]; then
    server=(env -C "$ROOT" "$python" -m serving.supervisor --state "$state" --url "127.0.0.1:$http_port" "--drain-s=$drain_s"
      "${questions[@]/#/--health=}" -- "${server[@]}")
  fi
  cd "$state" # Python looks there first, and a file of the user's may be called like a package
  # Triton 2.51 reads a body by recursion: what ends it with a usual stack is refused with a large one
  (ulimit -S -s 1048576 2>/dev/null || true && exec setsid "${server[@]}") >"$state/server.log" 2>&1 </dev/null 9>&- &
  pid=$!
  trap 'end_server "$pid"; rm -f "$state/server.pid"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  echo "$pid $(start_time "$pid")" >"$state/server.pid"
  wait_ready
  [ ${#others[@]} -eq 0 ] || module serving.others --url "127.0.0.1:$http_port" "${others[@]}" || exit 1
  echo "ready: http 127.0.0.1:$http_port, grpc 127.0.0.1:$grpc_port ($device)"
}

# Triton ends by itself on SIGTERM, when the requests in flight are answered; kill only after a while.
end_server() {
  pkill -USR1 -f "^haproxy .*$state/haproxy.pid" || true # the guard takes nothing new, and ends with what it has
  kill -TERM "$1" 2>/dev/null || return 0
  local deadline=$((SECONDS + drain_s + 10))
  # a zombie is gone too: in a container nobody may be there to reap it
  while [ -n "$(start_time "$1")" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      docker rm --force "triton-$http_port" >/dev/null 2>&1 || true
      kill -KILL -- "-$1" 2>/dev/null || kill -KILL "$1" 2>/dev/null || true
      return
    fi
    sleep 0.2
  done
}

main() {
  parse_args "$@"
  local running questions=() regions=triton-$http_port-
  mkdir -p "$state"
  if [ "$command" != status ]; then
    exec 9>"$state/lock"
    flock --nonblock 9 || fail "port $http_port: expected one start or stop at a time, found another under way; wait for it"
  fi
  running=$(server_pid)
  case $command in
    start)
      start
      trap - EXIT # it goes on in the background
      ;;
    run)
      start
      exec 9>&- # a stop may come from elsewhere
      tail -n +1 -f --pid="$pid" "$state/server.log" &
      wait "$pid"
      ;;
    stop)
      [ -n "$running" ] || { clean_up && echo "no server of ours on port $http_port"; return 0; }
      end_server "$running"
      clean_up
      echo "stopped: pid $running, port $http_port"
      ;;
    status)
      [ -n "$running" ] || fail "port $http_port: no server of ours runs"
      ready || fail "port $http_port: pid $running runs and is not ready"
      mapfile -t questions <"$state/questions"
      [ ${#questions[@]} -eq 0 ] || module serving.health --url "127.0.0.1:$http_port" "${questions[@]}" || fail "port $http_port: pid $running runs and does not answer"
      echo "ready: pid $running, http 127.0.0.1:$http_port"
      ;;
  esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
