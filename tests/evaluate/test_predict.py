"""Five lines with an image-text model: against the embedded teacher by hand, and against transformers' own logits."""

import pytest
import torch
from PIL import Image

import cgspn
from cgspn.data import TEMPLATES, fill, load_embedded
from cgspn.models import DualEncoder
from layouts import picture


def test_the_embedded_teacher_names_clothes(tmp_path):
    images = load_embedded("test")
    some = [Image.fromarray(image[0].numpy()) for image in images.images[:40]]
    some[0].save(tmp_path / "first.png")
    model = cgspn.load_model("embedded")
    result = cgspn.classify(model, [tmp_path / "first.png", *some[1:]], images.class_names)
    right = [label == images.class_names[k] for label, k in zip(result.labels, images.labels[:40].tolist())]
    assert sum(right) > 30
    # by hand: one class after the other
    pixels = (images.images[:40].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        embeddings = model.encode_image(pixels.expand(-1, model.image.config.channels, -1, -1))
        logits = []
        for name in images.class_names:
            mean = model.encode_text([fill(t, name) for t in TEMPLATES]).mean(0)
            logits.append(embeddings @ (mean / mean.norm()) * model.logit_scale.exp())
    expected = torch.stack(logits, 1).softmax(1)
    torch.testing.assert_close(result.probabilities, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_and_probabilities_equal_those_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 56, "patch_size": 14}
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "max_position_embeddings": 12, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config).eval()
        processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        )
    else:
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 48}, vision_config=vision)
        model = transformers.SiglipModel(config).eval()
        torch.nn.init.constant_(model.logit_bias, -1.5)
        torch.nn.init.constant_(model.logit_scale, 1.2)
        processor = transformers.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil(
            size={"height": 56, "width": 56}
        )
    for part in (model, processor, words := tokenizer(transformers)):
        part.save_pretrained(tmp_path)
    images, texts = [picture(1, 60, 90), picture(2, 90, 40).convert("L")], ["a photo of a bag", "the red boot", "bag"]

    batch = words(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    pixels = torch.as_tensor(processor(images=[i.convert("RGB") for i in images], return_tensors="np")["pixel_values"])
    inputs = {"input_ids": batch["input_ids"], "pixel_values": pixels}
    if kind == "clip":
        inputs["attention_mask"] = batch["attention_mask"]
    with torch.no_grad():
        expected = model(**inputs).logits_per_image

    ours = cgspn.load_model(tmp_path)
    found = cgspn.similarity(ours, images, texts)
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)
    probabilities = expected.softmax(1) if kind == "clip" else expected.sigmoid()
    torch.testing.assert_close(found.probabilities, probabilities, atol=1e-5, rtol=1e-4)
    one = cgspn.similarity(ours, images[0], "bag")
    torch.testing.assert_close(one.logits, expected[:1, 2:], atol=1e-5, rtol=1e-4)
    classes = cgspn.classify(ours, images, ["bag", "boot"], ["a photo of a {}"])
    sums = classes.probabilities.sum(1)
    assert torch.allclose(sums, torch.ones(2)) == (kind == "clip")
    assert classes.labels == [["bag", "boot"][k] for k in classes.probabilities.argmax(1).tolist()]
    # the rule survives distillation and storage
    assert isinstance(ours, DualEncoder)
    ours.with_image(cgspn.convert(ours.image, compression=4)).save_pretrained(tmp_path / "student")
    student = cgspn.load_model(tmp_path / "student")
    assert (student.loss, ours.loss) == (("clip",) * 2 if kind == "clip" else ("sigmoid",) * 2)
    assert student.image.config.image_crop == (kind == "clip")


def tokenizer(transformers):
    """A tokenizer of words, made here: no vocabulary can be fetched."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<pad>", "<s>", "</s>", "a", "photo", "of", "bag", "boot", "the", "red"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_wrong_arguments_are_named(tmp_path):
    model = cgspn.load_model("embedded")
    with pytest.raises(ValueError, match="model is an image encoder without a text tower"):
        cgspn.classify(model.image, [picture(0)], ["bag"])
    with pytest.raises(ValueError, match="images is empty"):
        cgspn.similarity(model, [], ["bag"])
    with pytest.raises(ValueError, match="none of them empty"):
        cgspn.similarity(model, picture(0), ["bag", ""])
    with pytest.raises(FileNotFoundError, match=r"missing.png"):
        cgspn.classify(model, tmp_path / "missing.png", ["bag"])
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"damaged.png"):
        cgspn.classify(model, str(tmp_path / "damaged.png"), ["bag"])


def test_one_text_is_no_list_of_names() -> None:
    model = cgspn.load_model("embedded")
    shirt = Image.new("L", (28, 28))
    with pytest.raises(ValueError, match="class_names is the text 'bag'"):
        cgspn.classify(model, shirt, "bag")
    with pytest.raises(ValueError, match="templates is the text"):
        cgspn.classify(model, shirt, ["bag", "shirt"], "a photo of a {}")
    for size in ("28", 28.0, (28, 28, 28)):
        with pytest.raises(ValueError, match=r"size is .*; accepted: a side in pixels, or \(height, width\)"):
            cgspn.classify(model, shirt, ["bag", "shirt"], size=size)
