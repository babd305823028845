"""The user's options for loading a checkpoint."""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from ..models.checkpoint import CheckpointError
from ..models.config import EncoderConfig, encoder_config_from_dict, to_dict


@dataclass(frozen=True)
class Options:
    """The arguments of `load_encoder` and `load_model`."""

    dtype: torch.dtype = torch.float32
    heads: int | None = None
    submodel: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise CheckpointError for an unknown option or an invalid number of heads."""
        known = [f.name for f in fields(EncoderConfig)]
        for name in self.overrides:
            if name not in known:
                raise CheckpointError(f"there is no option {name!r}; {_similar(name, [*known, 'dtype', 'heads'])}")
        if self.heads is not None and not (isinstance(self.heads, int) and self.heads >= 1):
            raise CheckpointError(f"heads is {self.heads!r}; accepted: 1 or more")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise CheckpointError(f"dtype is {self.dtype!r}; accepted: torch.float32, torch.bfloat16 and such")

    def apply(self, config: EncoderConfig) -> EncoderConfig:
        """Apply the user's fields to the config of a checkpoint. Raises ValueError naming the field."""
        if self.heads is not None:
            config = replace(config, attention=replace(config.attention, heads=self.heads))
        if not self.overrides:
            return config
        given = {key: to_dict(value) if is_dataclass(value) else value for key, value in self.overrides.items()}
        return encoder_config_from_dict(to_dict(config) | given, "options")


def _similar(name: str, accepted: list[str]) -> str:
    near = difflib.get_close_matches(name, accepted, 1)
    return f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(sorted(accepted))}"
