"""Dynamic axes of an exported ONNX graph: their names, and a node that rejects sizes outside the bounds.

ONNX has no operator that raises an error. So the images are reshaped to their own shape, which is made invalid if a
size is out of bounds. The runtime then fails in a node whose name states the accepted sizes.
"""

from typing import Any

import onnx_ir as ir

from .bounds import Bounds


def name_axes(graph: ir.Graph) -> None:
    """Name the dynamic axes of an encoder's graph: batch, height, width, rows and columns."""
    names: dict[str, str] = {}
    values = (graph.inputs[0], *(value for value in graph.outputs if value.name == "tokens"))
    for value, called in zip(values, (("batch", "", "height", "width"), ("batch", "rows", "columns"))):
        assert value.shape is not None
        names |= {str(axis): name for axis, name in zip(value.shape, called) if not isinstance(axis, int)}
    outputs = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *outputs):
        if value.shape is not None:
            axes = [names.get(str(axis), axis) if not isinstance(axis, int) else axis for axis in value.shape]
            value.shape = ir.Shape(axes)


def refuse_other_sizes(graph: ir.Graph, bounds: Bounds) -> None:
    """Make a graph fail for images [batch, channels, height, width] outside `bounds`, instead of cropping them."""
    images, first = graph.inputs[0], next(iter(graph))
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes or None))
        return nodes[-1].outputs[0]

    def integers(*values: int) -> ir.Value:
        return add("Constant", value_ints=list(values))

    shape = add("Shape", images)
    sizes = add("Gather", shape, integers(0, 2, 3), axis=0)
    least = integers(1, bounds.min_size, bounds.min_size)
    most = integers(bounds.max_batch, bounds.max_size, bounds.max_size)
    steps = integers(1, bounds.patch, bounds.patch)
    whole = add("Mul", add("Div", sizes, steps), steps)
    room = [add("Sub", sizes, least), add("Sub", most, sizes), add("Sub", whole, sizes)]
    outside = add("Min", add("ReduceMin", add("Concat", *room, axis=0), keepdims=1), integers(0))
    # zero for accepted sizes; otherwise it makes the batch less than -1, which is invalid
    excess = add("Mul", integers(1 << 20, 0, 0, -1), outside)
    checked = add("Reshape", images, add("Add", shape, excess))
    sides = f"sides_{bounds.min_size}_to_{bounds.max_size}_in_steps_of_{bounds.patch}"
    nodes[-1].name = f"accepted_batches_1_to_{bounds.max_batch}_{sides}"
    checked.name, checked.shape, checked.type = "accepted_images", images.shape, images.type
    ir.convenience.replace_all_uses_with(images, checked)
    graph.insert_before(first, nodes)
    for node in nodes:  # keep reading the original images
        for index, value in enumerate(node.inputs):
            if value is checked:
                node.replace_input_with(index, images)
