"""Attention within windows of the grid, as in ViTDet and Qwen2.5-VL: linear in the number of tokens.

Windows start at the upper left corner. Windows at the right and lower edge are smaller (as in Qwen2.5-VL; ViTDet pads
them with zeros). Neither model has class or register tokens in such layers, and prefix tokens raise an error here.

In window order the tokens of a batch are sorted by window: whole windows of all images first, then the smaller ones at
the right edge, the lower edge and the corner. Consecutive layers with the same windows keep that order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..compat import is_tracing
from .attention import AttentionConfig, AttentionMixer, attend
from .mixer import Grid, Window

MOST = 32768  # most windows in one call, because fused kernels use a grid dimension that ends at 65535


class WindowAttentionMixer(AttentionMixer):
    """Multi-head self-attention within windows: tokens [B, h*w, C] -> the same shape.

    Its weights have the same names and shapes as in `AttentionMixer`. Input and output tokens are in the order given by
    the grid.
    """

    window: Window

    def __init__(self, width: int, config: AttentionConfig | None = None, window: Window = (8, 8)) -> None:
        """width: C; window: rows and columns of positions. Raises ValueError if the heads do not divide C, and for
        rotary positions, which refer to the whole grid.
        """
        super().__init__(width, config)
        if self.config.rotary is not None:
            raise ValueError(f"rotary is {self.config.rotary}; attention in windows accepts None")
        self.window = window

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, h*w, C] -> [B, h*w, C], in row order or sorted by this mixer's windows.

        Raises ValueError for prefix tokens.
        """
        if grid.prefix:
            raise ValueError(
                f"window attention got {grid.prefix} tokens before the grid; accepted: none, as windows have no place "
                "for class and register tokens"
            )
        if torch.compiler.is_exporting() or is_tracing():
            return self._gathered(tokens, grid)
        if not tokens.numel():
            return self.out(self.qkv(tokens)[..., : tokens.shape[-1]])  # type: ignore[no-any-return]
        ordered, inside = order(tokens, grid, self.window)
        return order(self._attend(ordered, inside), inside, grid.window)[0]

    def _gathered(self, tokens: Tensor, grid: Grid) -> Tensor:
        """`forward` by gathering padded, masked windows, so that exported programs support any grid."""
        (down, across), (height, width), device = self.window, grid[:2], tokens.device
        rows, columns, size = (height + down - 1) // down, (width + across - 1) // across, down * across
        # [rows, columns, down, across]: the grid position of each window element, and whether it exists
        y = (torch.arange(rows, device=device)[:, None] * down + torch.arange(down, device=device))[:, None, :, None]
        x = (torch.arange(columns, device=device)[:, None] * across + torch.arange(across, device=device))[:, None]
        inside = ((y < height) & (x < width)).reshape(-1)
        into = (y.clamp(max=height - 1) * width + x.clamp(max=width - 1)).reshape(-1)
        y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        back = ((y // down * columns + x // across) * size + y % down * across + x % across).reshape(-1)
        # one mask per image although they are equal: expanding would guard on a batch of 1
        known = tokens.new_ones(tokens.shape[0], 1, dtype=torch.bool)
        inside = inside & (known if grid.mask is None else grid.mask.flatten(1)[:, into])
        q, k, v = self._split(tokens[:, into].reshape(-1, size, tokens.shape[-1]))
        out = attend(q, k, v, _seen(inside.reshape(-1, size)))
        out = out.transpose(1, 2).reshape(tokens.shape[0], -1, tokens.shape[-1])
        result: Tensor = self.out(out[:, back])
        return result

    def _attend(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, h*w, C] in window order -> [B, h*w, C] in window order."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).view(batch * count, 3, self.heads, self.head_width)
        keys = None if grid.mask is None else torch.cat([p.flatten() for p in _cut(grid.mask[..., None], self.window)])
        outs, start = [], 0
        for number, size in _groups(batch, grid, self.window):
            end = start + number * size
            q, k, v = qkv[start:end].view(number, size, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
            seen = None if keys is None else _seen(keys[start:end].view(number, size))
            for part in range(0, number, MOST):
                here = slice(part, part + MOST)
                out = attend(q[here], k[here], v[here], None if seen is None else seen[here])
                outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
            start = end
        together = outs[0] if len(outs) == 1 else torch.cat(outs)
        result: Tensor = self.out(together.view(batch, count, width))
        return result

    def visible(self, tokens: Tensor, grid: Grid, rows: Tensor | None = None) -> Tensor | None:
        """Like `AttentionMixer.visible`: [B or 1, 1, R, N] bool, for tokens of the same window in the mask."""
        down, across = (torch.arange(n, device=tokens.device) // size for n, size in zip(grid[:2], self.window))
        window = (down[:, None] * grid.width + across).flatten()
        same = (window if rows is None else window[rows])[:, None] == window
        inside = super().visible(tokens, grid, rows)
        return same[None, None] if inside is None else same & inside


def window_of(block: nn.Module) -> Window | None:
    """The order in which a block takes its tokens: a window, or None for rows.

    A wrapper that hides its block gets rows, which every mixer accepts.
    """
    return getattr(getattr(block, "mixer", None), "window", None)


def order(tokens: Tensor, grid: Grid, window: Window | None) -> tuple[Tensor, Grid]:
    """Tokens [B, h*w, C] sorted by `window` (None: in row order), and the grid with that order.

    Tokens that already have that order are not moved. Exported programs, which support any grid, keep row order.
    """
    if grid.window == window or torch.compiler.is_exporting() or is_tracing():
        return tokens, grid
    if grid.window is not None:
        tokens = _in_rows(tokens, grid, grid.window)
    if window is not None:
        parts = [part.reshape(-1, part.shape[-1]) for part in _cut(tokens.unflatten(1, grid[:2]), window)]
        tokens = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(tokens.shape)
    return tokens, grid._replace(window=window)


def _cut(maps: Tensor, window: Window) -> list[Tensor]:
    """Divide maps [B, h, w, C] into windows [B, rows, columns, window rows, window columns, C], grouped by size.

    Returns views in window order.
    """
    cut = []
    for rows, down in _spans(maps.shape[1], window[0]):
        for columns, across in _spans(maps.shape[2], window[1]):
            cut.append(maps[:, rows, columns].unflatten(2, (-1, across)).unflatten(1, (-1, down)).transpose(2, 3))
    return cut


def _in_rows(tokens: Tensor, grid: Grid, window: Window) -> Tensor:
    """The inverse of `_cut`: tokens [B, h*w, C] from window order to row order."""
    batch, _, width = tokens.shape
    flat, start, bands = tokens.reshape(-1, width), 0, []
    for rows, down in _spans(grid.height, window[0]):
        band = []
        for columns, across in _spans(grid.width, window[1]):
            high, wide = rows.stop - rows.start, columns.stop - columns.start
            part = flat[start : start + batch * high * wide]
            shape = (batch, high // down, wide // across, down, across, width)
            band.append(part.view(shape).transpose(2, 3).reshape(batch, high, wide, width))
            start += len(part)
        bands.append(band[0] if len(band) == 1 else torch.cat(band, 2))
    return (bands[0] if len(bands) == 1 else torch.cat(bands, 1)).flatten(1, 2)


def _spans(length: int, size: int) -> list[tuple[slice, int]]:
    """Divide a side of the grid into whole windows and a smaller one: the range of each part, and its window side."""
    rest = length % size
    spans = [(slice(0, length - rest), size)] if length >= size else []
    return [*spans, (slice(length - rest, length), rest)] if rest else spans


def _groups(batch: int, grid: Grid, window: Window) -> list[tuple[int, int]]:
    """Groups of windows for one call each, in window order: their number, and the tokens per window."""
    groups: list[tuple[int, int]] = []
    for rows, down in _spans(grid.height, window[0]):
        for columns, across in _spans(grid.width, window[1]):
            size = down * across
            number = batch * (rows.stop - rows.start) * (columns.stop - columns.start) // size
            if groups and groups[-1][1] == size:
                number += groups.pop()[0]
            groups.append((number, size))
    return groups


def _seen(inside: Tensor) -> Tensor:
    """The visible keys of each window: inside [W, n] bool -> [W, 1, 1, n].

    A window with only padding attends to itself, so that no softmax is empty. Its output is not used.
    """
    return (inside | ~inside.any(1, keepdim=True))[:, None, None]
