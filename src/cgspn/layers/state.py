"""What a block consists of, looked at once and again only when it changed.

Looking at some fifteen modules for hooks, wrappers and subclasses takes as long as several launches. A snapshot of what
they are takes a few comparisons in C to confirm: the modules in their places, their classes, the sizes of their
dictionaries (a `forward` set on an instance is one entry more), their hooks, and their parameters.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from ..compat import HOOKS
from .fp8 import Fp8Mlp
from .mlp import Mlp
from .norm import LayerNorm, RMSNorm
from .plain import is_plain
from .prepared import can_prepare
from .propagation import PropagationMixer

if TYPE_CHECKING:
    from .block import Block


class Snapshot:
    """What modules are: to be compared with what they are later, in few steps of C."""

    def __init__(self, root: nn.Module) -> None:
        """root: all below it counts; what is done to the module itself, its caller does."""
        self._modules = tuple(root.modules())[1:]
        dictionaries = [vars(m) for m in self._modules]
        self._dictionaries, self._sizes = dictionaries, list(map(len, dictionaries))
        self._types = list(map(type, self._modules))
        self._children = [(m, dict(m)) for m in (d["_modules"] for d in (vars(root), *dictionaries)) if m]
        self._hooks = [d[name] for d in dictionaries for name in HOOKS]
        self._hooked = list(map(len, self._hooks))
        self._held = [held for d in (vars(root), *dictionaries) for held in (d["_parameters"], d["_buffers"]) if held]
        self._ids, self._kinds = list(map(id, self.tensors)), list(map(type, self.tensors))

    @property
    def tensors(self) -> list[Any]:
        """Parameters and buffers, with None for those that are not there."""
        return list(chain.from_iterable([held.values() for held in self._held]))

    def holds(self) -> bool:
        """Whether nothing has changed since: modules in their places, classes, hooks, which tensors there are."""
        if list(map(len, self._hooks)) != self._hooked or list(map(type, self._modules)) != self._types:
            return False
        if list(map(len, self._dictionaries)) != self._sizes:
            return False
        for now, then in self._children:
            if now != then:
                return False
        tensors = self.tensors
        return list(map(id, tensors)) == self._ids and list(map(type, tensors)) == self._kinds


class State(Snapshot):
    """Which parts of a block are plain (plain.py).

    Attributes:
        norm1, norm2: whether kernels may take the place of these LayerNorms.
        widths: shapes of the gains of those norms.
        latent: whether they may for norms, products and convolution of a C-GSPN sub-layer and its LayerScale.
        mlp: whether products may write the MLP onto the residual.
        preparable: whether launches of the whole block may be kept.
        plans: launches prepared for this state, by shape.
    """

    def __init__(self, block: Block) -> None:
        """Look at everything."""
        super().__init__(block)
        self.norm1, self.norm2 = is_layer_norm(block.norm1), is_layer_norm(block.norm2)
        self.widths = {n.weight.shape for n in (block.norm1, block.norm2) if is_layer_norm(n)}
        self.latent = self.norm1 and is_latent(block.mixer) and is_scale(block.scale1)
        self.mlp = is_plain(block.scale2, nn.Identity) and (is_plain(block.mlp, Fp8Mlp) or is_tanh(block.mlp))
        self.preparable = self.latent and self.norm2 and self.mlp and can_prepare(block)
        self.plans: dict[tuple[Any, ...], Any] = {}


def state_of(block: Block) -> State:
    """The state of a block, kept in it but neither copied nor pickled with it."""
    state = block._state
    if state is None or not state.holds():
        state = vars(block)["_state"] = State(block)
    return state


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether this is a plain LayerNorm over channels with a gain and a shift."""
    if not is_plain(norm, LayerNorm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    weight: Any = norm.weight
    return bool(weight.ndim == 1 and norm.normalized_shape == weight.shape)


def is_latent(mixer: nn.Module) -> bool:
    """Whether this is a C-GSPN sub-layer of plain parts, in their own order."""
    if not isinstance(mixer, PropagationMixer) or not mixer.keeps_its_parts or not is_plain(mixer, type(mixer)):
        return False
    if not all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in (mixer.down, mixer.up)):
        return False
    norms = (mixer.norm, mixer.merge_norm)
    if not all(is_plain(n, RMSNorm, nn.Identity) and getattr(n, "eps", 0.0) is not None for n in norms):
        return False
    return mixer.local is None or is_plain(mixer.local, nn.Conv2d)


def is_scale(scale: nn.Module) -> bool:
    """Whether a LayerScale, or nothing, is all there is on a branch."""
    return is_plain(scale, type(scale)) and (isinstance(scale, nn.Identity) or hasattr(scale, "gamma"))


def is_tanh(mlp: nn.Module) -> bool:
    """Whether this is a bare MLP with the GELU that products can do."""
    return is_plain(mlp, Mlp) and mlp.is_bare() and mlp.act.approximate == "tanh"  # type: ignore[union-attr, operator]
