"""What the server counted while requests ran, as a table: of the asked model, and of the models that it calls."""

import sys
import time

from serving.counters import counter
from serving.requests import json_options, named_errors
from serving.server import connect

SETTLED_S, SETTLED_TRIES = 0.1, 20  # a model counts a request shortly after its answer
# column of the statistics: its part of inference_stats
TIMES = {"queue": "queue", "input": "compute_input", "infer": "compute_infer", "output": "compute_output"}


def read_statistics(server):
    """{(model, version): its statistics since the server started}, once they stand still."""
    found = None
    for _ in range(SETTLED_TRIES):
        with named_errors(server):
            read = connect(*server)[0].get_inference_statistics(**json_options(server))["model_stats"]
        if read == found:
            break
        found = read
        time.sleep(SETTLED_S)
    return {(stats["name"], stats["version"]): stats for stats in read}


def count_between(before, after):
    """What one model counted between two readings, as the columns of the table."""

    def added(*keys):
        return counter(after, *keys) - counter(before, *keys)

    requests, failed = (added("inference_stats", end, "count") for end in ("success", "fail"))
    inferences, executions = added("inference_count"), added("execution_count")
    row = {"requests": requests, "failed": failed, "executions": executions}
    row["mean batch"] = f"{inferences / executions:.2f}" if executions else "-"
    for title, part in TIMES.items():
        times = added("inference_stats", part, "count")
        row[f"{title} ms"] = f"{added('inference_stats', part, 'ns') / times / 1e6:.2f}" if times else "-"
    return row


def print_statistics(before, after, asked):
    """A table on standard error: the asked model, then all others that were executed meanwhile, as its steps are."""
    rows = {}
    for name, version in sorted(after, key=lambda key: key[0] != asked):
        row = count_between(before.get((name, version), {}), after[name, version])
        if row["requests"] or row["failed"]:
            rows[name] = row
    print("counted by the server meanwhile, those of other clients too; ms for each request", file=sys.stderr)
    width = max(map(len, [*rows, "model"]))
    titles = next(iter(rows.values()), {})
    print("model".ljust(width), *(title.rjust(10) for title in titles), file=sys.stderr)
    for name, row in rows.items():
        print(name.ljust(width), *(str(value).rjust(10) for value in row.values()), file=sys.stderr)
