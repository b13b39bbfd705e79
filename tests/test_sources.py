"""core/sources.py: checkpoints of registries, with stand-ins of their clients' documented calls."""

import json
import shutil
import sys

import pytest
from test_classifier import export, refuse

# --- sources -------------------------------------------------------------------------

# stand-ins with the calls that each client library has; the folder is what they "download"
CLIENTS = {
    "clearml": """
        class InputModel:
            def __init__(self, model_id):
                assert model_id == "abc123"
            def get_local_copy(self, raise_on_error=False):
                return FOLDER
        """,
    "wandb": """
        class Api:
            def artifact(self, name):
                assert name == "team/project/reviews:v3"
                return self
            def download(self):
                return FOLDER
        """,
    "mlflow": """
        import sys
        def download_artifacts(artifact_uri):
            assert artifact_uri == "models:/reviews/2"
            return FOLDER
        sys.modules["mlflow.artifacts"] = sys.modules[__name__]
        """,
}
REFERENCES = {
    "clearml": ("clearml:abc123", "abc123"),
    "wandb": ("wandb:team/project/reviews:v3", "reviews"),
    "mlflow": ("mlflow:models:/reviews/2", "reviews"),
}


def stand_in(monkeypatch, tmp_path, source, folder):
    """Let `import source` find the stand-in."""
    lines = CLIENTS[source].splitlines()[1:]
    code = "\n".join(line.removeprefix("        ") for line in lines)
    (tmp_path / "clients").mkdir(exist_ok=True)
    (tmp_path / "clients" / f"{source}.py").write_text(f"FOLDER = {str(folder)!r}\n{code}\n")
    import_from(monkeypatch, tmp_path / "clients", source)


def import_from(monkeypatch, folder, source):
    """Put a folder first on the path, and forget what was imported before."""
    monkeypatch.syspath_prepend(folder)
    for name in (source, f"{source}.artifacts"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("source", CLIENTS)
def test_a_model_of_a_registry_is_exported(monkeypatch, tmp_path, tiny, source):
    # MLflow keeps the tokenizer of a pipeline apart from the model
    nested = tmp_path / "download"
    shutil.copytree(tiny.checkpoint, nested / "model" if source == "mlflow" else nested)
    if source == "mlflow":
        (nested / "components/tokenizer").mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (nested / "model" / name).rename(nested / "components/tokenizer" / name)
    reference, name = REFERENCES[source]
    stand_in(monkeypatch, tmp_path, source, nested)
    done = export(tmp_path / "r", reference)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "r/model.json").read_text())
    assert (card["name"], card["source"]) == (name, reference)


@pytest.mark.parametrize("source", CLIENTS)
def test_a_missing_client_library_says_what_to_install(monkeypatch, tmp_path, source):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / f"{source}.py").write_text("raise ImportError('no such module')\n")
    import_from(monkeypatch, tmp_path / "none", source)
    refuse(tmp_path, REFERENCES[source][0], f"pip install {source}")


def test_a_model_that_a_registry_has_not_is_named(monkeypatch, tmp_path, tiny):
    stand_in(monkeypatch, tmp_path, "wandb", tiny.checkpoint)
    refuse(tmp_path, "wandb:team/other/reviews:v9", "wandb:entity/project/name:version")


def test_one_file_of_a_registry_is_no_checkpoint(monkeypatch, tmp_path, tiny):
    # beside it lies what another model left in the cache
    stand_in(monkeypatch, tmp_path, "clearml", tiny.checkpoint / "model.safetensors")
    refuse(tmp_path, "clearml:abc123", "expected an uploaded folder, found one file, model.safetensors")


def test_a_revision_of_a_registry_stands_in_its_reference(tmp_path):
    refuse(tmp_path, "clearml:abc123", "--revision", options=("--revision", "main"))
