"""What verdicts.py prints: the report's tables of a study, what its record has besides, and the flipped texts."""

from reporting.verdicts import agreement_table, quality_table, rule

PRINTED_FLIPS = 10  # per model; all are in verdicts.json


def describe_model(name, row, verdicts):
    """Lines on what the tables lack: the span of the deviation, the closest threshold, torch's verdicts and these."""
    d, closest = row["deviation"], row["closest_threshold"]
    yield f"deviation {name}: mean {d['mean']:.4f}, from {d['min']:.4f} to {d['max']:.4f}"
    if closest:
        left = f"{closest['flips_after']} flips, {closest['flips_cross_validated']} cross-validated"
        yield f"closest threshold {name}: {closest['threshold']:.4f} leaves {left}"
    for verdict, counts in zip(verdicts, row["confusion"], strict=True):
        found = ", ".join(f"{count} {other}" for other, count in zip(verdicts, counts, strict=True))
        yield f"confusion {name}: torch {verdict}: {found}"


def print_study(record, flips):
    """Tables and flips on stdout; flips: {name: those of study.list_flips, with texts}."""
    positive, confidence = record["positive"], record["bootstrap"]["confidence"]
    print(f"{rule(record)} Intervals have {confidence:.0%}: exact for the agreement, by bootstrap for the others.\n")
    print(f"{agreement_table(record)}\n\n{quality_table(record)}\n")
    for name, listed in flips.items():
        verdicts = record["model"]["labels"] if positive is None else [f"not {positive}", positive]
        print(*describe_model(name, record["models"][name], verdicts), sep="\n")
        for flip in listed[:PRINTED_FLIPS]:
            print(
                f"flip {name}: torch {flip['torch']}, {name} {flip['this']}, label {flip['label']}: {flip['text'][:100]}"
            )
        if len(listed) > PRINTED_FLIPS:
            print(f"flip {name}: {len(listed) - PRINTED_FLIPS} more in verdicts.json")
    print(f"rule: {record['conclusion']['rule']}")
    print(f"conclusion: {record['conclusion']['text']}")
