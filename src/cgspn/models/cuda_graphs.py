"""An encoder replayed from CUDA graphs: one image at a time costs what the GPU needs, not what launching costs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoder import Encoder, EncoderOutput

WARM = 2  # passes before a capture: kernels are compiled and libraries set up in the first


@dataclass(frozen=True)
class _Recording:
    """A graph and the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    mask: Tensor | None
    output: EncoderOutput


class CapturedEncoder:
    """The forward pass of an encoder in inference, as one CUDA graph for each shape of images that it meets.

    Call it as the encoder. The first call of a shape records it, in seconds; the next ones replay. Graphs share a pool
    of memory, and the one used longest ago goes where there would be more than `limit`. For images of any size, bound
    the shapes: `encode_variable_size(captured, images, shapes=choose_shapes(...))` pads each image up to one of a few.
    Weights may change in place (`load_state_dict`) between calls; where they live must not.

    Attributes:
        config, patch_embed: the encoder's, which `encode_variable_size` reads.
    """

    def __init__(self, encoder: Encoder, *, limit: int = 16) -> None:
        """encoder: on a CUDA device; put into eval mode. limit: graphs kept at once.

        Raises ValueError for an encoder elsewhere, or a limit below one.
        """
        device = next(encoder.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"encoder is on {device.type!r}; CUDA graphs need it on 'cuda'")
        if limit < 1:
            raise ValueError(f"limit is {limit}; accepted: at least 1")
        self.encoder, self.limit = encoder.eval(), limit
        self.config, self.patch_embed = encoder.config, encoder.patch_embed
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """images [B, channels, H, W], mask [B, h, w] bool -> tokens [B, h, w, C], pooled; no gradients.

        Raises what the encoder raises, ValueError for images on another device.
        """
        device = next(self.encoder.parameters()).device
        if images.device != device:
            raise ValueError(f"images is on {images.device}; expected the encoder's device, {device}")
        # not in inference mode, whose tensors could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            return self._replay(images, mask)

    def _replay(self, images: Tensor, mask: Tensor | None) -> EncoderOutput:
        key = (images.shape, images.dtype, mask is not None)
        if key not in self.recordings:
            while len(self.recordings) >= self.limit:
                self.recordings.popitem(last=False)
            self.recordings[key] = self._record(images, mask)
        self.recordings.move_to_end(key)
        recording = self.recordings[key]
        recording.images.copy_(images)
        if recording.mask is not None and mask is not None:
            recording.mask.copy_(mask)
        recording.graph.replay()
        # clones: the next replay, of any shape, may write where these lie
        return EncoderOutput(*(out.clone() for out in recording.output))

    def _record(self, images: Tensor, mask: Tensor | None) -> _Recording:
        images, mask = images.clone(), None if mask is None else mask.clone()
        side = torch.cuda.Stream(images.device)
        side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(side):  # capture wants its warm-up on a stream of its own
            for _ in range(WARM):
                self.encoder(images, mask)
        torch.cuda.current_stream(images.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.encoder(images, mask)
        return _Recording(graph, images, mask, output)
