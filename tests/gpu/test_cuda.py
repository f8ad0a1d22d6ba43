"""What only a CUDA device can show: every attention implementation, low precision, the device-side position cache.

    pytest -m gpu

Nothing here runs in CI, which has no GPU.
"""

import pytest
import torch

from hf_regvit import RegViTConfig, RegViTForImageClassification, RegViTModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_model(**overrides) -> RegViTModel:
    torch.manual_seed(0)
    fields = {"image_size": 224, "patch_size": 14, "layerscale_value": 1.0, **overrides}
    return RegViTModel(RegViTConfig.from_preset("small", **fields)).eval().cuda()


def images(*sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A padded batch of noise and its pixel_mask."""
    height, width = (max(side) for side in zip(*sizes))
    pixels = torch.zeros(len(sizes), 3, height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = True
    return pixels.cuda(), mask.cuda()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_attention_implementations_agree_with_eager(implementation, padded) -> None:
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    dtype = torch.bfloat16 if implementation == "flash_attention_2" else torch.float32
    model = small_model().to(dtype)
    pixels, mask = images((224, 224), (98, 140), (224, 56))
    kwargs = {"pixel_mask": mask} if padded else {}
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        expected = model(pixels.to(dtype), **kwargs)
        model.set_attn_implementation(implementation)
        actual = model(pixels.to(dtype), **kwargs)
    # Everything but padding: CLS, the four registers, the patches of each image.
    keep = expected.patch_mask | (torch.arange(expected.patch_mask.shape[1], device="cuda") < 5)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        actual.last_hidden_state[keep], expected.last_hidden_state[keep], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(dtype) -> None:
    pixels, _ = images((224, 308))
    with torch.inference_mode():
        expected = small_model()(pixels).pooler_output
        actual = small_model().to(dtype)(pixels).pooler_output.float()
    assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.999


def test_position_cache_follows_the_weights() -> None:
    model = small_model()
    pixels, _ = images((98, 140))
    with torch.inference_mode():
        before = model(pixels).pooler_output
        assert len(model.embeddings._cached_positions) == 1
    with torch.no_grad():
        model.embeddings.position_embeddings.add_(torch.randn_like(model.embeddings.position_embeddings))
        after = model(pixels).pooler_output
        model.embeddings._cached_positions.clear()
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(model(pixels).pooler_output, after)


def test_compiled_step_equals_the_eager_one() -> None:
    torch.manual_seed(0)
    config = RegViTConfig.from_preset("tiny", image_size=64, patch_size=8, num_labels=3, num_hidden_layers=2)
    model = RegViTForImageClassification(config).cuda()
    pixels, labels = torch.randn(4, 3, 96, 64, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    losses = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = run(pixels, labels=labels).loss
        loss.backward()
        losses.append((loss.item(), model.regvit.embeddings.register_tokens.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
