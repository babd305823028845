"""`load_encoder`: one entry for every checkpoint; the format is recognised, not asked for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..models.checkpoint import CheckpointError, read_model
from ..models.config import encoder_config_from_dict
from ..models.dual import DualEncoder, load_dual
from ..models.encoder import Encoder

EMBEDDED = "embedded"


def load_model(source: str | Path) -> Encoder | DualEncoder:
    """The encoder of a checkpoint, or the whole image-text model if it is one, in eval mode.

    Args:
        source: a folder written by `save_pretrained`, or "embedded" for the teacher that comes with the package.

    Raises CheckpointError, saying what was expected and what was found.
    """
    if str(source) == EMBEDDED:
        return load_embedded_teacher()
    config, state = read_model(source)
    if config.get("model") == "dual":
        return load_dual(source)
    if config.get("model") != "encoder":
        raise CheckpointError(f"{source} holds a {config.get('model')!r} model; expected 'encoder' or 'dual'")
    encoder = Encoder(encoder_config_from_dict(config["encoder"]))
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {source} do not fit its config: {error}") from error
    return encoder.eval()


def load_encoder(source: str | Path) -> Encoder:
    """The image encoder of a checkpoint, in eval mode; of an image-text model, its image side.

    Arguments and errors as in `load_model`. Source: design, section 6.
    """
    model = load_model(source)
    return model.image if isinstance(model, DualEncoder) else model


def load_embedded_teacher() -> DualEncoder:
    """The small attention image-text model that comes with the package, in eval mode.

    Trained from scratch on the embedded images; pretrain.json beside its weights holds the command, seed and losses.
    Raises CheckpointError if the installation is damaged.
    """
    with resources.as_file(resources.files("cgspn.teachers") / "fashion_mnist_vit") as folder:
        return load_dual(folder)
