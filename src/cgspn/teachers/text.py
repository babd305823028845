"""Text towers and tokenizers of CLIP, SigLIP and SigLIP 2 from transformers, combined with this library's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.checkpoint import CheckpointError, save_model
from ..models.config import to_dict
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from ..models.text import text_list
from ..models.weights import Weights, listed, saved_state
from .source import Source

_CLASSES = {
    "clip": "CLIPTextModelWithProjection",
    "clip_text_model": "CLIPTextModelWithProjection",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model")


class PretrainedText(nn.Module):
    """A text model of transformers and its tokenizer: texts -> [len(texts), embed_dim], with the same results as the
    original."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        """model: a text model of transformers whose output has text_embeds or pooler_output; tokenizer: the model's."""
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @property
    def config(self) -> Any:
        """The tower's transformers config."""
        config: Any = self.model.config
        return getattr(config, "text_config", config)

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a text."""
        return int(self.config.max_position_embeddings)

    def tokenize(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts -> ids int64 [len(texts), context_length], padded and truncated. Raises ValueError for an empty text.

        Texts for SigLIP are lower-cased, as in its training; the tokenizer named in SigLIP 2's folders does not do
        this.
        """
        texts = text_list(texts)
        if str(self.config.model_type).startswith("siglip"):
            texts = [text.lower() for text in texts]
        # SigLIP uses the last position and was trained on padded texts, so always pad to the full length
        longest = context_length or self.context_length
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        ids: Tensor = batch["input_ids"]
        return ids

    def forward(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Texts, or their ids [N, T], -> embeddings [N, embed_dim] of any norm.

        Longer texts are truncated. No mask is needed, because CLIP's attention is causal and SigLIP attends to padding.
        Raises ValueError for an empty text or an empty list.
        """
        ids = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        out: Any = self.model(input_ids=ids.to(next(self.model.parameters()).device))
        embeds = getattr(out, "text_embeds", None)
        return out.pooler_output if embeds is None else embeds


class PretrainedDual(DualEncoder):
    """An image encoder whose pooled output is the image embedding, and the text tower of the same model."""

    def __init__(self, image: Encoder, text: PretrainedText, logit_scale: float, logit_bias: float) -> None:
        """logit_scale (the logarithm of the scale) and logit_bias are those of the checkpoint."""
        nn.Module.__init__(self)
        width = image.config.pooled_width
        self.image = image
        self.text = text  # type: ignore[assignment]
        kind: Any = text.model.config
        self.loss = "sigmoid" if str(kind.model_type).startswith("siglip") else "clip"
        # the encoder includes the projection; an identity keeps the interface of DualEncoder
        self.image_projection = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.image_projection.weight)
        self.text_projection = nn.Identity()  # type: ignore[assignment]
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = nn.Parameter(torch.tensor(logit_bias))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the text tower and tokenizer to `folder`/text, then config.json and model.safetensors.

        dtype: of all stored weights except for the text tower's. Raises OSError.
        """
        text: Any = self.text
        image = saved_state(self.image, lambda: Encoder(self.image.config), dtype)
        own = {k: v.to("cpu", dtype) for k, v in self.state_dict().items() if not k.startswith(("text.", "image."))}
        text.model.save_pretrained(Path(folder) / "text")
        text.tokenizer.save_pretrained(Path(folder) / "text")
        config = {"model": "pretrained_dual", "encoder": to_dict(self.image.config)}
        save_model(folder, config, {f"image.{k}": v for k, v in image.items()} | own)


def missing_for_text(source: Source) -> str | None:
    """The reason why the text tower of a source cannot be loaded, or None."""
    kind = source.configs.get("config.json", {}).get("model_type")
    if kind not in _CLASSES:
        return f"only those of transformers' {', '.join(k for k in _CLASSES if '_' not in k)} are read"
    folder = source.folder
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZERS):
        return "no tokenizer files are next to the weights"
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed; install cgspn[text]"
    return None


def load_text(folder: str | Path) -> PretrainedText:
    """Load the text tower and tokenizer of a transformers folder of CLIP, SigLIP or SigLIP 2, in eval mode and float32.

    Raises CheckpointError if transformers is not installed or the folder contains another model.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("text towers need transformers; install cgspn[text]") from error
    try:
        # never run code from the folder, or ask about it
        plain = {"trust_remote_code": False, "local_files_only": True}
        config: Any = transformers.AutoConfig.from_pretrained(folder, **plain)
        kind = config.model_type
        if kind not in _CLASSES:
            raise CheckpointError(f"{folder} holds a {kind!r} model; text towers are of clip, siglip or siglip2")
        inner = getattr(config, "text_config", config)
        if kind == "clip":  # use the whole model's projection width; the text tower's field may differ
            inner.projection_dim = config.projection_dim
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # otherwise it lists all weights of the image tower as unexpected
        try:
            model = getattr(transformers, _CLASSES[kind]).from_pretrained(folder, config=inner, dtype=torch.float32)
        finally:
            transformers.logging.set_verbosity(level)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **plain)
    except CheckpointError:
        raise
    except Exception as error:  # damaged configs and vocabularies raise all kinds of errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"the text tower in {folder} cannot be read: {reason}") from error
    return PretrainedText(model, tokenizer).eval()


def with_text(image: Encoder, source: Source) -> PretrainedDual:
    """Create the image-text model of a transformers source from its image encoder. Raises CheckpointError."""
    assert source.folder is not None
    scale, bias = source.weights.get("logit_scale"), source.weights.get("logit_bias")
    text = load_text(source.folder)
    dtype = image.input_weight.dtype
    dual = PretrainedDual(image, text, scale.read().item() if scale else 0.0, bias.read().item() if bias else 0.0)
    return dual.to(dtype).eval()


def pretrained_dual_of(folder: Path, image: Encoder, rest: Weights) -> PretrainedDual:
    """Load a folder of `PretrainedDual.save_pretrained`, given its image encoder. Raises CheckpointError."""
    dual = PretrainedDual(image, load_text(folder / "text"), 0.0, 0.0)
    wanted = {k: v for k, v in dual.state_dict().items() if not k.startswith(("image.", "text."))}
    if {k: tuple(v.shape) for k, v in wanted.items()} != {k: v.shape for k, v in rest.items()}:
        raise CheckpointError(f"{folder}: expected {', '.join(wanted)} beside the encoder; found {listed(rest)}")
    dual.load_state_dict({k: v.read() for k, v in rest.items()}, strict=False)
    return dual.to(image.input_weight.dtype).eval()
