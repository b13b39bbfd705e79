"""What verdicts.py prints: tables of a study's record, and the texts whose verdict flips."""

PRINTED_FLIPS = 10  # per model; all are in verdicts.json


def show(interval):
    """0.9123 [0.8990, 0.9255]"""
    if interval is None:
        return "undefined"
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def graphs(record):
    """(name, row) of every model but torch."""
    return [(name, row) for name, row in record["models"].items() if name != "torch"]


def print_rule(record):
    """What a verdict is in this study, and what the service answers."""
    if record["threshold"] is None:
        print("verdict: the largest logit, and so is the service's LABEL")
        return
    print(
        f"verdict: logit of {record['positive']} at or above {record['threshold']:.4f} (precision {record['precision']:g} on torch)"
    )
    if record["served_verdict"] == "threshold":
        print("service: the LABEL of what `verdicts.py package` packs follows this threshold")
    else:
        print("service: its LABEL is the largest logit and cannot follow this threshold; the flips are the threshold's")


def print_quality(record):
    """How good each model's verdicts are against the labels."""
    keys = ("accuracy", "precision", "recall")
    head = "".join(f"{key:>26}" for key in keys)
    print(f"{'model':10}{head}  (bootstrap {record['bootstrap']['confidence']:.0%})")
    for name, row in record["models"].items():
        print(f"{name:10}" + "".join(f"{show(row['quality'][key]):>26}" for key in keys))


def print_agreement(record):
    """How close each model's verdicts and logits are to torch's."""
    print(
        f"{'model':10}{'agreement (exact)':>26}{'flips':>7}{'restored to':>13}{'at':>10}{'McNemar p':>11}{'mean':>10}{'min':>10}{'max abs':>10}{'p50 ms':>8}  executed by"
    )
    for name, row in graphs(record):
        d, closest = row["deviation"], row["closest_threshold"]
        after = "" if closest is None else f"{closest['flips_after']} ({closest['flips_cross_validated']})"
        at = "" if closest is None else f"{closest['threshold']:.4f}"
        print(
            f"{name:10}{show(row['agreement']):>26}{row['flips']:7}{after:>13}{at:>10}{row['mcnemar']['p']:11.3g}"
            f"{d['mean']:10.4f}{d['min']:10.4f}{d['max_abs']:10.4f}{row['latency_p50_ms']:8.2f}  {row['engine']}"
        )


def print_confusion(record):
    """Each model's verdicts against torch's, a line per verdict of torch."""
    labels = record["model"]["labels"]
    names = labels if record["positive"] is None else [f"not {record['positive']}", record["positive"]]
    for model, row in graphs(record):
        for name, counts in zip(names, row["confusion"], strict=True):
            found = ", ".join(f"{count} {other}" for other, count in zip(names, counts, strict=True))
            print(f"confusion {model}: torch {name}: {found}")


def print_study(record, flips):
    """Tables and flips on stdout; flips: {name: those of study.list_flips, with texts}."""
    for part in (print_rule, print_quality, print_agreement, print_confusion):
        part(record)
    for name, listed in flips.items():
        for flip in listed[:PRINTED_FLIPS]:
            print(
                f"flip {name}: torch {flip['torch']}, {name} {flip['this']}, label {flip['label']}: {flip['text'][:100]}"
            )
        if len(listed) > PRINTED_FLIPS:
            print(f"flip {name}: {len(listed) - PRINTED_FLIPS} more in verdicts.json")
    print(f"rule: {record['conclusion']['rule']}")
    print(f"conclusion: {record['conclusion']['text']}")
