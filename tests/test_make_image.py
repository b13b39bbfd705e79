"""make_image.sh, Dockerfile, compose.yaml: what can be shown without a Docker engine."""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_repository, run

from core import files, tables
from serving.check import check_repository


@pytest.fixture
def place(tmp_path):
    """The scripts in a folder of their own, so that build/ is nobody else's."""
    folder = tmp_path / "project"
    for name in ("core", "precision", "serving", "tasks", "deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "model_repository/tokenizer/1", folder / "model_repository/tokenizer/1")
    (folder / "assets").mkdir()
    shutil.copy(ROOT / "assets/texts.txt", folder / "assets")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def make(place, *options, docker=None, cwd=None):
    """Run the copied make_image.sh; docker is a stand-in's folder."""
    path = f"{docker}:{os.environ['PATH']}" if docker else os.environ["PATH"]
    command, environment = [str(place / "deploy/make_image.sh"), *map(str, options)], dict(os.environ, PATH=path)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=cwd)


def docker_stand_in(folder, fail="nothing"):
    """A docker that notes what it is asked, gives each image an id, and fails at commands that begin with `fail`."""
    folder.mkdir(exist_ok=True)
    lines = [
        "#!/usr/bin/env bash",
        f'echo "$@" >> {folder}/calls',
        f'[[ "$*" != "{fail}"* ]] || {{ echo "planted: no" >&2; exit 1; }}',
        # without a line end, as the real one
        f'while [ $# -gt 0 ]; do [ "$1" != --iidfile ] || printf "sha256:%s" "$(grep -c ^build {folder}/calls)" > "$2"; shift; done',
    ]
    (folder / "docker").write_text("\n".join(lines) + "\n")
    (folder / "docker").chmod(0o755)
    return folder


def test_dry_run_prints_every_command_and_makes_nothing(place):
    done = make(
        place, "some/checkpoint", "--name", "reviews", "--precision", "FP16", "--tag", "r:1", "--gpu", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "torch2onnx.py --task classification --model some/checkpoint",
        "--only FP16",
        "docker build",
        "--tag r:1",
        "--gpus all",
    ):
        assert words in done.stdout
    assert not (place / "build").exists()


def test_context_holds_the_repository_and_no_build_is_needed_to_serve_it(place, tiny):
    done = make(place, tiny.repository, "--no-build", "--max-batch-size", 4)
    assert done.returncode == 0, done.stderr
    context = place / "build/image/tiny"
    found = {p.name for p in context.iterdir()}
    assert found == {"made", "model_repository", "health.py", "Dockerfile", ".dockerignore", "kustomization.yaml"}
    assert (context / "model_repository/health.json").is_file()
    assert "max_batch_size: 4" in (context / "model_repository/tiny/config.pbtxt").read_text()
    check_repository(context / "model_repository")
    for path in (context / "model_repository").rglob("*"):  # another user serves it
        mode = path.stat().st_mode
        assert mode & stat.S_IROTH and not mode & stat.S_IWOTH, path
        assert mode & stat.S_IXOTH or not path.is_dir(), path


def test_the_tasks_own_repository_is_baked_from_another_folder(place, exported, tmp_path):
    folder = copy_repository(exported, tmp_path / "own").parent
    (tmp_path / "core.py").write_text("raise SystemExit('shadowed')")
    shutil.copy(tmp_path / "core.py", folder)
    done = make(place, "model_repository", "--precision", "FP16", "--name", "embedder", "--no-build", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "build").exists()
    baked = place / "build/image/embedder/model_repository"
    assert (baked / "model.json").is_file() and (baked / "embedder/config.pbtxt").is_file()
    assert [p.parents[1].name for p in baked.rglob("model.onnx")] == ["model_TRT_FP16"]


def packed(tiny, folder, change=None):
    """A package as verdicts.py writes it, with a plan in it: it has a manifest.json of its own. change(root): afterwards."""
    root = folder / "tiny-ONNX"
    shutil.copytree(tiny.repository, root / "model_repository")
    files.write_json(root / "model_repository/model_ONNX/1/manifest.json", {"graph": "model_ONNX/1/model.onnx"})
    inside = {str(p.relative_to(root)): files.sha256(p) for p in root.rglob("*") if p.is_file()}
    files.write_json(root / "manifest.json", {"name": "tiny", "model": "ONNX", "files": inside})
    if change:
        change(root)
    with tarfile.open(folder / "tiny.tar.gz", "w:gz") as archive:
        archive.add(root, arcname=root.name)
    return folder / "tiny.tar.gz"


def test_a_package_that_holds_a_plan_is_taken(place, tiny, tmp_path):
    done = make(place, packed(tiny, tmp_path), "--no-build")
    assert done.returncode == 0, done.stderr
    assert (place / "build/image/tiny/model_repository/tiny/config.pbtxt").is_file()


CHANGES = {
    "one more": lambda root: (root / "model_repository/tokenizer/site-packages/more.so").write_text("planted"),
    "changed": lambda root: (root / "model_repository/tokenizer/1/model.py").write_text("planted"),
    "gone": lambda root: (root / "model_repository/tokenizer/1/model.py").unlink(),
    "a link": lambda root: (root / "model_repository/link").symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_package_with_other_files_than_its_manifest_names_is_refused(place, tiny, tmp_path, change):
    done = make(place, packed(tiny, tmp_path, CHANGES[change]), "--no-build")
    assert done.returncode == 1 and "expected the files that the package's manifest names" in done.stderr
    assert not (place / "build/image/tiny/model_repository").exists()


def test_image_is_built_without_network_and_clean_removes_what_was_made(place, tiny, tmp_path):
    docker = docker_stand_in(tmp_path / "docker")
    (place / "build/image/foreign").mkdir(parents=True)
    (place / "build/mine.txt").write_text("mine")
    done = make(place, tiny.repository, docker=docker)
    assert done.returncode == 0 and "made: tiny:onnx" in done.stdout, done.stderr
    assert f"kubectl apply -k {place}/build/image/tiny" in done.stdout
    cluster = yaml.safe_load((place / "build/image/tiny/kustomization.yaml").read_text())
    assert (place / "build/image/tiny" / cluster["resources"][0] / "deployment.yaml").is_file()
    assert (cluster["images"][0]["newName"], cluster["images"][0]["newTag"]) == ("tiny", "onnx")
    calls = (docker / "calls").read_text()
    assert "build --network none --tag tiny:onnx" in calls
    assert make(place, tiny.repository, "--tag", "tiny:2", docker=docker).returncode == 0
    assert "removed: build/image/tiny" in make(place, "clean", docker=docker).stdout
    calls = (docker / "calls").read_text()
    assert "image rm sha256:1" in calls and "image rm sha256:2" in calls  # the earlier one too
    assert not (place / "build/image/tiny").exists()
    assert (place / "build/image/foreign").is_dir() and (place / "build/mine.txt").is_file()


def test_clean_keeps_its_record_until_the_images_are_gone(place, tiny, tmp_path):
    assert make(place, tiny.repository, docker=docker_stand_in(tmp_path / "docker")).returncode == 0
    for fail, words in (("info", "expected a running Docker, found: planted"), ("image rm", "sha256:1: expected an")):
        done = make(place, "clean", docker=docker_stand_in(tmp_path / "docker", fail))
        assert done.returncode == 1 and words in done.stderr and "planted: no" in done.stderr
        assert (place / "build/image/tiny/images").read_text() == "sha256:1\n"


def test_an_export_for_an_image_leaves_the_repository_of_that_name_alone(place, tiny):
    shutil.copytree(tiny.repository, place / "build/tiny")
    before = (place / "build/tiny/model.json").read_bytes()
    done = make(place, tiny.checkpoint, "--name", "tiny", "--no-build")
    assert done.returncode == 0, done.stderr
    assert (place / "build/tiny/model.json").read_bytes() == before
    assert (place / "build/image/tiny/model_repository/tiny/config.pbtxt").is_file()


def test_a_folder_that_is_not_ours_is_left_alone(place, tiny):
    foreign = place / "build/image/tiny/notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    done = make(place, tiny.repository, "--no-build")
    assert done.returncode == 1 and "choose another --name" in done.stderr and foreign.is_file()


def test_without_docker_nothing_is_exported_first(place, tiny, tmp_path):
    done = make(place, tiny.repository, docker=docker_stand_in(tmp_path / "docker", fail="info"))
    assert done.returncode == 1 and "--dry-run" in done.stderr
    assert "expected a running Docker, found: planted: no" in done.stderr
    assert not (place / "build").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "expected MODEL or clean"),
        (("m", "--max-batch-size", "0"), "--max-batch-size: expected a number from 1"),
        (("m", "--precision", "INT4"), "--precision: expected"),
        (("m", "--precision", "INT8", "--task", "text-generation"), "--precision: expected one of ONNX FP16 for"),
        (("m", "--task", "translation"), "invalid choice: 'translation'"),
        (("m", "--tag", "Upper Case"), "--tag: expected"),
        (("m", "--name", "../up"), "--name: expected"),
        (("m", "--fast"), "--fast: unknown option"),
        (("clean", "--name", ".."), "--name: expected"),
    ],
)
def test_bad_usage_is_refused(place, options, words):
    done = make(place, *options)
    assert done.returncode == 2 and words in done.stderr


def test_a_file_that_is_no_package_is_named(place):
    done = make(place, ROOT / "README.md", "--dry-run")
    assert done.returncode == 1 and "expected a package of verdicts.py" in done.stderr


def test_dockerfile_is_pinned_not_root_and_checked():
    lines = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    values = {name: value for name, value in instructions}
    assert values["FROM"] == tables.IMAGE
    assert values["USER"].split(":")[0] not in ("0", "root")
    assert '"/health.py", "/models/health.json"' in values["HEALTHCHECK"]
    assert "RUN" not in values and "ADD" not in values  # nothing is fetched


def test_the_pinned_image_stands_in_one_place():
    ours = [
        *ROOT.glob("*.*"),
        *(p for name in ("core", "deploy", "precision", "serving", "tasks") for p in (ROOT / name).rglob("*.*")),
    ]
    found = {str(p.relative_to(ROOT)) for p in ours if p.suffix in (".py", ".sh") and "nvcr.io" in p.read_text()}
    assert found == {"core/tables.py"}


def test_hadolint_has_no_findings():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed; ./install.sh")
    done = subprocess.run([hadolint, ROOT / "deploy/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_has_limits_and_listens_on_this_machine_only():
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["mem_limit"] and service["cpus"] and service["pids_limit"]
    assert services["repository"]["image"] == tables.IMAGE
    assert services["gpu"]["deploy"]["resources"]["reservations"]["devices"]


def test_help_is_the_header():
    done = run("deploy/make_image.sh", "-h")
    assert done.returncode == 0 and done.stdout.startswith("Bake a model repository")
