"""Reading of `torch.save` files as tables of tensors, without running code from them."""

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..models.checkpoint import CheckpointError, line_of
from ..models.weights import DTYPES

MOST_LETTERS = 1 << 24  # most characters in the names of all tensors and dictionaries
MOST_PICKLED = 1 << 22  # most bytes apart from tensors; as Python objects they take seventy times as much
ALLOCATES = b"bytearray\n"  # the only name allowed by PyTorch that can allocate any amount of memory
MOST_DIRECTORY = 1 << 24  # most bytes of a zip file's directory


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a .pt, .pth or .bin file. The keys of nested dictionaries are joined by dots.

    Raises CheckpointError if the file is damaged, if it contains anything but tensors and plain values (the message
    names the contents and says how to convert the file), or if loading it would need more memory than the size of the
    file.
    """
    if not path.is_file() or not (size := path.stat().st_size):
        raise CheckpointError(f"{path} does not exist or is empty")
    with path.open("rb") as file:
        if zipped := file.read(4) == b"PK\3\4":  # PyTorch distinguishes its two formats like this
            check_archive(file, str(path))
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(ALLOCATES) >= 0:
                    raise CheckpointError(f"{path} allocates storage of a size that the file does not limit")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged and hostile files raise nearly any error
        reason = _reason(error, path, zipped)
        raise CheckpointError(f"{path} cannot be read as a file with only tensors: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    try:
        tensors = dict(_flat(content, "", [MOST_LETTERS]))
    except RecursionError as error:
        raise CheckpointError(f"{path} holds dictionaries that are nested too deeply") from error
    for key, value in tensors.items():
        if value.dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {key[:100]} is of {value.dtype}; accepted: {', '.join(DTYPES)}")
        if not _is_whole(value):
            raise CheckpointError(f"{path}: {key[:100]} has {value.numel()} elements, which the file does not hold")
    if sum(value.nbytes for value in tensors.values()) > 2 * size:  # twice, because two names may share storage
        raise CheckpointError(f"{path} needs more memory than its size, {size}")
    return tensors


def _is_whole(value: Tensor) -> bool:
    """Whether each element of a tensor has its own memory, unlike with zero strides or in a sparse tensor."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    return plain and value.nbytes <= value.untyped_storage().nbytes()


def _flat(content: Mapping[Any, Any], prefix: str, left: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Flatten nested dictionaries. left: remaining characters for names, since a dictionary may contain itself."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor | Mapping):
            left[0] -= len(prefix) + len(key) + 1
            if left[0] < 0:
                raise RecursionError
            if isinstance(value, Tensor):
                yield prefix + key, value
            else:
                yield from _flat(value, f"{prefix}{key}.", left)


def check_archive(file: IO[bytes], name: str) -> None:
    """Raise CheckpointError for a file that `torch.save` did not write, a program, or a zip bomb."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - (1 << 16)))
    end = file.read().rpartition(b"PK\5\6")[2]
    if len(end) < 12 or int.from_bytes(end[8:12], "little") > MOST_DIRECTORY:
        raise CheckpointError(f"{name} has no zip directory, or one that is too long")
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if any(part.filename.endswith("/constants.pkl") for part in parts):
                raise CheckpointError(
                    f"{name} is a TorchScript program, whose loading runs code; if you trust it, save only its "
                    f"tensors: torch.save(torch.jit.load({Path(name).name!r}, map_location='cpu').state_dict(), "
                    "'weights.pt')"
                )
            if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in parts):
                raise CheckpointError(f"{name} has compressed parts, which torch.save does not write and may expand")
            programs = [part for part in parts if part.filename.endswith(".pkl")]
            if any(p.file_size > MOST_PICKLED or ALLOCATES in archive.read(p) for p in programs):
                raise CheckpointError(f"{name} allocates storage of a size that the file does not limit")
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, OSError) as error:
        raise CheckpointError(f"{name} is damaged: {error}") from error


def _reason(error: Exception, path: Path, zipped: bool) -> str:
    """A one-line reason from an unpickler's long message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return (
            f"it also holds {found[1]}, and unpickling such objects can run code; where you trust the file, save its "
            f"state dict alone: torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt')"
        )
    if not zipped:
        return "the file is damaged, or not a checkpoint"
    return line_of(error)
