"""Image-text models with the calls of open_clip, and in half precision."""

import pytest
import torch

import cgspn
from cgspn.data.prepare import prepare_for
from cgspn.models import image_encoder
from cgspn.models.dual import with_image
from layouts import picture

TEXTS = ["a photo of a bag", "Boot"]


def test_token_ids_stand_for_texts():
    model = cgspn.load_model("embedded")
    ids = model.tokenizer(TEXTS)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (2, model.context_length))
    assert tuple(model.tokenizer("one", context_length=7).shape) == (1, 7)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), model.encode_text(TEXTS))
        long = model.encode_text(ids, normalize=False)
        torch.testing.assert_close(long / long.norm(dim=-1, keepdim=True), model.encode_text(TEXTS))
    with pytest.raises(ValueError, match="none of them empty"):
        model.tokenizer([])


def test_forward_gives_what_the_loss_of_open_clip_takes():
    model = cgspn.load_model("embedded")
    images = torch.stack([prepare_for(model.image.config)(picture(n, 30, 50)) for n in range(2)])
    with torch.no_grad():
        found = model(images, model.tokenizer(TEXTS))
        assert torch.equal(found[0], model.encode_image(images))
        torch.testing.assert_close(found[1], model.encode_text(TEXTS))
        assert torch.equal(found[2], model.logit_scale.exp())
        assert len(found) == (4 if model.loss == "sigmoid" else 3)
        assert model(image=images)[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_sides_run_in_half_precision(dtype):
    whole, half = cgspn.load_model("embedded"), cgspn.load_model("embedded", dtype=dtype)
    assert half.encode_text(TEXTS).dtype == dtype
    found, wanted = (cgspn.similarity(model, picture(1), TEXTS).cosine for model in (half, whole))
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)


def test_image_encoder_and_with_image_take_either_kind():
    model = cgspn.load_model("embedded")
    assert image_encoder(model) is image_encoder(model.image) is model.image
    student = cgspn.convert(model, compression=3)
    assert with_image(model, student).image is student
    assert with_image(model.image, student) is student
