"""The cached structure of a block, inspected again only after a change.

Checking some fifteen modules for hooks, wrappers and subclasses takes as long as several launches. Confirming a
snapshot takes a few comparisons in C: the modules, their classes, the sizes of their dictionaries (a `forward` set on
an instance adds an entry), their hooks and their parameters.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..compat import HOOKS
from .fp8 import Fp8Mlp
from .mlp import Mlp
from .norm import LayerNorm, RMSNorm
from .plain import has_no_hooks, is_plain
from .propagation import PropagationMixer

if TYPE_CHECKING:
    from .block import Block


HELD = ("_modules", "_parameters", "_buffers")
SETTINGS = ("eps", "approximate", "config")  # settings of layers that are fixed in kept launches
LOOKS: tuple[Any, ...] = (Tensor.data_ptr, Tensor.dtype.__get__, Tensor.size, Tensor.is_contiguous)  # type: ignore[attr-defined]


class Snapshot:
    """A snapshot of modules that can be compared quickly with their later state."""

    def __init__(self, root: nn.Module) -> None:
        """root: all modules below it are included, but not hooks and attributes of `root` itself."""
        modules = tuple(root.modules())[1:]
        below = [vars(m) for m in modules]
        held = [d[kind] for d in (vars(root), *below) for kind in HELD]
        places = [(d, key) for d in held for key in d]
        places += [(d, key) for d in below for key in SETTINGS if key in d]
        self._dictionaries, self._keys = [d for d, _ in places], [key for _, key in places]
        self._found = [d[key] for d, key in places]
        self.tensors = [t for t in self._found if isinstance(t, Tensor)]
        self._typed = [*modules, *self.tensors]
        self._types = list(map(type, self._typed))
        sized = [*below, *held, *(d[hooks] for d in below for hooks in HOOKS)]
        self._empty, self._filled = [d for d in sized if not d], [d for d in sized if d]
        self._sizes = list(map(len, self._filled))

    def holds(self) -> bool:
        """Whether modules, classes, hooks, settings and tensors are unchanged."""
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return False
        if list(map(type, self._typed)) != self._types:
            return False
        return all(map(is_, map(dict.get, self._dictionaries, self._keys), self._found))

    def look(self) -> tuple[list[Any], ...]:
        """The address, dtype, size and contiguity of each tensor, which are fixed in recorded launches."""
        held = self.tensors
        return tuple([list(map(look, held)) for look in LOOKS])


class State(Snapshot):
    """A snapshot of a block that knows which parts are plain (plain.py).

    Attributes:
        norm1, norm2: whether kernels may replace these LayerNorms.
        widths: shapes of the gains of those norms.
        latent: whether kernels may replace norms, products, convolution and LayerScale of a C-GSPN sub-layer.
        mlp: whether matrix products may add the MLP to the residual stream in place.
        plans: by key, the launches recorded for this state and for tensors as in `seen`, or the number of attempts.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.norm1, self.norm2 = is_layer_norm(block.norm1), is_layer_norm(block.norm2)
        self.widths = {n.weight.shape for n in (block.norm1, block.norm2) if is_layer_norm(n)}
        scale = is_plain(block.scale1, nn.Identity) or (has_no_hooks(block.scale1) and hasattr(block.scale1, "gamma"))
        self.latent = self.norm1 and is_latent(block.mixer) and scale
        self.mlp = is_plain(block.scale2, nn.Identity) and (is_plain(block.mlp, Fp8Mlp) or is_tanh(block.mlp))
        self.plans: dict[tuple[Any, ...], Any] = {}
        self.workspace: Any = None  # keeps the workspace alive for the next launches
        self.seen: tuple[list[Any], ...] = ()


def state_of(block: Block) -> State:
    """The state of a block, cached in it but not copied or pickled with it."""
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
    """Whether this is a C-GSPN sub-layer of plain parts in their standard order."""
    if not isinstance(mixer, PropagationMixer) or not mixer.keeps_its_parts or not is_plain(mixer, type(mixer)):
        return False
    if not all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in (mixer.down, mixer.up)):
        return False
    norms = (mixer.norm, mixer.merge_norm)
    if not all(is_plain(n, RMSNorm, nn.Identity) and getattr(n, "eps", 0.0) is not None for n in norms):
        return False
    return mixer.local is None or is_plain(mixer.local, nn.Conv2d)


def is_tanh(mlp: nn.Module) -> bool:
    """Whether this is a bare MLP with a tanh GELU, which cuBLASLt can compute within the matrix product."""
    return is_plain(mlp, Mlp) and mlp.is_bare() and mlp.act.approximate == "tanh"  # type: ignore[union-attr, operator]
