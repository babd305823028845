"""`propagate_2d` in standard ONNX operators: one Scan per direction, along rows or columns, forwards or backwards.

Scan has the axis and the direction as attributes, so no feature map is transposed or flipped. Weights are normalised
for the whole map first; the loop has nine small operators per line.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnxscript.evaluator

from ..ops.reference import DIRECTIONS, EPSILON, SMALLEST

op: Any = onnxscript.opset18
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def propagate_2d_onnx(
    x: Any,
    logits: Any,
    lam: Any,
    u: Any,
    keep: Any,
    mask: Any,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
    normalise_state: bool = False,
) -> Any:
    """Translate `cgspn::propagate_2d` for PyTorch's exporter, in float32. Raises NotImplementedError for a mask."""
    if mask is not None:
        raise NotImplementedError(
            "the ONNX form of propagate_2d does not support a mask; export an encoder without one"
        )
    channels, sets = x.shape[-1], lam.shape[-1]
    sets_of = op.Constant(value_ints=[c * sets // channels for c in range(channels)])
    maps = []
    for d, code in enumerate(directions):
        vertical, ahead = DIRECTIONS[code] in ("down", "up"), DIRECTIONS[code] in ("down", "right")
        index, axis = op.Constant(value_ints=[d]), op.Constant(value_ints=[3])
        given = (logits, lam, u) if keep is None else (logits, lam, u, keep)
        own = [op.Squeeze(op.Gather(t, index, axis=3), axis) for t in given]
        if sets != channels:
            own = [op.Gather(t, sets_of, axis=-1) for t in own]
        features = op.Squeeze(op.Gather(x, index, axis=3), axis) if len(x.shape) == 5 else x
        drive = op.Mul(own[1], features)
        weights = _weights(own[0], position_axis=2 if vertical else 1)
        if keep is not None:
            kept = op.Sigmoid(own[3])
            weights = [op.Mul(weight, kept) for weight in weights]
        along = 1 if vertical else 2
        h = _scan(drive, weights, along, ahead)
        if normalise_state:
            h = op.Div(h, op.Max(_scan(own[1], weights, along, ahead), op.Constant(value_float=SMALLEST)))
        maps.append(op.Mul(own[2], h))
    if not merge_sum:
        return op.Concat(*[op.Unsqueeze(y, op.Constant(value_ints=[3])) for y in maps], axis=3)
    total = maps[0]
    for y in maps[1:]:
        total = op.Add(total, y)
    return total


def _weights(logits: Any, position_axis: int) -> list[Any]:
    """logits [B, H, W, 3, C] -> the three normalised weights, [B, H, W, C] each, zero where there is no neighbour."""
    sigma = op.Split(op.Sigmoid(logits), axis=3, num_outputs=3)
    left, centre, right = (op.Squeeze(part, op.Constant(value_ints=[3])) for part in sigma)
    count = op.Squeeze(op.Shape(centre, start=position_axis, end=position_axis + 1))
    positions = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    beside = op.Constant(value_ints=[axis for axis in range(4) if axis != position_axis])
    has_left = op.Greater(positions, op.Constant(value_int=0))
    has_right = op.Less(positions, op.Sub(count, op.Constant(value_int=1)))
    left = op.Mul(left, op.Unsqueeze(op.Cast(has_left, to=1), beside))
    right = op.Mul(right, op.Unsqueeze(op.Cast(has_right, to=1), beside))
    total = op.Max(op.Add(op.Add(left, centre), right), op.Constant(value_float=EPSILON))
    return [op.Div(part, total) for part in (left, centre, right)]


def _scan(drive: Any, weights: Sequence[Any], axis: int, ahead: bool) -> Any:
    """The recurrence along `axis`: h of every line, [B, H, W, C]."""
    first = op.Gather(drive, op.Constant(value_int=0), axis=axis)
    start = op.Expand(op.Constant(value_float=0.0), op.Shape(first))
    # the recorder accepts operators with a variable number of outputs only as nodes
    scan = ir.node(
        "Scan",
        [start, drive, *weights],
        {
            "body": _line_graph(),
            "num_scan_inputs": 4,
            "scan_input_axes": [axis] * 4,
            "scan_input_directions": [int(not ahead)] * 4,
            "scan_output_axes": [axis],
            "scan_output_directions": [int(not ahead)],
        },
        num_outputs=2,
    )
    recorder: Any = onnxscript.evaluator.default()
    recorder.nodes.append(scan)
    return scan.outputs[1]


def _line_graph() -> ir.Graph:
    """The graph of one step: state [B, M, C], input and three weights of a line -> the new state, twice."""
    state, drive, *weights = (
        ir.Value(name=name, type=FLOAT, shape=ir.Shape([None, None, None]))
        for name in ("state", "drive", "left", "centre", "right")
    )
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, name: str | None = None, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes or None)
        value = node.outputs[0]
        value.name = name or f"line_{len(nodes)}"
        value.type = ir.TensorType(ir.DataType.INT64) if kind == "Constant" else FLOAT
        nodes.append(node)
        return value

    def integers(*values: int) -> ir.Value:
        return add("Constant", value_ints=list(values))

    padded = add("Pad", state, integers(0, 1, 0, 0, 1, 0))
    before = add("Slice", padded, integers(0), integers(-2), integers(1))
    after = add("Slice", padded, integers(2), integers(2**62), integers(1))
    mixed = [add("Mul", weight, h) for weight, h in zip(weights, (before, state, after), strict=True)]
    new = add("Add", add("Add", add("Add", mixed[0], mixed[1]), mixed[2]), drive)
    return ir.Graph(
        [state, drive, *weights], [new, add("Identity", new)], nodes=nodes, name="line", opset_imports={"": 18}
    )
