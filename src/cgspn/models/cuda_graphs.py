"""Inference with CUDA graphs, for low latency on one or a few images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers.state import Snapshot

if TYPE_CHECKING:
    from .encoder import Encoder, EncoderOutput

WARM = 3  # passes before a capture, which compile kernels and initialise libraries


@dataclass(frozen=True)
class _Recording:
    """A graph with its input and output tensors."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    mask: Tensor | None
    output: EncoderOutput


class CapturedEncoder:
    """Runs an encoder in inference with one CUDA graph per image shape.

    Create one with `encoder.captured()` and call it like the encoder. The first call with a shape records a graph,
    which takes seconds; later calls replay it. For images of any size, limit the number of shapes:
    `encode_variable_size(captured, images, shapes=choose_shapes(...))` pads each image to one of a few.

    Every call checks the shape and dtype of the images, autocast, and the encoder. In-place changes to weights take
    effect immediately. If modules, hooks or weight tensors have been replaced, all shapes are recorded again.

    config, patch_embed: the encoder's, which `encode_variable_size` reads.
    """

    def __init__(self, encoder: Encoder, *, limit: int = 16, memory: float = 8.0) -> None:
        """encoder: on a CUDA device; put into eval mode.

        limit: maximum number of graphs; the least recently used one is dropped. memory: maximum gigabytes of a pass,
        without weights; larger passes run eagerly. All graphs share one memory pool, as large as the largest needs.

        Raises ValueError for an encoder on another device, or a limit below one.
        """
        device = next(encoder.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"encoder is on {device.type!r}; CUDA graphs need it on 'cuda'")
        if limit < 1:
            raise ValueError(f"limit is {limit}; accepted: at least 1")
        self.encoder, self.limit, self.memory = encoder.eval(), limit, memory
        self.config, self.patch_embed = encoder.config, encoder.patch_embed
        self.recordings: OrderedDict[tuple[object, ...], _Recording | None] = OrderedDict()
        self._lock, self._done = threading.Lock(), torch.cuda.Event()
        self._start_over()

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """images [B, channels, H, W], mask [B, h, w] bool -> tokens [B, h, w, C] and pooled, without gradients.

        Raises the encoder's errors, and ValueError for images on another device.
        """
        if images.device != self._device:
            raise ValueError(f"images is on {images.device}; expected the encoder's device, {self._device}")
        # tensors created in inference mode could not be written to outside of it
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not self._snapshot.holds() or self._snapshot.look() != self._found:
                self._start_over()
            return self._replay(images, mask)

    def _start_over(self) -> None:
        """Drop all graphs, because the encoder has changed."""
        self.recordings.clear()
        self._snapshot = Snapshot(self.encoder)
        self._found = self._snapshot.look()
        self._device = next(self.encoder.parameters()).device
        self._pool = torch.cuda.graph_pool_handle()

    def _replay(self, images: Tensor, mask: Tensor | None) -> EncoderOutput:
        autocast_dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (images.shape, images.dtype, mask is not None, autocast_dtype)
        if key not in self.recordings:
            while len(self.recordings) >= self.limit:
                self.recordings.popitem(last=False)
            self.recordings[key] = self._record(images, mask, autocast_dtype)
        self.recordings.move_to_end(key)
        recording = self.recordings[key]
        if recording is None:
            return self.encoder(images, mask)  # type: ignore[no-any-return]
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)  # a replay may still run on another stream
        recording.images.copy_(images)
        if recording.mask is not None and mask is not None:
            recording.mask.copy_(mask)
        recording.graph.replay()
        # cloned, because the next replay of any shape may overwrite them
        output = type(recording.output)(*(out.clone() for out in recording.output))
        self._done.record(stream)
        return output

    def _record(self, images: Tensor, mask: Tensor | None, autocast_dtype: torch.dtype | None) -> _Recording | None:
        """Capture a graph; None if the pass needs more than `memory`."""

        def autocast() -> AbstractContextManager[Any]:
            # without its cache, which would freeze the current weights
            dtype = autocast_dtype or torch.get_autocast_dtype("cuda")
            return torch.autocast("cuda", dtype, enabled=autocast_dtype is not None, cache_enabled=False)

        images, mask = images.clone(), None if mask is None else mask.clone()
        device = images.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.cuda.stream(side), autocast():  # capture requires a warm-up on a side stream
            for _ in range(WARM):
                self.encoder(images, mask)
        torch.cuda.current_stream(device).wait_stream(side)
        if torch.cuda.max_memory_allocated(device) - before > self.memory * 1e9:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool), autocast():
            output = self.encoder(images, mask)
        return _Recording(graph, images, mask, output)
