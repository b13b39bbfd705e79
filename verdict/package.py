"""Pack the model that a study of verdicts named: its repository as .tar.gz, with a manifest."""

import tarfile
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from core.files import ROOT, read_json, replace_when_done, sha256, write_json
from core.tables import EMBEDDERS
from serving.classifier_repository import check_classifier_repository, check_name, extract, read_card

FROM_STUDY = ("data", "positive", "precision", "threshold", "conclusion")


def read_winner(args, card):
    """(suffix, study) of results/<model>/verdicts.json, which has to be of the present graphs."""
    path = args.results / card["slug"] / "verdicts.json"
    remedy = "run verdicts.py"
    study = read_json(path, remedy)
    winner = study["conclusion"]["winner"]
    if not winner:
        raise SystemExit(
            f"{path}: expected a model that may be deployed, found {study['conclusion']['text']}; {remedy} on more texts"
        )
    graph = args.repository / EMBEDDERS[winner] / "1" / "model.onnx"
    if not graph.is_file() or sha256(graph) != study["graph_sha256"][winner]:
        raise SystemExit(f"{path}: expected a study of {graph}, found one of another graph; {remedy} again")
    plan, studied = graph.with_name("model.plan"), study.get("plan_sha256", {}).get(winner)
    if studied and (not plan.is_file() or sha256(plan) != studied):
        raise SystemExit(f"{path}: expected a study of {plan}, found one of another plan; {remedy} again")
    return winner, study


def write_manifest(folder, name, winner, study):
    """manifest.json: what is in the package, why this one, how it is served."""
    repository = folder / "model_repository"
    files = sorted(p for p in repository.rglob("*") if p.is_file())
    manifest = {
        "name": name,
        "model": winner,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "serve": "./serve.sh start --model-repository model_repository, or make_image.sh",
        "card": {k: v for k, v in study["model"].items() if k not in ("environment", "service")},
        "study": {key: study[key] for key in FROM_STUDY} | {"verdicts": strip(study["models"][winner])},
        "files": {str(p.relative_to(folder)): sha256(p) for p in files},
    }
    write_json(folder / "manifest.json", manifest)


def strip(row):
    """A model's row without the flipped texts: they belong to the study."""
    return {key: value for key, value in row.items() if key != "flipped"}


def write_archive(folder, root, path):
    """folder -> .tar.gz under the name `root`; owners and modes do not depend on who packs."""

    def neutral(info):
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    with replace_when_done(path) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
        archive.add(folder, arcname=root, filter=neutral)


def package(args):
    """verdicts.py package: the conclusion's model, ready to be served elsewhere."""
    check_classifier_repository(args.repository)
    card = read_card(args.repository)
    winner, study = read_winner(args, card)
    service = card["service"]
    name = check_name(args.name or service["name"])
    precision = winner.removeprefix("TRT_")
    root = f"{name}-{precision}"
    output = args.output or ROOT / "build" / f"{root}.tar.gz"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / root
        folder.mkdir()
        # what was measured is what is packed
        engine = "plan" if study["models"][winner]["engine"].startswith("TensorRT") else "onnx"
        batch = args.max_batch_size or service["max_batch_size"]
        extract(args.repository, folder / "model_repository", name, precision, batch, engine)
        write_manifest(folder, name, winner, study)
        write_archive(folder, root, output)
    print(f"{output}: {name} with {EMBEDDERS[winner]}, {output.stat().st_size / 1e6:.1f} MB, sha256 {sha256(output)}")
