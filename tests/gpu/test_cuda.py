"""What only a CUDA device can show: every attention implementation, low precision, the device-side position cache.

    pytest -m gpu
    REGVIT_GPU_TEST_DEVICE=cpu pytest -m gpu     # the same code on a CPU, to see that it runs

Nothing here runs in CI, which has no GPU.
"""

import os
import shutil

import pytest
import torch

from hf_regvit import (
    PretrainingArguments,
    RegViTConfig,
    RegViTForImageClassification,
    RegViTModel,
    diagnose,
    load_images,
    pretrain,
)
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.tokens import read_tokens
from hf_regvit.pretraining.distillation import HeadShape, SelfDistillation

DEVICE = os.environ.get("REGVIT_GPU_TEST_DEVICE", "cuda")

LOW_PRECISION = DEVICE == "cuda"  # most CPUs emulate bfloat16, slowly

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_model(**overrides) -> RegViTModel:
    torch.manual_seed(0)
    fields = {"image_size": 224, "patch_size": 14, "layerscale_value": 1.0, **overrides}
    return RegViTModel(RegViTConfig.from_preset("small", **fields)).eval().to(DEVICE)


def images(*sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A padded batch of noise and its pixel_mask."""
    height, width = (max(side) for side in zip(*sizes))
    pixels = torch.zeros(len(sizes), 3, height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = True
    return pixels.to(DEVICE), mask.to(DEVICE)


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
    keep = expected.patch_mask | (torch.arange(expected.patch_mask.shape[1], device=DEVICE) < 5)
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
    model = RegViTForImageClassification(config).to(DEVICE)
    pixels, labels = torch.randn(4, 3, 96, 64, device=DEVICE), torch.tensor([0, 1, 2, 0], device=DEVICE)
    losses = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = run(pixels, labels=labels).loss
        loss.backward()
        losses.append((loss.item(), model.regvit.embeddings.register_tokens.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- Training ---


def distillation(centering: str) -> SelfDistillation:
    torch.manual_seed(0)
    config = RegViTConfig.from_preset(
        "tiny", image_size=64, patch_size=8, num_hidden_layers=3, use_mask_token=True, layerscale_value=1.0
    )
    shape = HeadShape(num_prototypes=128, hidden_size=64, bottleneck_size=32)
    return SelfDistillation(RegViTModel(config), dino_head=shape, ibot_head=shape, centering=centering)


def step_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    masks = torch.zeros(2, 4, 64, dtype=torch.bool)
    masks[0, :2, 5:25] = masks[1, 2:, 30:60] = True
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.flatten(0, 1).sum(1).clamp(min=1))[:, None].expand(8, 64)[masks.flatten(0, 1)]
    return {
        "global_crops": torch.randn(2, 4, 3, 64, 64, generator=generator),
        "local_crops": torch.randn(3, 4, 3, 32, 32, generator=generator),
        "masks": masks,
        "mask_indices": indices,
        "mask_weights": weights,
    }


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_step_of_pretraining_equals_the_cpu(centering) -> None:
    results = []
    for device in ("cpu", DEVICE):
        network = distillation(centering).to(device)
        network.begin_step(0.07)
        loss = network(**{name: tensor.to(device) for name, tensor in step_inputs().items()})["loss"]
        loss.backward()
        norms = {
            name: parameter.grad.norm().item()
            for name, parameter in network.student.named_parameters()
            if parameter.grad is not None
        }
        results.append((loss.item(), norms))
    (loss, norms), (other_loss, other_norms) = results
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert other_norms == pytest.approx(norms, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_step_of_the_real_recipe_is_near_the_exact_one(compiled) -> None:
    """bfloat16, drop path by batch subsets, compiled or not, against float32 with the same draws."""
    gradients = []
    for real in (False, True):
        network = distillation("softmax").to(DEVICE)
        for layer in network.student_backbone.layers:
            layer.drop_path_rate, layer.drop_path_mode = 0.3, "batch_subset"
        if real and compiled:
            network.compile_blocks()
        torch.manual_seed(3)
        network.begin_step(0.07)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=real and LOW_PRECISION):
            loss = network(**{name: tensor.to(DEVICE) for name, tensor in step_inputs().items()})["loss"]
        loss.backward()
        used = [p.grad.flatten() for p in network.student_backbone.parameters() if p.grad is not None]
        gradients.append((loss.item(), torch.cat(used)))
    (loss, exact), (other_loss, near) = gradients
    assert other_loss == pytest.approx(loss, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(exact, near, dim=0) > 0.98


def test_a_run_resumes_and_its_result_loads(tmp_path) -> None:
    def run(folder: str, **overrides) -> None:
        options = {
            "data": "digits", "preset": "tiny", "num_hidden_layers": 2, "patch_size": 8, "global_crop_size": 32,
            "local_crop_size": 16, "head_num_prototypes": 128, "per_device_train_batch_size": 16, "max_steps": 8,
            "save_strategy": "steps", "save_steps": 4, "bf16": LOW_PRECISION, "knn_steps": 0, "panel_steps": 0,
            "monitor_steps": 4, "use_cpu": DEVICE == "cpu",
        }  # fmt: skip
        pretrain(PretrainingArguments(output_dir=str(tmp_path / folder), **options | overrides))

    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    run("again", resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        whole, again = (
            RegViTModel.from_pretrained(tmp_path / name / "backbone").to(DEVICE)(pixels).pooler_output
            for name in ("whole", "again")
        )
    # Kernels that add in any order: close, not equal bit for bit as on a CPU.
    assert torch.nn.functional.cosine_similarity(whole, again).min() > 0.999


# --- Reading ---


def test_reading_on_the_device_equals_the_cpu() -> None:
    model = small_model()
    pixels, _ = images((224, 224), (224, 224))
    on_device = read_tokens(model, pixels, layers=(4, 12)).values
    on_cpu = read_tokens(model.cpu(), pixels.cpu(), layers=(4, 12)).values
    for actual, expected in zip(on_device, on_cpu, strict=True):
        torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=1e-3, rtol=1e-3)


def test_a_diagnosis_on_the_device_equals_the_cpu() -> None:
    source = load_images("photos")
    reports = []
    for device in (DEVICE, "cpu"):
        model = small_model(patch_size=16, num_hidden_layers=3, image_size=64).to(device)
        settings = {"processor": default_image_processor(64), "max_images": 16, "detail_images": 4}
        reports.append(diagnose(model, source, **settings, progress=False))
    assert reports[0].layer == reports[1].layer
    assert reports[0].cutoff == pytest.approx(reports[1].cutoff, rel=1e-2)
