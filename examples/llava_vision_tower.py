"""Swap the vision tower of a LLaVA-style model for a C-GSPN student, and give it images of any size.

The language model, the projector and the code that calls them stay. A student distilled from the tower gives the
projector the features it was trained on. Here everything is tiny and random: only the plumbing is shown.

    python examples/llava_vision_tower.py
    python examples/llava_vision_tower.py --llava llava-folder --student runs/student
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import cgspn
from cgspn.models.hf import CgspnModel


def tiny_llava() -> LlavaForConditionalGeneration:
    """A random LLaVA with a SigLIP tower of 4 blocks for images of 56 px."""
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=63,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


def student_of(tower: torch.nn.Module) -> str:
    """Convert a LLaVA's own tower and save it; `cgspn distill` comes between the two in real use."""
    folder = tempfile.mkdtemp()
    tower.save_pretrained(f"{folder}/teacher")
    teacher = cgspn.load_encoder(f"{folder}/teacher")
    cgspn.convert(teacher, compression=6).save_pretrained(f"{folder}/student")
    return f"{folder}/student"


def swap(llava: LlavaForConditionalGeneration, student: str) -> None:
    """Put the encoder of a folder in place of the vision tower. The grid has no class token: nothing is dropped."""
    tower = CgspnModel.from_pretrained(student).to(llava.device, llava.dtype)
    width = llava.config.vision_config.hidden_size
    if tower.config.hidden_size != width:
        raise ValueError(f"the student has {tower.config.hidden_size} channels; the projector takes {width}")
    llava.model.vision_tower = tower.eval()
    llava.config.vision_config = tower.config
    llava.config.vision_feature_select_strategy = "full"


@torch.inference_mode()
def answer(llava: LlavaForConditionalGeneration, images: torch.Tensor, question: list[int], new: int) -> torch.Tensor:
    """Token ids of the answer, [B, new]: one image token for each patch, then the question."""
    patch = llava.config.vision_config.patch_size
    patches = (images.shape[-2] // patch) * (images.shape[-1] // patch)
    prompt = torch.tensor([[1] + [llava.config.image_token_id] * patches + question] * len(images))
    mask = torch.ones_like(prompt)
    ids = llava.generate(
        input_ids=prompt,
        attention_mask=mask,
        pixel_values=images,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_hidden_states=False,
    )
    return ids[:, prompt.shape[1] :]


def main(arguments: list[str] | None = None) -> dict[str, list[int]]:
    """Returns the answer's shape by image size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", help="folder or hub id of a LLaVA; a tiny random one if left out")
    parser.add_argument("--student", help="folder of a student of its vision tower; converted on the spot if left out")
    options = parser.parse_args(arguments)
    llava = LlavaForConditionalGeneration.from_pretrained(options.llava) if options.llava else tiny_llava()
    swap(llava, options.student or student_of(llava.model.vision_tower))
    answers = {}
    for height, width in ((56, 56), (84, 140)):  # no resized positions, no crop to a square
        ids = answer(llava, torch.randn(2, 3, height, width), question=[5, 6, 7], new=4)
        answers[f"{height} x {width}"] = list(ids.shape)
        print(f"{height} x {width} px: answers {ids.tolist()}")
    return answers


if __name__ == "__main__":
    main()
