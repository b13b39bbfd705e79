"""INT8 of the packed graph, which services execute on a CPU: the recipes of the padded graph at the same MatMuls."""

import onnx

from core.tables import PACKED_FILE
from precision.int8_graph import insert_int8, matmul_groups

WITHIN = "padded."  # what tasks/packing.py's graph puts before the names of the graph that it calls


def rename_recipes(packed, recipes):
    """Recipes by the tensors and MatMuls of the packed graph; those of a MatMul that it has not are left out."""
    by_names = {frozenset(WITHIN + name for name in recipe["weights"]): recipe for recipe in recipes.values()}
    found = {tensor: by_names.get(frozenset(names)) for tensor, names in matmul_groups(packed).items()}
    of_matmuls = ("weights", "rows", "mean_errors")
    return {
        tensor: recipe | {key: {WITHIN + n: v for n, v in recipe[key].items()} for key in of_matmuls if key in recipe}
        for tensor, recipe in found.items()
        if recipe
    }


def make_packed(reference_path, learnt):
    """The packed graph with the MatMuls of `learnt` in INT8; None where there is none, or where one of them is not in it.

    Attention's own products stay in floating point there, so there is none beside a graph that has them in INT8.
    """
    path = reference_path.with_name(PACKED_FILE)
    if learnt.products or not path.is_file():
        return None
    packed = onnx.load(path)
    recipes, chosen = rename_recipes(packed, learnt.recipes), {WITHIN + name for name in learnt.chosen}
    if not chosen <= {name for recipe in recipes.values() for name in recipe["weights"]}:
        return None
    return insert_int8(packed, recipes, chosen)
