#!/usr/bin/env bash
# Several servers of one service on this machine, behind HAProxy; a new model rolls through them and loses no request.
# Usage: deploy/replicas.sh start|roll|status|stop [options]
#   start    start them one after the other, then HAProxy in front of them
#   roll     of each in turn: drain it, stop it, start it anew, let it answer again
#   status   which of them HAProxy finds well; exit 1 unless all
#   stop     HAProxy first, which lets requests in flight end, then the servers
# Options:
#   --replicas N             how many, 2
#   --model-repository DIR   what they serve; with roll the new one (default: as started)
#   --path auto|ensemble     as of serve.sh, auto
#   --http-port N            of HAProxy, 8000; its gRPC is one above, the servers' ports start ten above
#   --drain-s N              how long requests in flight may go on, 30
# Reads:  the repository. Writes: build/replicas/<http port>/ and build/serve/.
# Prints: "ready: 2 of 2 servers, http 127.0.0.1:8000, grpc 127.0.0.1:8001"
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT

fail() {
  echo "replicas.sh: $1" >&2
  exit "${2:-1}"
}

parse_args() {
  command=${1:-}
  case $command in
    start | roll | status | stop) shift ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) fail "expected start, roll, status or stop, found '$command'; see -h" 2 ;;
  esac
  replicas=2 repository='' path=auto http_port=8000 drain_s=30
  while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || fail "$1: expected a value; see -h" 2
    case $1 in
      --replicas) replicas=$2 ;;
      --model-repository) repository=$(realpath -m "$2") ;;
      --path) path=$2 ;;
      --http-port) http_port=$2 ;;
      --drain-s) drain_s=$2 ;;
      *) fail "$1: unknown option; see -h" 2 ;;
    esac
    shift 2
  done
  [[ $replicas =~ ^[1-9][0-9]?$ ]] || fail "--replicas: expected a number from 1 to 99, found '$replicas'" 2
  [[ $http_port =~ ^[0-9]{1,5}$ && $drain_s =~ ^[0-9]{1,5}$ ]] || fail "expected numbers of at most five digits; see -h" 2
  state=$ROOT/build/replicas/$http_port
  python=$ROOT/.venv/bin/python
}

port_of() { echo $((http_port + 10 * $1)); }

# A command on HAProxy's socket, and its answer.
tell() {
  "$python" -c 'import socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.settimeout(10)
channel.connect(sys.argv[1])
channel.sendall(sys.argv[2].encode() + b"\n")
print(channel.makefile().read(), end="")' "$state/socket" "$1" || fail "port $http_port: expected HAProxy on $state/socket, found none; deploy/replicas.sh start"
}

# A field of `show stat` for server number $1, of HTTP and gRPC one a line: 5 is its sessions, 18 its state.
field() { tell "show stat" | awk -F, -v server="server$1" -v number="$2" '$2 == server { print $number }'; }

serve() {
  local port
  port=$(port_of "$2")
  "$ROOT/serve.sh" "$1" --http-port "$port" "${@:3}"
}

start_one() {
  local port
  port=$(port_of "$1")
  serve start "$1" --device cpu --model-repository "$repository" --path "$path" --grpc-port $((port + 1)) --metrics-port $((port + 2)) >"$state/server$1.log" ||
    fail "server $1: expected it to start, found it failing; see the lines above"
}

wait_until_up() {
  local deadline=$((SECONDS + 30))
  until [ "$(field "$1" 18 | grep -c '^UP')" = 2 ]; do
    [ "$SECONDS" -lt "$deadline" ] || fail "server $1: expected HAProxy to find it well within 30 s, found it $(field "$1" 18 | tr '\n' ' ')"
    sleep 0.2
  done
}

# HAProxy's second file: where the servers are. Whether one is well is asked of its HTTP, for gRPC says so while it refuses.
write_servers() {
  local kind i port
  printf 'global\n  stats socket %s mode 600 level admin\n' "$state/socket"
  for kind in http grpc; do
    printf 'backend %s_server\n  balance leastconn\n  option httpchk GET /v2/health/ready\n' "$kind"
    printf '  retries 3\n  retry-on all-retryable-errors\n  option redispatch 1\n'
    for ((i = 1; i <= replicas; i++)); do
      port=$(port_of "$i")
      if [ "$kind" = http ]; then
        printf '  server server%s 127.0.0.1:%s check inter 1s fall 2 rise 1\n' "$i" "$port"
      else
        printf '  server server%s 127.0.0.1:%s proto h2 check port %s check-proto h1 inter 1s fall 2 rise 1\n' "$i" $((port + 1)) "$port"
      fi
    done
  done
}

start() {
  command -v haproxy >/dev/null || fail "expected haproxy on PATH, found none; install the package haproxy of your system"
  [ -n "$repository" ] || repository=$ROOT/model_repository
  [ ! -e "$state/haproxy.pid" ] || fail "port $http_port: expected no HAProxy of ours, found one; deploy/replicas.sh stop --http-port $http_port"
  local i port
  for port in "$http_port" $((http_port + 1)); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      fail "port $port: expected it free, found a program listening; stop it or choose --http-port"
    fi
  done
  trap 'stop >&2' EXIT # what has started by then
  mkdir -p "$state"
  echo "$replicas" >"$state/replicas"
  echo "$repository" >"$state/repository"
  echo "$path" >"$state/path"
  write_servers >"$state/servers.cfg"
  for ((i = 1; i <= replicas; i++)); do start_one "$i"; done
  export LOCAL=yes REPLICAS=$replicas BIND=127.0.0.1:$http_port GRPC_BIND=127.0.0.1:$((http_port + 1))
  haproxy -D -f "$ROOT/deploy/haproxy.cfg" -f "$state/servers.cfg" -p "$state/haproxy.pid" ||
    fail "expected HAProxy to start, found it failing; see the lines above"
  for ((i = 1; i <= replicas; i++)); do wait_until_up "$i"; done
  trap - EXIT
  status
}

status() {
  local i well=0
  replicas=$(cat "$state/replicas" 2>/dev/null) || fail "port $http_port: expected servers of ours, found none; deploy/replicas.sh start"
  for ((i = 1; i <= replicas; i++)); do
    if [ "$(field "$i" 18 | grep -c '^UP')" = 2 ]; then well=$((well + 1)); else echo "server $i: $(field "$i" 18 | tr '\n' ' ')" >&2; fi
  done
  [ "$well" = "$replicas" ] || fail "port $http_port: $well of $replicas servers are well"
  echo "ready: $well of $replicas servers, http 127.0.0.1:$http_port, grpc 127.0.0.1:$((http_port + 1))"
}

# After SIGTERM Triton resets connections at once, and gRPC answers NOT_FOUND: only what is drained before loses nothing.
drain() {
  local kind deadline=$((SECONDS + drain_s))
  for kind in http grpc; do tell "set server ${kind}_server/server$1 state drain" >/dev/null; done
  until [ "$(field "$1" 5 | grep -cv '^0$')" = 0 ]; do
    [ "$SECONDS" -lt "$deadline" ] || break
    sleep 0.2
  done
}

roll() {
  local i kind
  replicas=$(cat "$state/replicas" 2>/dev/null) || fail "port $http_port: expected servers of ours, found none; deploy/replicas.sh start"
  [ -n "$repository" ] || repository=$(cat "$state/repository")
  path=$(cat "$state/path")
  for ((i = 1; i <= replicas; i++)); do
    drain "$i"
    serve stop "$i" --drain-s "$drain_s" >/dev/null
    start_one "$i"
    for kind in http grpc; do tell "set server ${kind}_server/server$i state ready" >/dev/null; done
    wait_until_up "$i"
    echo "server $i of $replicas: new"
  done
  echo "$repository" >"$state/repository"
}

stop() {
  local i pid
  if read -r pid 2>/dev/null <"$state/haproxy.pid"; then
    kill -USR1 "$pid" 2>/dev/null || true
    local deadline=$((SECONDS + drain_s))
    while kill -0 "$pid" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
    kill -KILL "$pid" 2>/dev/null || true
  fi
  for ((i = 1; i <= $(cat "$state/replicas" 2>/dev/null || echo 0); i++)); do serve stop "$i" --drain-s "$drain_s"; done
  rm -rf "$state"
}

main() {
  parse_args "$@"
  "$command"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
