"""The workers of a bulk job on Ray Data: on this machine, or on the cluster that RAY_ADDRESS names."""

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import time

from core.files import ROOT
from serving.bulk_rows import first_line
from serving.bulk_worker import Worker

REACH_S = 5.0  # until an address that does not answer is said to be none
STORE_BYTES = 128 << 20  # of Ray's object store: only numbers of pieces go through it
SPARE_CPUS = 2  # of Ray's count, beside the workers': what it runs itself must not wait for them
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # so Ray has one machine, and listens on 127.0.0.1 alone
NOT_SENT = ("/.git", "/.venv", "/build", "/results", "/tests", "*.onnx", "*.plan")  # to a cluster


def cluster_address():
    """RAY_ADDRESS, or None where Ray is to run on this machine alone; exits where nothing answers there."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), REACH_S).close()
        except (OSError, OverflowError) as error:
            raise SystemExit(
                f"RAY_ADDRESS={address}: expected a Ray cluster, found: {error}; start it, or unset RAY_ADDRESS"
            ) from None
    return None if address == "local" else address


def connect(address, cpus):
    """Start Ray here, for this job alone and on loopback, or join the cluster."""
    os.environ |= QUIET | (
        {} if address else LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    )
    import ray

    if ray.is_initialized():
        return ray
    own = {"num_cpus": cpus + SPARE_CPUS, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    sent = {"runtime_env": {"working_dir": str(ROOT), "excludes": list(NOT_SENT)}}
    try:
        with no_output():
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **(sent if address else own))
    except Exception as error:  # Ray raises many
        where = f"RAY_ADDRESS={address}: expected to join Ray's cluster (RAY_AUTH_MODE=token if it has tokens)"
        where = where if address else "expected Ray to start on this machine"
        raise SystemExit(f"{where}, found: {first_line(error)}") from None
    return ray


@contextlib.contextmanager
def no_output():
    """Nothing on standard error, which Ray's libraries write to past Python; what fails is raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def count_cores(address):
    """Cores of this machine, or of the cluster."""
    return int(connect(address, 0).cluster_resources().get("CPU", 1)) if address else len(os.sched_getaffinity(0))


def run(job, left, workers, address, stall_s):
    """Compute the pieces that are left; exits with the reason where one cannot be, and where nothing moves any more."""
    from tqdm import tqdm

    cores = count_cores(address)
    threads = max(1, cores // workers)
    if job["graph"]:
        job["graph"]["cores"] = threads
    ray = connect(address, workers * threads)
    sizes = [piece["rows"] for piece in job["pieces"]]
    before = sum(sizes) - sum(sizes[number] for number in left)
    rows, moved = dict.fromkeys(left, 0), [time.monotonic()]
    watch(moved, stall_s)
    told = reports(ray, job, left, workers, threads)
    try:
        with tqdm(total=sum(sizes), initial=before, unit="row", mininterval=5, smoothing=0.1, desc="embed") as bar:
            for piece, done, failure in told:
                if failure:
                    raise SystemExit(f"{failure}; the same command goes on from here")
                if done > rows[piece]:  # a piece that is begun again has not moved yet
                    bar.update(done - rows[piece])
                    rows[piece], moved[0] = done, time.monotonic()
    finally:
        moved.clear()
        with no_output():  # of what Ray ends early
            told.close()
            ray.shutdown()


def reports(ray, job, left, workers, threads):
    """Yield (piece, rows done, failure) as the workers tell them."""
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a report is a block: it comes when it is made
    numbers = ray.data.from_items([{"piece": number} for number in left], override_num_blocks=len(left))
    pool = ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1)
    told = numbers.map_batches(Worker, fn_constructor_kwargs={"job": job}, batch_size=1, num_cpus=threads, compute=pool)
    try:
        for batch in told.iter_batches(batch_size=None, prefetch_batches=0):
            yield from zip(map(int, batch["piece"]), map(int, batch["rows"]), map(str, batch["failure"]), strict=True)
    except ray.exceptions.RayError as error:
        raise SystemExit(f"expected Ray to run the workers, found: {str(error).strip().splitlines()[-1]}") from None


def watch(moved, stall_s):
    """Give up, in a thread, once nothing has moved for so long: Ray starts workers that die anew without end."""

    def look():
        while moved:
            if time.monotonic() - moved[0] > stall_s:
                print(
                    f"expected a row within {stall_s:g} s (--stall-s), found none: workers die, or wait for processors or "
                    "memory; the same command goes on from here", file=sys.stderr, flush=True
                )  # fmt: skip
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=look, daemon=True).start()
