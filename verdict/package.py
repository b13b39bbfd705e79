"""Pack the model that a study of verdicts named: its repository as .tar.gz, with a manifest."""

import tarfile
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from core.files import ROOT, read_json, replace_when_done, sha256, write_json
from core.record import results_folder
from core.repository import check_name, graph_path
from core.tables import ENGINES, NAMES
from serving.plans import plan_path
from serving.repository import extract

FROM_STUDY = (
    "data", "calibration", "positive", "precision", "threshold", "served_verdict", "conclusion",
)  # fmt: skip


def read_winner(args, card):
    """(key, study) of the model's verdicts.json, which has to be of the present graphs."""
    path = results_folder(args.results, card) / "verdicts.json"
    remedy = "run verdicts.py"
    study = read_json(path, remedy)
    winner = study["conclusion"]["winner"]
    if not winner:
        raise SystemExit(
            f"{path}: expected a model that may be deployed, found {study['conclusion']['text']}; {remedy} on more texts"
        )
    for find, key in ((graph_path, "graph"), (plan_path, "plan")):
        file = find(args.repository, winner)
        studied = study[f"{key}_sha256"].get(winner)
        if studied and not (file.is_file() and sha256(file) == studied):
            raise SystemExit(f"{path}: expected a study of {file}, found one of another {key}; {remedy} again")
    return winner, study


def write_manifest(folder, name, winner, study):
    """manifest.json: what is in the package, why this one, how it is served."""
    repository = folder / "model_repository"
    files = sorted(p for p in repository.rglob("*") if p.is_file())
    # the flipped texts belong to the study
    verdicts = {key: value for key, value in study["models"][winner].items() if key != "flipped"}
    manifest = {
        "name": name,
        "model": winner,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "serve": "./serve.sh start --model-repository model_repository, or deploy/make_image.sh",
        "card": {k: v for k, v in study["model"].items() if k not in ("environment", "service")},
        "study": {key: study[key] for key in FROM_STUDY} | {"verdicts": verdicts},
        "files": {str(p.relative_to(folder)): sha256(p) for p in files},
    }
    write_json(folder / "manifest.json", manifest)


def write_archive(folder, root, path):
    """folder -> .tar.gz under the name `root`; owners and modes do not depend on who packs."""

    def neutral(info):
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    with replace_when_done(path) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
        archive.add(folder, arcname=root, filter=neutral)


def package(args, card):
    """verdicts.py package: the conclusion's model, ready to be served elsewhere."""
    winner, study = read_winner(args, card)
    service = card["service"]
    name = check_name(args.name or service["name"], "--name")
    # what was measured is what is packed
    measured = study["models"][winner]["engine"]
    engine = next((key for key, row in ENGINES.items() if measured.startswith(row.title)), "onnxruntime")
    precision = "BF16" if measured.endswith(", BF16") else winner.removeprefix("TRT_")
    root = f"{name}-{precision}"
    output = args.output or ROOT / "build" / f"{root}.tar.gz"
    # what the service's LABEL follows; None where it is the largest logit
    follows = study["served_verdict"] == "threshold"
    threshold = {"label": study["positive"], "value": study["threshold"]} if follows else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / root
        folder.mkdir()
        settings = {"name": name, "max_batch_size": args.max_batch_size or service["max_batch_size"]}
        extract(args.repository, folder / "model_repository", precision, engine, threshold=threshold, **settings)
        write_manifest(folder, name, winner, study)
        write_archive(folder, root, output)
    rule = f"{threshold['label']} from {threshold['value']:.4f}" if threshold else "the largest logit"
    size = output.stat().st_size / 1e6
    print(f"{output}: {name} with {NAMES[winner]}, LABEL is {rule}, {size:.1f} MB, sha256 {sha256(output)}")
