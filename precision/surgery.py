"""Graph surgery: who makes and reads each tensor, and a copy of a graph that takes further nodes and constants."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


class GraphIndex:
    """Who makes and who reads each tensor of a graph, and its constants."""

    def __init__(self, model):
        self.nodes = list(model.graph.node)
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.constants = {i.name: i for i in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self.readers = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def array(self, name):
        return numpy_helper.to_array(self.constants[name])

    def only_reader(self, name):
        """The node that reads a tensor, None if there are more or the graph returns it."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


class Surgeon:
    """A copy of a graph to put Q/DQ into: nodes before or after others, new constants."""

    def __init__(self, reference):
        self.model = onnx.ModelProto()
        self.model.CopyFrom(reference)
        self.index = GraphIndex(self.model)
        self.before, self.after, self.added = {}, {}, {}
        self.biases = {n.name: bias_add(self.index, n) for n in self.index.nodes if n.op_type in ("MatMul", "Gemm")}

    def constant(self, name, value):
        self.added[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def array(self, name):
        return numpy_helper.to_array(self.added[name]) if name in self.added else self.index.array(name)

    def replace_constant(self, node, position, value):
        """Give one node a constant of its own: another node may read the same one."""
        node.input[position] = self.constant(f"{node.name}/input_{position}", value.astype(np.float32))

    def finish(self):
        """The graph with all nodes in order, without constants that nothing reads."""
        before, after = self.before, self.after
        nodes = [n for own in self.index.nodes for n in (*before.get(own.name, []), own, *after.get(own.name, []))]
        return rebuild(self.model, nodes, (self.index.constants | self.added).values())


def rebuild(model, nodes, constants):
    """The model with these nodes, and with those of the constants that they read."""
    read, old = {name for node in nodes for name in node.input}, model.graph
    kept = [c for c in constants if c.name in read]
    model.graph.CopyFrom(helper.make_graph(nodes, old.name, old.input, old.output, kept, value_info=old.value_info))
    return model


def bias_add(index, node):
    """The Add of a constant row behind a MatMul, or None."""
    add = index.only_reader(node.output[0])
    if add is None or add.op_type != "Add" or add.input[1] not in index.constants:
        return None
    return add if len(index.constants[add.input[1]].dims) == 1 else None
