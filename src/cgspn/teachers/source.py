"""Opening of a source (file, folder or hub id): its weights and the configs next to them."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..models.reading import CheckpointError, read_json
from .files import Weights, open_weights
from .foreign import checked_config

CONFIGS = ("config.json", "open_clip_config.json", "processor_config.json", "preprocessor_config.json")
# in order of preference: safetensors before pickles, files that the folder's config describes before copies
WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"(hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model")


@dataclass(frozen=True)
class Source:
    """name: as given by the user. weights: all tensors. configs: JSON files next to the weights, by file name.

    metadata: that of a safetensors file. folder: the folder with the other files.
    """

    name: str
    weights: Weights
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


def locate(source: str | Path) -> Path:
    """The local file or folder of a source, after downloading a hub id. Raises CheckpointError if there is none."""
    path = Path(source)
    hub = isinstance(source, str) and _HUB_ID.fullmatch(source)
    if hub and (hub[1] or not path.exists()):
        return _fetch(hub[2], hub[3])
    if not path.exists():
        wanted = "expected a weight file, a checkpoint folder or a hub id"
        raise CheckpointError(f"{source} does not exist; {_hint(str(source))}{wanted}")
    return path


def _hint(source: str) -> str:
    """A suggestion for a source that does not exist."""
    folder = Path(source).parent
    beside = [str(each) for each in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(source, ["embedded", *beside], 2, 0.8)
    return f"did you mean {' or '.join(near)}? " if near else ""


def open_source(path: Path, name: str) -> Source:
    """The weights and configs of a local file or folder. Raises CheckpointError for a missing or truncated file."""
    found = path if path.is_file() else next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        no = "" if (path / "config.json").is_file() else "config.json and no "
        raise CheckpointError(f"{path} has no {no}model.safetensors; expected a checkpoint folder with both")
    weights, metadata = open_weights(found)
    # a config applies to a file only if the file has the expected name
    configs = _configs(found.parent) if found.name in WEIGHTS else {}
    return Source(name, weights, configs, metadata, found.parent)


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {name: read_json(folder / name) for name in CONFIGS if (folder / name).is_file()}
    own = "model" in found.get("config.json", {})  # this library's configs have every field, and null is a value
    return found if own else {name: checked_config(config, folder / name) for name, config in found.items()}


def _fetch(repository: str, revision: str | None) -> Path:
    """Download the required files of a hub id: configs, tokenizer and one copy of the weights."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{repository} is not a file or folder here; {_hint(repository)}to fetch it as a hub id, install cgspn[hub]"
        ) from error
    names: set[str] | None = None
    try:
        with suppress(Exception):  # without a connection, use the cache
            info = HfApi().model_info(repository, revision=revision, timeout=10)
            names = {file.rfilename for file in info.siblings or []}
            weights = next(name for name in WEIGHTS if name in names)
            shards = [weights.split(".")[0] + "-*"] if weights.endswith(".index.json") else []
            wanted = [*CONFIGS, *_TOKENIZER, weights, *shards]
            return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
        if names is None or names & {*WEIGHTS}:
            return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as error:
        hint = _hint(repository).strip()
        raise CheckpointError(
            f"{repository} is not a file or folder here, and cannot be downloaded as a hub id: no such id, "
            f"or no connection and nothing cached{f'; {hint}' if hint else ''}"
        ) from error
    raise CheckpointError(f"hub id {repository} has none of {', '.join(WEIGHTS)}")
