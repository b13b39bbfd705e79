#!/usr/bin/env python3
"""Train trees on sentence embeddings, and write the repository that serves them through Triton's FIL backend.

Reads:  --encoder, a repository of torch2onnx.py --task sentence-embedding; --data, labelled texts of two classes;
        --eval, others to measure on; --classifier, a classifier's repository, to measure beside the trees.
Writes: --output: tokenizer and encoder, XGBoost, LightGBM and a forest of scikit-learn, the ensemble "sentiment".
Run:    ./examples/fil/build.py --encoder build/sentences
Prints: the accuracy of each on the texts that were held out, then the folder to serve

Packages: pip install --no-deps --target build/fil/packages -r examples/fil/requirements.txt
"""

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import make_parser
from core.files import ROOT, replace_folder_when_done, sha256, write_json
from core.labelled import REVIEWS, add_column_arguments, class_indices, read_labelled

HERE = Path(__file__).resolve().parent
PACKAGES = ROOT / "build" / "fil" / "packages"
INSTALL = "pip install --no-deps --target build/fil/packages -r examples/fil/requirements.txt"
FILES = {  # library -> (model_type of config.pbtxt, the file that FIL reads)
    "xgboost": ("xgboost_json", "xgboost.json"),
    "lightgbm": ("lightgbm", "model.txt"),
    "forest": ("treelite_checkpoint", "checkpoint.tl"),
}
RECORD = "trees.json"
BATCH = 32  # texts
EVAL_EVERY = 5  # without --eval, every fifth line is held out
ENSEMBLE = "sentiment"


def find_packages():
    """Put the example's packages behind those of the project; exits where one is missing."""
    sys.path.append(str(PACKAGES))
    for name in ("treelite", "xgboost", "lightgbm", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name}: expected the package in {PACKAGES}, found none; {INSTALL}")


def read_data(args):
    """((texts, classes) to train on, (texts, classes) held out, names of the classes)."""
    texts, labels = read_labelled(args.data, args.text_column, args.label_column)
    names = sorted(set(labels))
    if len(names) != 2:
        raise SystemExit(f"{args.data}: expected two classes, found {', '.join(names)}; choose texts of two")
    classes = class_indices(args.data, labels, names)
    if args.eval:
        others, labels = read_labelled(args.eval, args.text_column, args.label_column)
        return (texts, classes), (others, class_indices(args.eval, labels, names)), names
    held_out = texts[EVAL_EVERY - 1 :: EVAL_EVERY], classes[EVAL_EVERY - 1 :: EVAL_EVERY]
    del texts[EVAL_EVERY - 1 :: EVAL_EVERY], classes[EVAL_EVERY - 1 :: EVAL_EVERY]
    return (texts, classes), held_out, names


def run_graph(repository, task, texts):
    """The output of a repository's graph for each text, float32 [texts, size]; exits if it is another task's."""
    import numpy as np

    from core.onnx_runtime import open_session
    from core.repository import graph_path, read_card, tokenizer_path
    from core.tables import REFERENCE
    from core.tokens import encode, load_tokenizer

    card = read_card(repository)
    if card["task"] != task:
        raise SystemExit(f"{repository}: expected a repository of --task {task}, found one of {card['task']}")
    tokenizer, session = load_tokenizer(tokenizer_path(repository)), open_session(graph_path(repository, REFERENCE))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length need little padding
    rows = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        feeds = encode(tokenizer, [texts[i] for i in batch], card["inputs"])
        rows |= zip(batch, session.run(list(card["outputs"])[:1], feeds)[0], strict=True)
    return np.stack([rows[i] for i in range(len(texts))])


def train(features, classes, args):
    """{library: fitted classifier}; the same seed gives the same trees."""
    from lightgbm import LGBMClassifier
    from sklearn.ensemble import RandomForestClassifier
    from xgboost import XGBClassifier

    common = {"n_estimators": args.trees, "random_state": args.seed, "n_jobs": args.threads}
    models = {
        "xgboost": XGBClassifier(max_depth=4, learning_rate=0.1, **common),
        "lightgbm": LGBMClassifier(num_leaves=15, verbose=-1, **common),
        "forest": RandomForestClassifier(min_samples_leaf=2, **common),
    }
    return {library: model.fit(features, classes) for library, model in models.items()}


def save_trees(library, model, path):
    """The file that FIL reads."""
    import treelite

    if library == "forest":
        treelite.sklearn.import_model(model).serialize(path)
    else:
        (model if library == "xgboost" else model.booster_).save_model(path)


def write_model(folder, library, model, classes_only=False):
    """One model of the repository: config.pbtxt beside this file with this library's names, and the trees."""
    kind, file = FILES[library]
    text = (
        (HERE / "config.pbtxt")
        .read_text()
        .replace('"xgboost"', f'"{folder.name}"')
        .replace('"xgboost_json"', f'"{kind}"')
    )
    text = text.replace("dims: [ 384 ]", f"dims: [ {model.n_features_in_} ]")
    if classes_only:
        text = text.replace("    dims: [ 2 ]", "    dims: [ 1 ]")
        text = text.replace(
            '"predict_proba" value: { string_value: "true" }', '"predict_proba" value: { string_value: "false" }'
        )
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text)
    save_trees(library, model, folder / "1" / file)


def write_ensemble(encoder, folder, library):
    """The encoder's own ensemble, its embedding handed on to the trees: CLASS and PROBABILITIES."""
    from core.repository import read_card
    from core.tables import EMBEDDING
    from serving.configs import config_text, data_type, read_config

    config = read_config(encoder / read_card(encoder)["service"]["name"] / "config.pbtxt")
    config.name = ENSEMBLE
    del config.output[:]
    for name, size, model in (("CLASS", 1, f"{library}_class"), ("PROBABILITIES", 2, library)):
        config.output.add(name=name, data_type=data_type("FP32"), dims=[size])
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map["input__0"] = EMBEDDING
        step.output_map["output__0"] = name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config_text(config))


def write_repository(args, models, record):
    """All models in one folder, replaced at once."""
    from core.repository import graph_path
    from core.tables import REFERENCE

    graph = graph_path(args.encoder, REFERENCE).parents[1]
    with replace_folder_when_done(args.output) as temporary:
        shutil.copytree(args.encoder / "tokenizer", temporary / "tokenizer")
        shutil.copytree(graph, temporary / graph.name, ignore=shutil.ignore_patterns("packed.onnx"))
        for library, model in models.items():
            write_model(temporary / library, library, model)
        write_model(temporary / f"{args.library}_class", args.library, models[args.library], classes_only=True)
        write_ensemble(args.encoder, temporary / ENSEMBLE, args.library)
        write_json(temporary / RECORD, record)


def accuracy(found, expected):
    """Share of classes that are right."""
    return sum(int(a) == b for a, b in zip(found, expected, strict=True)) / len(expected)


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="repository of sentence embeddings")
    parser.add_argument("--data", type=Path, default=REVIEWS, help="labelled texts (default: assets/reviews.tsv)")
    parser.add_argument("--eval", type=Path, help="labelled texts to measure on (default: every fifth line of --data)")
    add_column_arguments(parser)
    parser.add_argument("--classifier", type=Path, help="repository of a fine-tuned classifier of the same classes")
    parser.add_argument(
        "--library", choices=tuple(FILES), default="xgboost", help="of the ensemble (default: %(default)s)"
    )
    parser.add_argument("--trees", type=int, default=300, help="of each library (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="that train (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "fil" / "repository")
    args = parser.parse_args()
    if args.trees < 1 or args.threads < 1:
        parser.error("--trees, --threads: expected at least 1")
    if args.output.exists() and not (args.output / RECORD).is_file():
        parser.error(f"--output: expected a new folder or one of this script, found {args.output}; name another")
    return args


def main():
    args = parse_args()
    find_packages()
    (texts, classes), (held_out, expected), names = read_data(args)
    models = train(run_graph(args.encoder, "sentence-embedding", texts), classes, args)
    features = run_graph(args.encoder, "sentence-embedding", held_out)
    found = {library: accuracy(model.predict(features), expected) for library, model in models.items()}
    if args.classifier:
        logits = run_graph(args.classifier, "classification", held_out)
        found["the fine-tuned classifier"] = accuracy(logits.argmax(1), expected)
    record = {"classes": names, "data_sha256": sha256(args.data), "trees": args.trees, "seed": args.seed}
    write_repository(args, models, record | {"held_out": len(expected), "accuracy": found})
    for what, share in found.items():
        print(f"{what}: accuracy {share:.3f} on {len(expected)} texts")
    print(f"classes: {', '.join(f'{i} {name}' for i, name in enumerate(names))}")
    print(args.output)


if __name__ == "__main__":
    main()
