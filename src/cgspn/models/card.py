"""The model card (README.md) of a checkpoint folder."""

from pathlib import Path

from .checkpoint import write_atomically
from .config import EncoderConfig

CARD = "README.md"


def model_card(config: EncoderConfig, parameters: int) -> str:
    """The model card of an encoder in Markdown, with a header for model hubs. parameters: their number."""
    scans = config.mixers.count("propagation")
    height, width = config.image_size
    task = "image-classification" if config.num_classes else "image-feature-extraction"
    model = "AutoModelForImageClassification" if config.num_classes else "AutoModel"
    return f"""---
library_name: cgspn
pipeline_tag: {task}
tags:
- cgspn
- vision
- {task}
---

# {config.name}

A vision encoder of {parameters / 1e6:.1f} M parameters: {scans} layers of C-GSPN propagation and \
{config.depth - scans} of attention, {config.width} channels, patches of {config.patch_size} pixels, \
{height} x {width} pixels natively. It takes images of any height and width that are multiples of {config.patch_size}.

```python
import cgspn

encoder = cgspn.load_encoder(".")
tokens, pooled = encoder(images)  # normalised, [B, {config.channels}, H, W]
```

```python
import cgspn.models.hf
from transformers import AutoImageProcessor, {model}

processor = AutoImageProcessor.from_pretrained(".")
model = {model}.from_pretrained(".")
outputs = model(**processor(pictures, return_tensors="pt"))
```

```python
import cgspn.models.timm_models

model = cgspn.models.timm_models.from_encoder(cgspn.load_encoder("."))
```

Pixels in 0 to 1 are normalised with mean {list(config.image_mean)} and std {list(config.image_std)}.

Training data, evaluation, licence and limits are for whoever publishes the model to fill in.
"""


def write_card(folder: str | Path, config: EncoderConfig, parameters: int) -> None:
    """Write the model card to `folder` unless it has a README. Raises OSError if it cannot be written."""
    if not (Path(folder) / CARD).exists():
        write_atomically(Path(folder) / CARD, model_card(config, parameters))
