"""The encoders under transformers' Auto classes. Importing this module registers them; it needs transformers.

    import cgspn.models.hf  # teaches the Auto classes the model type "cgspn"
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained("runs/student")  # a folder of Encoder.save_pretrained, or of this model's own
    processor = AutoImageProcessor.from_pretrained("runs/student")
    out = model(**processor(pictures, return_tensors="pt"))  # last_hidden_state, pooler_output

AutoConfig and AutoModelForImageClassification work the same way. Both libraries use the same folder format:
`cgspn.load_encoder` reads what transformers saves. A backbone for transformers' detection and segmentation models can
be created from a folder or a config (AutoBackbone.from_pretrained accepts only hub ids):

    backbone = cgspn.models.hf.CgspnBackbone.from_pretrained("runs/student", out_indices=[4, 8, 12])
    backbone = AutoBackbone.from_config(cgspn.models.hf.CgspnConfig("cgspn_small_patch14_378", out_indices=[4, 8, 12]))
"""

try:
    import transformers.backbone_utils  # noqa: F401, absent before 5.2
    from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
    raise ImportError(
        f"cgspn.models.hf needs transformers 5.2 or newer: pip install 'cgspn[hf]'. It failed with: {error}. A "
        "torchvision built for another torch than the one installed has this effect too"
    ) from error

from .config import CgspnConfig
from .model import CgspnBackbone, CgspnForImageClassification, CgspnModel
from .processor import CgspnImageProcessor

__all__ = ["CgspnBackbone", "CgspnConfig", "CgspnForImageClassification", "CgspnImageProcessor", "CgspnModel"]

AutoConfig.register(CgspnConfig.model_type, CgspnConfig, exist_ok=True)
AutoModel.register(CgspnConfig, CgspnModel, exist_ok=True)
AutoModelForImageClassification.register(CgspnConfig, CgspnForImageClassification, exist_ok=True)
AutoBackbone.register(CgspnConfig, CgspnBackbone, exist_ok=True)
AutoImageProcessor.register(CgspnConfig, slow_image_processor_class=CgspnImageProcessor, exist_ok=True)
