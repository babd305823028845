"""PyTorch's distributed checkpoints, read without running what a stranger may have put into them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .manifest import DamageError

_METADATA = ".metadata"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# What the index of a checkpoint of tensors is made of. No bytes: PyTorch unpickles those without limits.
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


class _Unpickler(pickle._Unpickler):  # the one in C allocates whatever a memo index asks for
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not of a checkpoint of tensors")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """A reader whose index may hold nothing but where the tensors of its own folder lie."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamageError for any other index."""
        return read_index(Path(str(self.path)))


def read_index(folder: Path) -> Metadata:
    """The index of a distributed checkpoint. Raises DamageError for one of more than tensors of its own folder."""
    content = (folder / _METADATA).read_bytes()
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        tensors, places = found.state_dict_metadata, found.storage_data
        plain = isinstance(found, Metadata) and all(isinstance(t, TensorStorageMetadata) for t in tensors.values())
        names = {place.relative_path for place in places.values()}
        described = [place for place in places.values() if place.transform_descriptors]
    except Exception as error:  # pickles of strangers raise all kinds of errors
        raise DamageError(f"{_METADATA} cannot be used: {error or type(error).__name__}") from error
    if not plain or described or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DamageError(f"{_METADATA} names more than tensors of its own folder")
    return found
