"""`load_encoder`: one entry for every checkpoint; the format is recognised, not asked for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..models.checkpoint import CheckpointError, read_model
from ..models.config import encoder_config_from_dict
from ..models.dual import DualEncoder, load_dual
from ..models.encoder import Encoder


def load_encoder(source: str | Path) -> Encoder:
    """The image encoder of a checkpoint, in eval mode.

    Args:
        source: a folder written by `save_pretrained` (an encoder, or an image-text model, whose image side is taken).

    Raises CheckpointError, saying what was expected and what was found. Source: design, section 6.
    """
    config, state = read_model(source)
    if config.get("model") not in ("encoder", "dual"):
        raise CheckpointError(f"{source} holds a {config.get('model')!r} model; expected 'encoder' or 'dual'")
    encoder = Encoder(encoder_config_from_dict(config["encoder"]))
    if config["model"] == "dual":
        state = {k.removeprefix("image."): v for k, v in state.items() if k.startswith("image.")}
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {source} do not fit its config: {error}") from error
    return encoder.eval()


def load_embedded_teacher() -> DualEncoder:
    """The small attention image-text model that comes with the package, in eval mode.

    Trained from scratch on the embedded images; pretrain.json beside its weights holds the command, seed and losses.
    Raises CheckpointError if the installation is damaged.
    """
    with resources.as_file(resources.files("cgspn.teachers") / "fashion_mnist_vit") as folder:
        return load_dual(folder)
