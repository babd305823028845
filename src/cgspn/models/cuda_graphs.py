"""An encoder replayed from CUDA graphs: one image at a time costs what the GPU needs, not what launching costs."""

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

WARM = 3  # passes before a capture: kernels are compiled, libraries set up and launches prepared


@dataclass(frozen=True)
class _Recording:
    """A graph and the tensors it reads and writes."""

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

    Attributes:
        config, patch_embed: the encoder's, which `encode_variable_size` reads.
    """

    def __init__(self, encoder: Encoder, *, limit: int = 16, memory: float = 8.0) -> None:
        """encoder: on a CUDA device; put into eval mode.

        limit: graphs kept at once; the one used longest ago goes first. memory: gigabytes that a pass may need beside
        the weights to be kept as a graph, since all graphs share one pool of memory, as large as the largest needs;
        what needs more is launched, as by the encoder itself.

        Raises ValueError for an encoder elsewhere, or a limit below one.
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
        """images [B, channels, H, W], mask [B, h, w] bool -> tokens [B, h, w, C], pooled; no gradients.

        Raises what the encoder raises, ValueError for images on another device.
        """
        if images.device != self._device:
            raise ValueError(f"images is on {images.device}; expected the encoder's device, {self._device}")
        # not in inference mode, whose tensors could not be written to outside of it
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not self._snapshot.holds() or self._snapshot.look() != self._found:
                self._start_over()
            return self._replay(images, mask)

    def _start_over(self) -> None:
        """Forget what was recorded, of an encoder that is not the same any more."""
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
        stream.wait_event(self._done)  # another stream may still replay
        recording.images.copy_(images)
        if recording.mask is not None and mask is not None:
            recording.mask.copy_(mask)
        recording.graph.replay()
        # clones: the next replay, of any shape, may write where these lie
        output = type(recording.output)(*(out.clone() for out in recording.output))
        self._done.record(stream)
        return output

    def _record(self, images: Tensor, mask: Tensor | None, autocast_dtype: torch.dtype | None) -> _Recording | None:
        """None for a pass that needs more than `memory`."""

        def autocast() -> AbstractContextManager[Any]:
            # without its cache, which would keep weights as they are now
            dtype = autocast_dtype or torch.get_autocast_dtype("cuda")
            return torch.autocast("cuda", dtype, enabled=autocast_dtype is not None, cache_enabled=False)

        images, mask = images.clone(), None if mask is None else mask.clone()
        device = images.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.cuda.stream(side), autocast():  # capture wants its warm-up on a stream of its own
            for _ in range(WARM):
                self.encoder(images, mask)
        torch.cuda.current_stream(device).wait_stream(side)
        if torch.cuda.max_memory_allocated(device) - before > self.memory * 1e9:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool), autocast():
            output = self.encoder(images, mask)
        return _Recording(graph, images, mask, output)
