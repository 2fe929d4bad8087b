"""Writes what folding changed back into an ONNX graph: new weights, and the nodes that are gone."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from training.folding.algebra import Array
from training.folding.graph_constants import graphs_inside, names_read_inside
from training.folding.graph_reading import Read
from training.folding.network import Layer, Rescale


class Names:
    """Names that no value of the model has."""

    def __init__(self, graph: GraphProto) -> None:
        """Collect the names of a graph and of those inside it."""
        self._taken: set[str] = set(_all_names(graph))

    def fresh(self, wanted: str) -> str:
        """Return `wanted`, with a number where it is taken."""
        name, count = wanted, 1
        while name in self._taken:
            name, count = f"{wanted}_{count}", count + 1
        self._taken.add(name)
        return name


class Writer:
    """Writes into one graph. `exact` gets the values of new weights before they are rounded to the file's type."""

    def __init__(self, read: Read, names: Names, *, is_main: bool, as_inputs: bool) -> None:
        """`as_inputs`: every initializer must be listed among the inputs too, as files of IR version 3 do."""
        self._is_main = is_main
        self.exact: dict[str, Array] = {}
        self._read = read
        self._graph = read.graph
        self._nodes = read.all_nodes
        self._names = names
        self._as_inputs = as_inputs
        self._computed = {name for node in self._nodes for name in node.output}

    def write(self) -> None:
        """Write every change, then drop the constants that only the dropped nodes used."""
        before = self._uses()
        renamed = self._final_names()
        gone = [step for step in self._read.nodes if isinstance(step, Rescale) and step.removed]
        for step, nodes in self._read.nodes.items():
            if isinstance(step, Layer) and step.changed:
                self._write_layer(step, nodes)
            elif isinstance(step, Rescale) and step.changed and not step.removed:
                self._write_rescale(step, nodes)
        self._discard([node for step in gone for node in self._read.nodes[step]])
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
        self._drop_unused(before)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _final_names(self) -> dict[str, str]:
        renamed = {old: value.name for old, value in self._read.values.items() if value.name != old}
        for step in self._read.nodes:
            if isinstance(step, Rescale) and step.removed:
                renamed[step.output.name] = step.inputs[0].name
        return {old: _follow(renamed, old) for old in renamed}

    def _write_layer(self, layer: Layer, nodes: list[NodeProto]) -> None:
        node = nodes[0]
        attributes = {entry.name: entry for entry in node.attribute}
        weight = layer.weight
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not getattr(attributes.get("transB"), "i", 0)):
            weight = weight.T
        if node.op_type == "Gemm":
            kept = [entry for name, entry in attributes.items() if name not in {"alpha", "beta"}]
            del node.attribute[:]
            node.attribute.extend(kept)
        element_type = self._read.types.get(node.input[1]) or TensorProto.FLOAT
        node.input[1] = self._store(weight, node.input[1], element_type)
        if layer.bias is not None and node.op_type == "MatMul":
            self._write_added_bias(layer, nodes, element_type)
        elif layer.bias is not None:
            old = node.input[2] if len(node.input) > 2 else ""
            del node.input[2:]
            node.input.append(self._store(layer.bias, old, element_type, fresh=f"{layer.name}_bias"))

    def _write_added_bias(self, layer: Layer, nodes: list[NodeProto], element_type: int) -> None:
        assert layer.bias is not None
        if len(nodes) > 1:
            index = int(self._read.constants.has(nodes[1].input[1]))
            nodes[1].input[index] = self._store(layer.bias, nodes[1].input[index], element_type)
            return
        (product,) = nodes
        bias = self._store(layer.bias, "", element_type, fresh=f"{layer.name}_bias")
        output, product.output[0] = product.output[0], self._names.fresh(f"{layer.name}_product")
        add = helper.make_node("Add", [product.output[0], bias], [output], self._names.fresh(f"{layer.name}_add"))
        self._insert_after(product, [add])

    def _write_rescale(self, step: Rescale, nodes: list[NodeProto]) -> None:
        """Write it as the one BatchNormalization that was among its nodes, or as one Mul and one Add."""
        norms = [node for node in nodes if node.op_type == "BatchNormalization"]
        source, target = nodes[0].input[self._flowing(nodes[0])], nodes[-1].output[0]
        if norms:
            norm = norms[-1]
            self._write_norm(step, norm)
            norm.input[0], norm.output[0] = source, target
            new = [norm]
        else:
            new = self._mul_and_add(step, source, target, self._read.types.get(source) or TensorProto.FLOAT)
        placed = [NodeProto.FromString(node.SerializeToString()) for node in new]
        self._insert_after(nodes[-1], placed)
        self._discard(nodes)
        self._read.nodes[step] = placed

    def _flowing(self, node: NodeProto) -> int:
        return 1 if self._read.constants.has(node.input[0]) else 0

    def _write_norm(self, step: Rescale, norm: NodeProto) -> None:
        """Choose γ and β so that, with the statistics it has, the layer is the step's scale and shift."""
        mean, variance = (self._read.constants.floats(norm.input[index]) for index in (3, 4))
        assert mean is not None
        assert variance is not None
        eps = next((entry.f for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
        affine = step.affine.over(len(mean))
        element_type = self._read.types.get(norm.input[1]) or TensorProto.FLOAT
        norm.input[1] = self._store(affine.scale * np.sqrt(variance + eps), norm.input[1], element_type)
        norm.input[2] = self._store(affine.shift + mean * affine.scale, norm.input[2], element_type)

    def _mul_and_add(self, step: Rescale, source: str, target: str, element_type: int) -> list[NodeProto]:
        rank = step.output.rank if step.axis is not None else 1
        assert rank is not None
        shape = (-1, *[1] * (rank - 1 - (step.axis or 0)))
        parts = {"Mul": step.affine.scale, "Add": step.affine.shift}
        needed = [kind for kind, plain in (("Mul", 1), ("Add", 0)) if (parts[kind] != plain).any()] or ["Mul"]
        nodes = []
        for kind in needed:
            constant = self._store(parts[kind].reshape(shape), "", element_type, fresh=f"{step.name}_{kind.lower()}")
            output = target if kind == needed[-1] else self._names.fresh(f"{step.name}_scaled")
            nodes.append(helper.make_node(kind, [source, constant], [output], self._names.fresh(f"{step.name}_{kind}")))
            source = output
        return nodes

    def _insert_after(self, anchor: NodeProto, new: Iterable[NodeProto]) -> None:
        index = next(index for index, node in enumerate(self._nodes) if node is anchor)
        self._nodes[index + 1 : index + 1] = new

    def _discard(self, gone: Iterable[NodeProto]) -> None:
        identities = {id(node) for node in gone}
        self._nodes[:] = [node for node in self._nodes if id(node) not in identities]

    def _uses(self) -> Counter[str]:
        uses = Counter(name for node in self._nodes for name in node.input if name)
        uses.update(names_read_inside(self._nodes))
        uses.update(output.name for output in self._graph.output)
        return uses

    def _store(self, values: Array, old: str, element_type: int, fresh: str = "") -> str:
        """Store weights under their old name where nothing else reads it, else under a new one; return the name."""
        stored: NDArray[np.generic] = values.astype(helper.tensor_dtype_to_np_dtype(element_type))
        tensor = self._read.constants.tensor(old) if old else None
        unshared = self._is_main and self._uses()[old] == 1  # two branches may each have a weight of one name
        alone = tensor is not None and unshared and tuple(tensor.dims) == stored.shape
        name = old if alone else self._names.fresh(fresh or f"{old}_folded")
        new = numpy_helper.from_array(np.ascontiguousarray(stored), name)
        if alone:
            assert tensor is not None
            tensor.CopyFrom(new)
        else:
            self._graph.initializer.append(new)
            if self._as_inputs:
                self._graph.input.append(helper.make_tensor_value_info(name, element_type, stored.shape))
        self.exact[name] = values
        return name

    def _drop_unused(self, before: Counter[str]) -> None:
        """Drop constants and nodes of constants that were in use and are not any more."""
        while True:
            now = self._uses()
            dead = [node for node in self._nodes if self._is_dead(node, before, now)]
            if not dead:
                break
            self._discard(dead)
        unused = {tensor.name for tensor in self._graph.initializer if before[tensor.name] and not now[tensor.name]}
        _drop(self._graph.initializer, unused)
        _drop(self._graph.input, unused)
        _drop(self._graph.value_info, unused | {name for name in self._computed if not now[name]})

    def _is_dead(self, node: NodeProto, before: Counter[str], now: Counter[str]) -> bool:
        constant = self._read.constants.has(node.output[0])
        return constant and any(before[name] for name in node.output) and not any(now[name] for name in node.output)


def _all_names(graph: GraphProto) -> Iterable[str]:
    yield from (tensor.name for tensor in graph.initializer)
    yield from (entry.name for group in (graph.input, graph.output, graph.value_info) for entry in group)
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
    for inner in graphs_inside(graph.node):
        yield from _all_names(inner)


def _follow(renamed: dict[str, str], name: str) -> str:
    seen = {name}
    while renamed.get(name, name) not in seen:
        name = renamed[name]
        seen.add(name)
    return name


def _drop(entries: Any, names: set[str]) -> None:
    for index in reversed(range(len(entries))):
        if entries[index].name in names:
            del entries[index]
