"""build_trt.sh through Docker: what is mounted, and what is said where there is no Docker or GPU."""

import json
import os
import subprocess
import sys

from conftest import copy_repository, run
from test_build_trt import STANDIN, WITH_STANDIN, build, plan

from core import tables


def test_dry_run_of_docker_names_the_pinned_image_and_its_paths(exported, tmp_path):
    place = copy_repository(exported, tmp_path)
    done = build(place, "--dry-run", "--docker", "--only", "INT8")
    assert done.returncode == 0, done.stderr
    assert "docker run --rm --init --gpus all" in done.stdout and tables.IMAGE in done.stdout
    assert "--onnx=/models/model_TRT_INT8/1/model.onnx" in done.stdout
    assert f"--mount type=bind\\,source={place}\\,target=/models " in done.stdout


def docker_stand_in(folder):
    """A docker that runs the stand-in for trtexec on what is mounted; like the real one it refuses a missing source."""
    folder.mkdir()
    (folder / "docker").write_text(f"""#!{sys.executable}
import os, subprocess, sys
if sys.argv[1] == "info":
    sys.exit()
values = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--mount"]
mounts = [dict(part.split("=") for part in value.split(",")) for value in values]
for mount in mounts:
    if not os.path.isabs(mount["source"]) or not os.path.isdir(mount["source"]):
        sys.exit("docker: bind source path does not exist: " + mount["source"])
command = sys.argv[sys.argv.index("/usr/src/tensorrt/bin/trtexec") + 1 :]
for mount in mounts:
    command = [word.replace("=" + mount["target"] + "/", "=" + mount["source"] + "/") for word in command]
sys.exit(subprocess.run([{str(STANDIN)!r}, *command]).returncode)
""")
    (folder / "docker").chmod(0o755)
    return f"{folder}:{WITH_STANDIN['PATH']}"


def test_docker_builds_with_a_timing_cache_in_a_new_folder_named_from_elsewhere(exported, tmp_path):
    place = copy_repository(exported, tmp_path / "a:b")
    cache, path = tmp_path / "caches/new/timing.cache", docker_stand_in(tmp_path / "bin")
    options = ("--docker", "--only", "FP16", "--timing-cache", "caches/new/timing.cache", "--results", "found")
    places = ("--model-repository", place.relative_to(tmp_path))
    done = run("build_trt.sh", *places, *options, env=WITH_STANDIN | {"PATH": path}, cwd=tmp_path)
    assert done.returncode == 0 and cache.parent.is_dir(), done.stderr
    (summary,) = (tmp_path / "found").rglob("plans.json")
    assert summary.parents[1].name == "all-MiniLM-L6-v2"  # below it one folder a machine
    assert str(tmp_path) not in summary.read_text() + plan(place, "FP16", "manifest.json").read_text()
    command = json.loads(summary.read_text())["plans"]["FP16"]["command"]
    assert "--onnx=/models/model_ONNX/1/model.onnx" in command
    assert "type=bind,source=model_repository,target=/models" in command


def test_a_path_that_docker_cannot_mount_is_named(exported, tmp_path):
    place = copy_repository(exported, tmp_path / "a,b")
    done = build(place, "--docker", "--dry-run")
    assert done.returncode == 1 and str(place) in done.stderr and "','" in done.stderr


def test_a_container_without_gpu_is_said_before_building(exported, tmp_path):
    place = copy_repository(exported, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    docker = '#!/bin/sh\n[ "$1" = info ] && exit 0\necho "docker: could not select device driver with capabilities: [[gpu]]" >&2\nexit 125\n'
    (tools / "docker").write_text(docker)
    (tools / "docker").chmod(0o755)
    done = build(place, "--docker", PATH=f"{tools}:{WITH_STANDIN['PATH']}")
    assert (
        done.returncode == 1 and "no GPU can be seen" in done.stderr and "could not select device driver" in done.stderr
    )


def test_without_trtexec_and_docker_three_ways_on(exported, tmp_path):
    place = copy_repository(exported, tmp_path)
    empty = tmp_path / "bin"
    empty.mkdir()
    for tool in ("bash", "sed", "dirname", "realpath", "mkdir", "env", "head", "id", "python3"):
        found = subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip()
        (empty / tool).symlink_to(found)
    variables = {k: v for k, v in os.environ.items() if k != "TRTEXEC"} | {"PATH": str(empty)}
    done = run("build_trt.sh", "--model-repository", place, env=variables)
    assert done.returncode == 1 and "three ways on" in done.stderr
