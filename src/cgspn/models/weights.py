"""Weight files as tables of tensors. Shapes are compared with the model's before tensors are read one by one."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .reading import CheckpointError

LONGEST_HEADER = 1 << 24  # bytes; each tensor in the header becomes a Python object
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and a function that reads it and raises CheckpointError for NaN.

    The function of a .safetensors file can also read only some rows, a slice."""

    shape: tuple[int, ...]
    read: Callable[..., Tensor]


Weights = dict[str, Stored]
Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")
_WRAPPERS = re.compile(r"(?<![^.])((_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.)+")


def open_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a .safetensors file and its metadata. Only the header is read.

    Raises CheckpointError for a file that the safetensors library rejects (truncated, overlapping or incomplete
    tensors, sizes that do not match shapes), a header of more than 16 MiB, or unknown dtypes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{path} has {size} bytes; it is truncated, or not a safetensors file")
    if length > LONGEST_HEADER:
        raise CheckpointError(f"{path} has a header of {length} bytes; accepted: {LONGEST_HEADER}")
    try:
        with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
            metadata = opened.metadata() or {}
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
            dtypes = {value.get_dtype() for value in slices.values()}
            weights = {key: Stored(tuple(s.get_shape()), partial(_read, path, key)) for key, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error
    if unknown := dtypes - DTYPES.keys():
        raise CheckpointError(f"{path} holds tensors of {', '.join(sorted(unknown))}; accepted: {', '.join(DTYPES)}")
    return weights, metadata


def _read(path: Path, key: str, rows: slice | None = None) -> Tensor:
    """Read a copy of a tensor or of its rows. The file is unmapped after each, because mapped pages would count as
    memory again."""
    try:
        with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
            found = opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
            return finite(found.clone(), f"{path}: {key}")
    except SafetensorError as error:
        raise CheckpointError(f"{path} was changed while it was read: {error}") from error


def finite(tensor: Tensor, where: str) -> Tensor:
    """Return the tensor. Raises CheckpointError if it holds NaN or infinity."""
    # a finite sum implies finite values, and takes a twentieth of the time of checking each
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        raise CheckpointError(f"{where} holds values that are not finite")
    return tensor


def read_state(
    module: nn.Module, weights: Weights, where: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Read the state dict of a module from a file's weights. Floats are cast to `dtype`.

    Names and shapes are compared before the first tensor is read. Raises CheckpointError naming mismatches.
    """
    check_fit(module, weights, where)
    state = module.state_dict()
    return {key: cast_like(stored.read(), state[key], dtype, f"{where}: {key}") for key, stored in weights.items()}


def cast_like(tensor: Tensor, like: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Cast a float tensor to `dtype`. Raises CheckpointError if only one of the tensors is a float, since a quantised
    weight is meaningless without its scale, and for values beyond the range of `dtype`."""
    if tensor.is_floating_point() != like.is_floating_point():
        raise CheckpointError(f"{where} is of {tensor.dtype}; accepted: dtypes like {like.dtype}")
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    return finite(tensor.to(dtype), f"{where} in {dtype}")


def load(make: Callable[[], Model], weights: Weights, where: str, dtype: torch.dtype = torch.float32) -> Model:
    """Create a module with `make` and load the weights of a file, in eval mode. Raises CheckpointError."""
    try:
        with torch.device("meta"):
            module = make()
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: its config cannot be used: {error}") from error
    module.load_state_dict(read_state(module, weights, where, dtype), assign=True)
    return module.eval()


def saved_state(
    module: nn.Module, make: Callable[[], nn.Module], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state dict of a module as copies on the CPU, in which nothing shares memory.

    make: creates the module that loading will create. dtype: of floats; None keeps theirs. Raises CheckpointError for
    weights that it could not load: those of other modules (LoRA, pruning, quantisation), sharded ones, ones without
    values (meta) and NaN.
    """
    state = without_wrappers(module.state_dict(), "this model")
    with torch.device("meta"):
        check_fit(make(), state, "this model")
    for name, value in state.items():
        if type(value) is not Tensor or value.is_meta:
            kind = "without values, on the meta device" if value.is_meta else f"a {type(value).__name__}"
            raise CheckpointError(f"{name} is {kind}; accepted: plain tensors, so gather or load the weights first")
    kinds = {name: dtype or value.dtype if value.is_floating_point() else value.dtype for name, value in state.items()}
    copies = {name: value.to("cpu", kinds[name], copy=True).contiguous() for name, value in state.items()}
    return {name: finite(value, f"this model: {name}") for name, value in copies.items()}


def unwrapped(name: str) -> str:
    """The name of a parameter without the components of torch.compile, activation checkpointing and FSDP."""
    return _WRAPPERS.sub("", name)


def without_wrappers(state: Mapping[str, Item], where: str) -> dict[str, Item]:
    """The items by `unwrapped` name. Raises CheckpointError if two names become equal."""
    plain = {unwrapped(key): value for key, value in state.items()}
    if len(plain) < len(state):
        twice = [unwrapped(key) for key in state.keys() - plain.keys()]
        raise CheckpointError(f"{where} holds {listed(twice)} twice, in a wrapper and outside of it")
    return plain


def below(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with `prefix`, with the prefix removed."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def check_fit(module: nn.Module, weights: Mapping[str, Stored | Tensor], where: str) -> None:
    """Raise CheckpointError, naming tensors, unless `weights` has exactly the names and shapes of a module."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    missing, unknown = wanted.keys() - weights.keys(), weights.keys() - wanted.keys()
    wrong = [
        f"{key} has shape {list(stored.shape)}, not {list(wanted[key])}"
        for key, stored in weights.items()
        if key in wanted and stored.shape != wanted[key]
    ]
    said = [f"it lacks {listed(missing)}"] if missing else []
    said += [f"it has, unexpectedly, {listed(unknown)}"] if unknown else []
    if said or wrong:
        raise CheckpointError(f"the weights in {where} do not fit its config: {'; '.join(said + wrong[:3])}")


def check_depth(blocks: int, weights: Weights, where: str) -> None:
    """Raise CheckpointError for more blocks than tensors, before modules are created."""
    if blocks > len(weights):
        raise CheckpointError(f"{where} has {blocks} blocks, but weights of {len(weights)} tensors; they do not match")


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names in order, and the number of further ones."""
    names = sorted(names)
    shown = ", ".join(name[:100].replace("|", " or ") for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
