"""A small text tower over bytes, for the embedded teacher and for training from scratch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..layers import AttentionConfig, AttentionMixer, Block, Grid
from .config import TextConfig


def text_list(texts: str | Sequence[str]) -> list[str]:
    """Convert a text or texts to a list. Raises ValueError for no texts or an empty text."""
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(found):
        raise ValueError(f"texts is {found!r}; expected at least one text, none of them empty")
    return found


def tokenize(texts: str | Sequence[str], context: int) -> Tensor:
    """Convert texts to UTF-8 bytes + 1, padded with 0 to the longest: int64 [len(texts), at most context]. Longer texts
    are truncated.

    Raises ValueError for an empty sequence or an empty text.
    """
    texts = text_list(texts)
    encoded = [list(text.lower().encode()[:context]) for text in texts]
    out = torch.zeros(len(texts), max(map(len, encoded)), dtype=torch.int64)
    for row, values in zip(out, encoded):
        row[: len(values)] = torch.tensor(values) + 1
    return out


class TextTower(nn.Module):
    """Encode texts with bidirectional attention over bytes, averaged over the text. Output [B, width]."""

    def __init__(self, config: TextConfig) -> None:
        """Raises ValueError if the heads do not divide the width."""
        super().__init__()
        self.config, width = config, config.width
        self.embedding = nn.Embedding(257, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.positions = nn.Parameter(torch.randn(config.context, width) * 0.1)
        self.blocks = nn.ModuleList(
            Block(width, AttentionMixer(width, AttentionConfig(heads=config.heads)), 4 * width, "gelu", 1e-6, None)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @property
    def context_length(self) -> int:
        """Maximum number of tokens (bytes) of a text."""
        return self.config.context

    def tokenize(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts -> ids int64 [len(texts), context_length], padded with 0. Raises ValueError for an empty text."""
        width = context_length or self.context_length
        ids = tokenize(texts, min(width, self.context_length))
        return pad(ids, (0, width - ids.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 from `tokenize` -> [B, width]. Raises ValueError for T beyond the context."""
        if ids.shape[1] > self.config.context:
            raise ValueError(f"ids has {ids.shape[1]} bytes per text; accepted: at most {self.config.context}")
        inside = ids != 0
        tokens = self.embedding(ids) + self.positions[: ids.shape[1]]
        grid = Grid(1, ids.shape[1], mask=inside[:, None])
        for block in self.blocks:
            tokens = block(tokens, grid)
        weights = inside / inside.sum(1, keepdim=True)
        return (self.norm(tokens) * weights[..., None]).sum(1).to(tokens.dtype)
