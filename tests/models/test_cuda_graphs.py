"""Encoders replayed from CUDA graphs give what they give when they are called."""

import pytest
import torch

from cgspn.models import CapturedEncoder, create_model, encode_variable_size


def test_elsewhere_it_says_why() -> None:
    with pytest.raises(ValueError, match="'cpu'"):
        CapturedEncoder(create_model("cgspn_mini_patch4_28"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("model", ["cgspn_mini_patch4_28", "hybrid_mini_patch4_28"])
    @torch.inference_mode()
    def test_replays_are_calls(self, model: str) -> None:
        encoder = create_model(model).cuda().bfloat16().eval()
        captured = CapturedEncoder(encoder, limit=2)
        outputs = []
        for size in ((28, 28), (56, 28), (28, 28), (40, 64), (28, 28)):
            images = torch.randn(2, 1 if encoder.config.channels == 1 else 3, *size, device="cuda").bfloat16()
            outputs.append((captured(images), encoder(images)))
        assert len(captured.recordings) == 2
        for mine, plain in outputs:  # compared at the end: no replay may have written over an earlier result
            torch.testing.assert_close(mine.tokens, plain.tokens, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(mine.pooled, plain.pooled, rtol=2e-2, atol=2e-2)

    @torch.inference_mode()
    def test_any_size_through_few_graphs(self) -> None:
        encoder = create_model("cgspn_mini_patch4_28").cuda().eval()
        captured = CapturedEncoder(encoder)
        channels = encoder.config.channels
        pictures = [torch.randn(channels, 4 * h, 4 * w, device="cuda") for h, w in ((5, 9), (8, 8), (3, 10), (7, 7))]
        shapes = [(8, 10)]
        for mine, alone in zip(encode_variable_size(captured, pictures, shapes=shapes), pictures, strict=True):
            plain = encoder(alone[None])
            torch.testing.assert_close(mine.tokens, plain.tokens[0], rtol=1e-3, atol=1e-3)
        assert len(captured.recordings) <= 3

    @torch.no_grad()
    def test_what_changes_between_calls_counts(self) -> None:
        encoder = create_model("cgspn_mini_patch4_28").cuda().eval()
        captured = encoder.captured(limit=4)
        images = torch.randn(1, 3, 28, 28, device="cuda")

        def check(dtype: torch.dtype) -> None:
            mine, plain = captured(images), encoder(images)
            assert mine.tokens.dtype == plain.tokens.dtype == dtype
            torch.testing.assert_close(mine.tokens, plain.tokens, rtol=2e-2, atol=2e-2)

        check(torch.float32)
        with torch.autocast("cuda", torch.bfloat16):
            check(torch.bfloat16)
        for parameter in encoder.parameters():
            parameter.mul_(1.2)
        with torch.autocast("cuda", torch.bfloat16):  # anew: one context keeps the weights it has cast
            check(torch.bfloat16)
        check(torch.float32)
        assert len(captured.recordings) == 2
        encoder.load_state_dict({k: v * 0.9 for k, v in encoder.state_dict().items()}, assign=True)
        check(torch.float32)
        assert len(captured.recordings) == 1
        encoder.blocks[1].register_forward_hook(lambda *_: None)
        check(torch.float32)
        encoder.half()
        images = images.half()
        check(torch.float16)
        encoder.blocks[0].mixer.norm = torch.nn.Identity()
        check(torch.float16)

    @torch.no_grad()
    def test_what_needs_too_much_memory_is_launched(self) -> None:
        encoder = create_model("cgspn_mini_patch4_28").cuda().eval()
        captured = encoder.captured(memory=0.0)
        images = torch.randn(1, 3, 28, 28, device="cuda")
        torch.testing.assert_close(captured(images).tokens, encoder(images).tokens)
        assert list(captured.recordings.values()) == [None]
