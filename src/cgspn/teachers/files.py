"""Weight files as tables of tensors that are read one by one, so that a checkpoint is never in memory twice."""

from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.reading import CheckpointError, read_json, shown
from ..models.weights import Stored, Weights, finite, listed, open_safetensors, without_wrappers
from .pickles import read_pickle

__all__ = ["Stored", "Weights", "open_weights"]


def open_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """Open the tensors and metadata of a weight file, or of the index of a sharded one. Raises CheckpointError."""
    indexed = path.name.endswith(".index.json")
    weights, metadata = (_open_shards(path), {}) if indexed else _open_file(path)
    if not weights:
        raise CheckpointError(f"{path} holds no tensors")
    return without_wrappers(weights, str(path)), metadata


def _open_file(path: Path) -> tuple[Weights, dict[str, str]]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        tensors = read_pickle(path).items()
        return {key: Stored(tuple(value.shape), partial(_copied, value, path, key)) for key, value in tensors}, {}
    raise CheckpointError(f"{path} is not a weight file; expected .safetensors, .pt, .pth or .bin")


def _open_shards(index: Path) -> Weights:
    """Open the tensors of all shards of an index. Each tensor is read from the shard that the index names."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    beside = {index.parent.resolve(), index.resolve().parent}  # the hub's cache has links to files
    weights: Weights = {}
    for name in sorted(set(named.values())):
        shard = index.parent / name
        if Path(name).name != name or name.endswith(".json"):
            raise CheckpointError(f"{index} names {shown(name)}; accepted: weight files of its own folder")
        if not shard.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is not next to it")
        if shard.resolve().parent not in beside:
            raise CheckpointError(
                f"{index} names {shown(name)}, a link to another folder; accepted: files in its folder"
            )
        held = _open_file(shard)[0]
        told = {key for key, file in named.items() if file == name}
        if told != held.keys():
            raise CheckpointError(f"{shard} and {index} do not agree on {listed(told ^ held.keys())}")
        weights |= held
    return weights


def _copied(value: Tensor, path: Path, key: str) -> Tensor:
    return finite(value.clone(), f"{path}: {key}")
