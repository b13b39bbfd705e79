# The command that runs a server, on a CPU and on a GPU: for serve.sh, which sources this file and has set its names.
# shellcheck shell=bash disable=SC2034,SC2154

# A backend folder: Triton's own Python backend with the stub of this Python, ours beside it.
prepare_cpu() {
  local found version libpython stub backend name backends=$state/backends
  found=$("$python" -c 'import importlib.util as u, sys, sysconfig
print("%d.%d" % sys.version_info[:2], "{LIBDIR}/{INSTSONAME}".format(**sysconfig.get_config_vars()), sep="\n")
print(u.find_spec("pytriton").submodule_search_locations[0])' 2>/dev/null) ||
    fail "expected the package nvidia-pytriton in $python, found none; run ./run.sh or pip install -r requirements.txt"
  { read -r version && read -r libpython && read -r triton; } <<<"$found"
  triton+=/tritonserver
  stub=$triton/python_backend_stubs/$version/triton_python_backend_stub
  [ -e "$stub" ] || fail "expected Python 3.10 to 3.12, found $version; make .venv with one of those"
  rm -rf "$backends" && mkdir -p "$backends/python"
  # copies: Triton refuses a backend library that a link leads out of its folder
  cp "$triton"/backends/python/*.* "$stub" "$backends/python/"
  cat "$ROOT/serving/stub_start.py" >>"$backends/python/triton_python_backend_utils.py" # every stub imports it first
  for backend in "$ROOT"/serving/backends/*/; do
    cp -r "$backend" "$backends/"
    # they find what they import beside themselves, wherever the server was started
    cp "$ROOT/core/onnx_runtime.py" "$ROOT/serving/backends/graph_model.py" "$backends/$(basename "$backend")/"
  done
  # stand-ins for backends of examples/, each with the packages that were installed for it alone
  for backend in "$ROOT"/examples/*/backend/; do
    [ -d "$backend" ] || continue
    name=$(basename "$(dirname "$backend")")
    cp -r "$backend" "$backends/$name"
    ln -s "$ROOT/build/$name/packages" "$backends/$name/packages"
  done
  local folders=$state/models served
  if [ "$path" = auto ] && [ ${#repositories[@]} -gt 0 ]; then
    served=$(module serving.one_pass "${repositories[@]/#/--repository=}" --output "$folders" "${one_pass[@]}") || exit 1
    mapfile -t repositories <<<"$served"
  fi
  if [ ${#others[@]} -gt 0 ]; then
    served=$(module serving.others "${others[@]}" --output "$state/others") || exit 1
    mapfile -t others <<<"$served"
  fi
  # behind the guard the server has ports of its own, which nobody is told
  local behind_http=$http_port behind_grpc=$grpc_port secret
  [ "$guard" = no ] || read -r behind_http behind_grpc <<<"$("$python" -c 'import socket
listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(one.getsockname()[1] for one in listening))')"
  secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  # the stub would take the system's libpython with the modules of this Python: of another build, they do not load
  rm -rf "${state:?}/lib" && mkdir "$state/lib"
  [[ $libpython != *.so* ]] || ln -s "$libpython" "$state/lib/"
  # the stub takes its packages from the python3 on PATH
  PATH=$(dirname "$python"):$PATH
  export PATH LD_LIBRARY_PATH=$state/lib:$triton/../../nvidia_pytriton.libs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  server=(
    "$triton/bin/tritonserver"
    "${repositories[@]/#/--model-repository=}" "${others[@]/#/--model-repository=}" "${shared[@]}"
    "--backend-directory=$backends"
    "--backend-config=python,shm-region-prefix-name=$regions"
    "--exit-timeout-secs=$drain_s"
    # nobody but this machine's administrator changes what is logged or shared; loading is off anyway
    "--http-restricted-api=logging,trace,shared-memory:administrator=$secret"
    "--grpc-restricted-protocol=logging,trace,shared-memory:administrator=$secret"
    --http-address=127.0.0.1 "--http-port=$behind_http"
    --grpc-address=127.0.0.1 "--grpc-port=$behind_grpc"
    --metrics-address=127.0.0.1 "--metrics-port=$metrics_port"
  )
  # our configs are whole; to complete one, Triton would start every model's process twice
  [ ${#others[@]} -gt 0 ] || server+=(--disable-auto-complete-config)
  [ "$guard" = no ] || put_guard "$behind_http" "$behind_grpc"
}

# HAProxy before the server, in its group: both end together.
put_guard() {
  export LOCAL=yes BIND=127.0.0.1:$http_port GRPC_BIND=127.0.0.1:$grpc_port SERVER=127.0.0.1:$1 GRPC_SERVER=127.0.0.1:$2
  # shellcheck disable=SC2016
  server=(bash -c 'haproxy -f "$1" -p "$2" & shift 2; exec "$@"' _ "$ROOT/deploy/haproxy.cfg" "$state/haproxy.pid" "${server[@]}")
}

prepare_gpu() {
  has_gpu || fail "--device gpu: expected Docker and an NVIDIA GPU, found neither or one; install both, or use --device cpu"
  local image mount mounts=() inside=() i target
  image=$(module serving.ask image)
  for i in "${!repositories[@]}"; do
    target=/models && [ "$i" -eq 0 ] || target=/models-$((i + 1))
    mount=$(module serving.ask mount "${repositories[i]}" "$target") || exit 1
    mounts+=(--mount "$mount") inside+=("--model-repository=$target")
    if [ ! -f "${repositories[i]}/model.json" ]; then # the task's own; any other holds all that its server needs
      mount=$(module serving.ask mount "$(dirname "${repositories[i]}")/assets" /assets) || exit 1
      mounts+=(--mount "$mount")
    fi
  done
  for i in "${!others[@]}"; do
    mount=$(module serving.ask mount "${others[i]}" "/others-$((i + 1))") || exit 1
    mounts+=(--mount "$mount") inside+=("--model-repository=/others-$((i + 1))")
  done
  server=(
    docker run --rm "--name=triton-$http_port" --gpus all --shm-size=1g --ulimit memlock=-1
    -p "127.0.0.1:$http_port:8000" -p "127.0.0.1:$grpc_port:8001" -p "127.0.0.1:$metrics_port:8002"
    "${mounts[@]}" "$image" tritonserver "${inside[@]}" "${shared[@]}"
  )
}
