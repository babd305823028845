"""A reader of PyTorch's distributed checkpoints that does not run code from them."""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from ..teachers.pickles import check_archive
from .manifest import DamageError

_METADATA = ".metadata"
MOST_INDEX = 1 << 24  # bytes, enough for some 70,000 chunks of tensors
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# The classes in the index of a checkpoint. Bytes entries are rejected, because PyTorch unpickles them without limits.
_ALLOWED = {
    *(("torch", dtype) for dtype in (*_DTYPES, "Size")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class _Unpickler(pickle._Unpickler):  # the C version allocates memory for any memo index
    dispatch: ClassVar = {code: do for code, do in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong in a checkpoint of tensors")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """A reader that accepts only an index of tensors in its own folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamageError for any other index."""
        return read_index(Path(str(self.path)))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Like PyTorch's. Raises CheckpointError for a file that `check_archive` rejects."""
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            path = Path(str(self.path)) / place.relative_path
            with path.open("rb") as file:
                file.seek(place.offset)
                check_archive(io.BytesIO(file.read(place.length)), f"{item.storage_index.fqn} in {path}")
        return super().read_data(plan, planner)


def read_index(folder: Path) -> Metadata:
    """The index of a distributed checkpoint. Raises DamageError unless it only holds tensors in its folder."""
    path = folder / _METADATA
    if (size := path.stat().st_size) > MOST_INDEX:
        raise DamageError(f"{_METADATA} has {size} bytes; accepted: {MOST_INDEX}")
    content = path.read_bytes()
    if sum(map(content.count, b"(]}\x8f")) > max(4096, size // 16):
        raise DamageError(f"{_METADATA} needs far more memory than its size")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        tensors, places = found.state_dict_metadata, found.storage_data.values()
        plain = isinstance(found, Metadata) and all(isinstance(t, TensorStorageMetadata) for t in tensors.values())
        covered = all(sum(chunk.sizes.numel() for chunk in t.chunks) == t.size.numel() for t in tensors.values())
        sparse = any(len(t.chunks) > max(1, t.size.numel()) for t in tensors.values())
        inside = all(0 <= p.offset <= p.offset + p.length <= sizes[p.relative_path] for p in places)
        described = any(place.transform_descriptors for place in places)
    except Exception as error:  # untrusted pickles raise all kinds of errors
        raise DamageError(f"{_METADATA} cannot be used: {str(error) or type(error).__name__}") from error
    if not plain or not covered or sparse or not inside or described:
        raise DamageError(f"{_METADATA} does not match the tensors in its folder")
    return found
