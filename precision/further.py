"""Every precision beside the reference on texts that chose nothing, executed here: what is asked for with --precisions.

TF32, BF16 and FP8 are emulated: operands are rounded exactly as the format says, sums are FP32. What a GPU adds is the
order of its sums, and roundings that fusion spares.
"""

from core.files import TEXTS, evaluation_texts, read_json, write_json
from core.record import environment_record, results_folder
from core.repository import graph_path, graph_properties, present, read_graph, tokenizer_path
from core.tables import MODELS, PRECISIONS, REFERENCE
from core.tokens import encode, load_tokenizer
from precision.int8_search import measure, meets, run_graph
from precision.makers import emulate_tf32
from tasks.examples import examples
from tasks.table import TASKS

RECORD = "precisions.json"


def measure_precisions(repository, card, results):
    """Path of precisions.json: for each graph that is there, and TF32, its mean deviations and whether its gate holds."""
    task, reference = TASKS[card["task"]], read_graph(graph_path(repository, REFERENCE))
    texts = evaluation_texts()
    encoded = encode(load_tokenizer(tokenizer_path(repository)), examples(card, texts), card["inputs"])
    expected, rows = run_graph(reference, encoded, task), {}
    graphs = {MODELS[key].precision: graph_path(repository, key) for key in present(repository) if key != REFERENCE}
    for precision in (p for p in PRECISIONS if p in graphs or p == "TF32"):
        graph = emulate_tf32(reference) if precision == "TF32" else read_graph(graphs[precision])
        gate = task.gate or PRECISIONS[precision].gate
        row = measure(graph, expected, encoded, task)
        emulated = precision == "TF32" or not PRECISIONS[precision].on_cpu
        row |= {"eight_bit_share": float(graph_properties(graph).get("int8_flops_share", 0)), "emulated": emulated}
        rows[precision] = row | {"gate": gate, "within_gate": meets(row, gate)}
    record = {"model": card, "environment": environment_record(), "texts": {"file": TEXTS.name, "count": len(texts)}}
    path = results_folder(results, card) / RECORD
    write_json(path, record | {"precisions": rows})
    return path


def describe_precisions(path):
    """A line for each precision of precisions.json."""
    rows = read_json(path, "run quantize.py --precisions again")["precisions"]
    for name, row in rows.items():
        found = "not finite"
        if row["mean_cosine"] is not None:
            found = f"mean cosine {row['mean_cosine']:.6f}, relative L2 error {row['relative_l2_error']:.2%}"
        gate = "within its gate" if row["within_gate"] else "beyond its gate"
        yield f"{name:4} {found}, {gate}{', emulated' if row['emulated'] else ''}"
