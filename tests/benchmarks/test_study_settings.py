"""Settings of studies that they cannot have are refused when they are given, by the argument's name."""

import re
from functools import partial
from pathlib import Path

import pytest
from benchmarks.ablation import AblationConfig
from benchmarks.inference import InferenceConfig
from benchmarks.quality import QualityConfig
from benchmarks.resolution.captions import CaptionsConfig
from benchmarks.scaling_formula import SimulationConfig

ONE, EACH = "accepted: 1 or more", "accepted: 1 or more each"
TILES = "accepted: multiples of the patch size 14"
WRONG = [
    (AblationConfig, {"batch": 0}, f"batch is 0; {ONE}"),
    (AblationConfig, {"batches": (1, -1)}, f"batches is (1, -1); {EACH}"),
    (AblationConfig, {"widths": (0,)}, f"widths is (0,); {EACH}"),
    (AblationConfig, {"rounds": 0}, f"rounds is 0; {ONE}"),
    (AblationConfig, {"pixels": 100}, f"pixels is 100; {TILES}"),
    (InferenceConfig, {"blocks": 0}, f"blocks is 0; {ONE}"),
    (InferenceConfig, {"rounds": 0}, f"rounds is 0; {ONE}"),
    (InferenceConfig, {"sizes": (225,)}, f"sizes holds 225; {TILES}"),
    (InferenceConfig, {"models": ("huge",)}, "models: model is 'vit_huge_patch14_378', which does not"),
    (SimulationConfig, {"node": 0}, f"node is 0; {ONE}"),
    (SimulationConfig, {"gpus": (0,)}, f"gpus is (0,); {EACH}"),
    (SimulationConfig, {"overlap": 1.5}, "overlap is 1.5; accepted: 0 to 1"),
    (QualityConfig, {"batch_size": 0}, "batch_size is 0; accepted: more than 0"),
    (QualityConfig, {"held_out": 0}, f"held_out is 0; {ONE}"),
    (QualityConfig, {"size": 0}, f"size is 0; {ONE}"),
    (QualityConfig, {"source_size": 0}, f"source_size is 0; {ONE}"),
    (QualityConfig, {"probe_size": (0, 14)}, f"probe_size is (0, 14); {EACH}"),
    (QualityConfig, {"stage1_steps": 0}, f"stage1_steps is 0; {ONE}"),
    (QualityConfig, {"stage2_steps": 0}, f"stage2_steps is 0; {ONE}"),
    (QualityConfig, {"seeds": ()}, "seeds is empty"),
    (
        partial(CaptionsConfig, Path(), (), (), Path()),
        {"variants": ("other",)},
        "variants holds ['other']; accepted: 'd",
    ),
]


@pytest.mark.parametrize(("kind", "given", "message"), WRONG)
def test_what_cannot_be_measured_is_refused_by_name(kind, given, message):
    photos = {"photos": Path("photos.tar")} if kind is QualityConfig else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**photos, **given)
