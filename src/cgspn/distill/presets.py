"""Presets of `cgspn distill`. Every field can be overridden from the command line."""

from dataclasses import replace

from .config import ComputeConfig, DistillConfig, HighResConfig, LossConfig, OptimConfig
from .sizes import SizeRange

# small images and models: Muon learns more in few steps, and six epochs do not overfit. The teacher was trained only at
# 28 px; its features at 56 px are a worse target than the student's own features, upsampled
EMBEDDED = DistillConfig(
    compression=4,
    stage1=OptimConfig(steps=60, batch_size=64, optimizer="muon", learning_rate=1e-2, augment=False),
    stage2=OptimConfig(steps=360, batch_size=64, optimizer="muon", learning_rate=1e-2, augment=False),
    highres=HighResConfig(
        teacher="previous",
        optim=OptimConfig(
            steps=120, batch_size=64, optimizer="muon", learning_rate=1e-3, warmup=0.05, augment=False, embedding_rate=0
        ),
    ),
)
# a ViT-S/14 and some thousand photographs: the second recipe of results/resolution. Crops are small against
# overfitting, and batches too, because more steps learn more from the same images
FEW = OptimConfig(batch_size=64, optimizer="muon", crop_scale=(0.08, 1.0), embedding_rate=0)
VIT_S14_STUDY = DistillConfig(
    compression=6,
    value_expansion=6,
    keep_positions=True,
    image_size=224,
    sizes=SizeRange(),
    stage1=replace(FEW, steps=800, learning_rate=1e-2),
    # new weights learn fast, the inherited ones keep what they know: the cosine similarity of a student with
    # value_expansion 12 is 0.010 higher after as many steps than with AdamW at 2.5e-4 for all weights
    stage2=replace(FEW, steps=2800, learning_rate=1e-3, inherited_rate=0.2),
    highres=HighResConfig(
        optim=replace(FEW, steps=400, optimizer="adamw", learning_rate=2.5e-5, warmup=0.05, accumulate=4)
    ),
    # a teacher with a class token leaves the pooling head untrained, and its gradient at full weight harms the tokens
    loss=LossConfig(output=0.05),
    compute=ComputeConfig(precision="bfloat16", save_every=100),
)
# the paper's student: s = 18, Cc = 64. The paper trains it only at 378 px, without positions; this preset uses mixed
# sizes and keeps positions (docs/distilling.md, "Sizes"). The paper gives no steps or rates. These are for 1.3e8
# images; stage 2 has 2e-4 because a ViT-S's loss rose from 4e-4 on. Accumulation steps are computed for eight GPUs of
# 80 GB: the taps take about 0.8 GB per image at 378 px and 6 GB at 1036 px. `cgspn bench train` finds the batch that
# fits.
SO400M = OptimConfig(batch_size=2048, accumulate=8, embedding_rate=0)
SO400M_378 = DistillConfig(
    compression=18,
    keep_positions=True,
    image_size=378,
    sizes=SizeRange(196, 448, count=5),
    stage1=replace(SO400M, steps=8_000, learning_rate=1e-3, inherited_rate=0.1),
    stage2=replace(SO400M, steps=56_000, learning_rate=2e-4, inherited_rate=0.25, ema=0.9998),
    compute=ComputeConfig(precision="bfloat16", compile=True, checkpointing=True, parallel="fsdp", save_every=500),
)
PRESETS: dict[str, DistillConfig] = {
    "embedded": EMBEDDED,
    "vit-s14-study": VIT_S14_STUDY,
    "so400m-378": SO400M_378,
    "so400m-highres": replace(
        SO400M_378,
        highres=HighResConfig(
            sizes=(518, 756, 1036),
            optim=replace(
                SO400M_378.stage2, steps=4_000, batch_size=1024, accumulate=16, learning_rate=2e-5, warmup=0.05
            ),
        ),
    ),
}
