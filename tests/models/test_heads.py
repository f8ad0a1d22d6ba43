"""Test classifier, segmentation, depth and backbone: slow references, losses, padded batches and training."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from builders import padded, pixels, randomized, state_of, tiny_config, tiny_model
from hf_regvit import (
    ConfigError,
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)
from hf_regvit.models.modeling_regvit import scale_invariant_log_loss

TINY = {"image_size": 16, "num_hidden_layers": 3, "num_register_tokens": 2, "num_labels": 5}
SIZES = [(16, 16), (8, 24), (24, 16), (16, 24)]


def build(cls: type, *, seed: int = 0, **fields):
    """Create a model in eval mode in which no parameter or statistic has its initial value."""
    return randomized(tiny_model(cls, **TINY | fields), seed=seed, buffers=True)


def normed_maps(model, pixel_values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slice CLS (B, D) and patches (B, D, rows, columns) after one block and the final norm by hand."""
    states = model.regvit(pixel_values, output_hidden_states=True).hidden_states
    tokens = model.regvit.layernorm(states[1:][block])
    rows, columns = pixel_values.shape[-2] // 8, pixel_values.shape[-1] // 8
    return tokens[:, 0], tokens[:, 3:].mT.unflatten(2, (rows, columns))


# --- Image classification --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_classifier_reads_cls_the_mean_patch_or_both():
    pixel_values = pixels(2, 16, 24)
    for pooling in ("cls", "mean_patch", "cls_mean_patch"):
        model = build(RegViTForImageClassification, pooling=pooling)
        tokens = model.regvit(pixel_values).last_hidden_state
        parts = {"cls": tokens[:, 0], "mean_patch": sum(tokens[:, 3 + i] for i in range(6)) / 6}
        read = torch.cat([part for name, part in parts.items() if name in pooling], dim=1)
        expected = functional.linear(read, model.classifier.weight, model.classifier.bias)
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_classifier_on_a_norm_after_pooling():
    model = build(RegViTForImageClassification, final_norm="pooled", pooling="mean_patch")
    mean = model.regvit(pixels()).last_hidden_state[:, 3:].mean(1)
    expected = model.classifier(model.regvit.layernorm(mean))
    torch.testing.assert_close(model(pixels()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "cls_mean_patch"])
def test_a_norm_after_pooling_goes_with_the_mean_patch_only(pooling):
    with pytest.raises(ValueError, match=rf"pooling='{pooling}'.*final_norm='pooled'.*pooling='mean_patch'"):
        build(RegViTForImageClassification, final_norm="pooled", pooling=pooling)


@pytest.mark.parametrize("pooling", ["cls", "mean_patch", "cls_mean_patch"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_classifier_in_a_padded_batch(pooling, attn_implementation):
    model = build(RegViTForImageClassification, pooling=pooling)
    model.set_attn_implementation(attn_implementation)
    pixel_values, pixel_mask = padded(*SIZES)
    logits = model(pixel_values, pixel_mask=pixel_mask).logits
    for i, (height, width) in enumerate(SIZES):
        alone = model(pixel_values[i : i + 1, :, :height, :width]).logits[0]
        torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "mean_patch"},
        {"pooling": "cls_mean_patch"},
        {"pooling": "mean_patch", "final_norm": "pooled", "layerscale_value": None},
    ],
)
@torch.no_grad()
def test_the_mean_of_many_patches_fits_into_half_precision(fields, dtype):
    """Check values of about 20 in one channel, as in trained models: the sum of 4096 patches overflows float16."""
    model = build(RegViTForImageClassification, num_hidden_layers=1, **fields)
    model.regvit.layernorm.bias[3] = 20.0
    model.regvit.embeddings.patch_embeddings.projection.bias[3] = 20.0
    pixel_values = pixels(1, 512, 512)
    expected = model(pixel_values).logits
    found = model.to(dtype)(pixel_values).logits
    assert (found.float() - expected).norm() / expected.norm() < 0.02


def test_classifier_losses():
    model = build(RegViTForImageClassification)
    output = model(pixels(), labels=torch.tensor([1, 4]))
    rows = torch.log_softmax(output.logits, dim=1)
    assert output.loss.item() == pytest.approx(-(rows[0, 1] + rows[1, 4]).item() / 2, rel=1e-5)
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    output = build(RegViTForImageClassification)(pixels(), labels=labels)
    chance = torch.sigmoid(output.logits)
    expected = -(labels * chance.log() + (1 - labels) * (1 - chance).log()).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    output = build(RegViTForImageClassification, num_labels=1)(pixels(), labels=torch.tensor([0.5, -1.0]))
    expected = ((output.logits[:, 0] - torch.tensor([0.5, -1.0])) ** 2).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --- Semantic segmentation -------------------------------------------------------------------------------------------


def segmentation_twin(model, pixel_values: torch.Tensor, *, training: bool = False) -> torch.Tensor:
    """Compute the head in its form for maps: BatchNorm2d, 1 x 1 convolution, bilinear resize to the input size."""
    maps = torch.cat([normed_maps(model, pixel_values, block)[1] for block in model.config.head_layers], dim=1)
    norm = torch.nn.BatchNorm2d(maps.shape[1])
    norm.load_state_dict(model.head_norm.state_dict())
    convolution = torch.nn.Conv2d(maps.shape[1], 5, kernel_size=1)
    convolution.load_state_dict({"weight": model.classifier.weight[:, :, None, None], "bias": model.classifier.bias})
    logits = convolution(norm.train(training)(maps))
    return functional.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("head_layers", [[-1], [0, 2], [-3, -2, -1]])
@torch.no_grad()
def test_segmentation_equals_its_twin_of_maps(head_layers):
    model = build(RegViTForSemanticSegmentation, head_layers=head_layers)
    for pixel_values in (pixels(), pixels(2, 24, 32)):
        logits = model(pixel_values).logits
        assert logits.shape == (2, 5, *pixel_values.shape[-2:])
        torch.testing.assert_close(logits, segmentation_twin(model, pixel_values), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_segmentation_in_training_uses_the_statistics_of_the_batch():
    model = build(RegViTForSemanticSegmentation)
    pixel_values = pixels(3, 16, 24)
    expected = segmentation_twin(model, pixel_values, training=True)
    before = model.head_norm.running_mean.clone()
    torch.testing.assert_close(model.train()(pixel_values).logits, expected, atol=1e-5, rtol=1e-4)
    features = normed_maps(model, pixel_values, -1)[1].mT.flatten(2).transpose(1, 2).flatten(0, 1)
    moved = 0.9 * before + 0.1 * features.mean(0)
    torch.testing.assert_close(model.head_norm.running_mean, moved, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_segmentation_in_a_padded_batch(attn_implementation):
    model = build(RegViTForSemanticSegmentation, head_layers=[0, -1])
    model.set_attn_implementation(attn_implementation)
    pixel_values, pixel_mask = padded(*SIZES)
    logits = model(pixel_values, pixel_mask=pixel_mask).logits
    for i, (height, width) in enumerate(SIZES):
        alone = model(pixel_values[i : i + 1, :, :height, :width]).logits[0]
        torch.testing.assert_close(logits[i, :, :height, :width], alone, atol=1e-5, rtol=1e-5)
    assert not logits.masked_select(~pixel_mask.bool()[:, None]).any()


def test_padding_does_not_enter_the_batch_norm():
    model = build(RegViTForSemanticSegmentation).train()
    pixel_values, pixel_mask = padded(*SIZES)
    with torch.no_grad():
        features = [
            normed_maps(model, pixel_values[i : i + 1, :, :height, :width], -1)[1][0].flatten(1).T
            for i, (height, width) in enumerate(SIZES)
        ]
    rows = torch.cat(features)  # (all real patches, D)
    expected = 0.9 * model.head_norm.running_var + 0.1 * rows.var(0)
    model(pixel_values, pixel_mask=pixel_mask).logits.sum().backward()
    torch.testing.assert_close(model.head_norm.running_var, expected, atol=1e-5, rtol=1e-5)
    assert model.head_norm.weight.grad.isfinite().all()


def cross_entropy_twin(logits: torch.Tensor, labels: torch.Tensor, ignore: int) -> float:
    total, count = 0.0, 0
    for b in range(len(labels)):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                if labels[b, y, x] != ignore:
                    row = logits[b, :, y, x].tolist()
                    total += math.log(sum(math.exp(value) for value in row)) - row[labels[b, y, x]]
                    count += 1
    return total / count


@pytest.mark.parametrize("ignore", [255, 0])
def test_segmentation_loss_ignores_one_label(ignore):
    model = build(RegViTForSemanticSegmentation, semantic_loss_ignore_index=ignore)
    labels = torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(2))
    labels[0, :9] = ignore
    output = model(pixels(), labels=labels)
    assert output.loss.item() == pytest.approx(cross_entropy_twin(output.logits, labels, ignore), rel=1e-5)
    changed = output.logits.detach().clone()
    changed[0, :, :9] = 7.0
    assert cross_entropy_twin(changed, labels, ignore) == pytest.approx(output.loss.item(), rel=1e-5)


def test_segmentation_loss_ignores_padding():
    model = build(RegViTForSemanticSegmentation)
    pixel_values, pixel_mask = padded(*SIZES)
    labels = torch.randint(0, 5, tuple(pixel_mask.shape), generator=torch.Generator().manual_seed(2))
    kept = labels.clone()
    output = model(pixel_values, labels=labels, pixel_mask=pixel_mask)
    assert torch.equal(labels, kept)
    expected = cross_entropy_twin(output.logits, labels.masked_fill(pixel_mask == 0, 255), 255)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_segmentation_loss_without_a_single_label_is_zero_not_nan():
    model = build(RegViTForSemanticSegmentation).train()
    loss = model(pixels(), labels=torch.full((2, 16, 16), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


# --- Depth estimation ------------------------------------------------------------------------------------------------


def depth_twin(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute in the order of the protocol: upsample four times, convolution, "linear norm", resize to input."""
    maps = []
    for block in model.config.head_layers:
        cls_token, patches = normed_maps(model, pixel_values, block)
        maps += [patches, cls_token[:, :, None, None].expand_as(patches)]
    maps = functional.interpolate(torch.cat(maps, dim=1), scale_factor=4, mode="bilinear", align_corners=False)
    bins = functional.conv2d(maps, model.classifier.weight[:, :, None, None], model.classifier.bias)
    weights = torch.relu(bins) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    config = model.config
    depth = torch.zeros_like(weights[:, 0])
    for i in range(config.num_depth_bins):
        center = config.min_depth + (config.max_depth - config.min_depth) * i / (config.num_depth_bins - 1)
        depth = depth + weights[:, i] * center
    return functional.interpolate(depth[:, None], pixel_values.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("head_layers", [[-1], [0, 1, 2]])
@torch.no_grad()
def test_depth_equals_its_twin_of_maps(head_layers):
    model = build(RegViTForDepthEstimation, head_layers=head_layers, min_depth=0.5, max_depth=80.0)
    for pixel_values in (pixels(), pixels(2, 24, 40)):
        depth = model(pixel_values).predicted_depth
        assert depth.shape == (2, *pixel_values.shape[-2:])
        torch.testing.assert_close(depth, depth_twin(model, pixel_values), atol=1e-4, rtol=1e-5)
        assert depth.min() >= 0.5
        assert depth.max() <= 80


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_depth_in_half_precision(dtype):
    """Check that the sum over 256 bins up to 80 m with weights of 30 does not overflow float16."""
    model = build(RegViTForDepthEstimation, num_depth_bins=256, max_depth=80.0)
    model.classifier.bias.add_(30.0)
    expected = model(pixels()).predicted_depth
    found = model.to(dtype)(pixels()).predicted_depth
    assert found.dtype == dtype
    assert ((found.float() - expected).abs() / expected).max() < 0.02


@torch.no_grad()
def test_depth_defaults_are_those_of_the_protocol():
    config = RegViTConfig()
    assert (config.num_depth_bins, config.min_depth, config.max_depth) == (256, 0.001, 10.0)


@torch.no_grad()
def test_depth_in_a_padded_batch():
    model = build(RegViTForDepthEstimation)
    pixel_values, pixel_mask = padded(*SIZES)
    depth = model(pixel_values, pixel_mask=pixel_mask).predicted_depth
    for i, (height, width) in enumerate(SIZES):
        alone = model(pixel_values[i : i + 1, :, :height, :width]).predicted_depth[0]
        torch.testing.assert_close(depth[i, :height, :width], alone, atol=1e-5, rtol=1e-5)
    assert not depth[pixel_mask == 0].any()


def log_loss_twin(depth: torch.Tensor, target: torch.Tensor) -> float:
    """Compute SigLog pixel by pixel."""
    errors = [
        math.log(d + 0.001) - math.log(t + 0.001)
        for d, t in zip(depth.flatten().tolist(), target.flatten().tolist(), strict=True)
        if t > 0  # False for NaN too
    ]
    mean = sum(errors) / len(errors)
    variance = sum((error - mean) ** 2 for error in errors) / (len(errors) - 1)
    return math.sqrt(variance + 0.15 * mean**2)


def depth_labels(*shape: int) -> torch.Tensor:
    labels = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 9 + 0.5
    labels[0, 0, :4] = 0.0
    labels[0, 1, :4] = -1.0
    labels[0, 2, :4] = torch.nan
    return labels


def test_depth_loss_equals_its_twin_and_ignores_invalid_depth():
    model = build(RegViTForDepthEstimation)
    labels = depth_labels(2, 16, 16)
    output = model(pixels(), labels=labels)
    assert output.loss.item() == pytest.approx(log_loss_twin(output.predicted_depth, labels), rel=1e-4)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_depth_loss_ignores_padding():
    model = build(RegViTForDepthEstimation)
    pixel_values, pixel_mask = padded(*SIZES)
    labels = depth_labels(*pixel_mask.shape)
    output = model(pixel_values, labels=labels, pixel_mask=pixel_mask)
    expected = log_loss_twin(output.predicted_depth, labels.masked_fill(pixel_mask == 0, 0.0))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_depth_loss_without_valid_pixels_is_zero_not_nan():
    model = build(RegViTForDepthEstimation)
    loss = model(pixels(), labels=torch.zeros(2, 16, 16)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mark", [float("inf"), float("nan"), -1.0])
def test_depth_that_is_no_number_does_not_count(mark):
    """Check infinite depth, as in the sky of rendered images."""
    model = build(RegViTForDepthEstimation)
    labels = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    labels[:, :4] = 0
    expected = model(pixels(), labels=labels).loss
    labels[:, :4] = mark
    loss = model(pixels(), labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_depth_loss_of_a_single_pixel_is_zero_not_nan():
    depth, valid = torch.rand(1, 4, 4).requires_grad_(), torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[0, 1, 2] = True  # a single pixel has no variance
    loss = scale_invariant_log_loss(depth, torch.ones(1, 4, 4), valid)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(depth.grad).all()


def test_depth_loss_does_not_mind_the_scale_as_much_as_the_shape():
    target = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(4)) + 1
    everywhere = torch.ones(1, 8, 8, dtype=torch.bool)
    scaled = scale_invariant_log_loss(1.5 * target, target, everywhere)
    assert scaled.item() == pytest.approx(math.sqrt(0.15) * math.log(1.5), rel=1e-2)
    assert scaled < scale_invariant_log_loss(target.flip(1), target, everywhere)


# --- Backbone --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_backbone_returns_true_rows_and_columns():
    model = build(RegViTBackbone, out_features=["stem", "stage1", "stage3"])
    pixel_values = pixels(2, 24, 40)
    output = model(pixel_values, output_hidden_states=True)
    assert model.channels == [32, 32, 32]
    assert [tuple(maps.shape) for maps in output.feature_maps] == [(2, 32, 3, 5)] * 3
    for index, maps in zip((0, 1, 3), output.feature_maps, strict=True):
        tokens = model.regvit.layernorm(output.hidden_states[index])
        for y in range(3):
            for x in range(5):
                assert torch.equal(maps[:, :, y, x], tokens[:, 3 + 5 * y + x])
    assert model(pixel_values).hidden_states is None


@torch.no_grad()
def test_backbone_options():
    pixel_values = pixels(2, 16, 24)
    states = build(RegViTBackbone)(pixel_values, output_hidden_states=True).hidden_states
    raw = build(RegViTBackbone, apply_layernorm=False, out_indices=[2])(pixel_values).feature_maps
    assert torch.equal(raw[0], states[2][:, 3:].mT.unflatten(2, (2, 3)))
    # DPT and similar models expect exactly one token before the patches
    model = build(RegViTBackbone, reshape_hidden_states=False)
    normed = model.regvit.layernorm(states[3])
    assert torch.equal(model(pixel_values).feature_maps[0], torch.cat([normed[:, :1], normed[:, 3:]], dim=1))
    model = build(RegViTBackbone, reshape_hidden_states=False, return_register_tokens=True)
    assert torch.equal(model(pixel_values).feature_maps[0], normed)


@torch.no_grad()
def test_backbone_in_a_padded_batch():
    model = build(RegViTBackbone, out_indices=[1, 3])
    pixel_values, pixel_mask = padded(*SIZES)
    feature_maps = model(pixel_values, pixel_mask=pixel_mask).feature_maps
    for i, (height, width) in enumerate(SIZES):
        alone = model(pixel_values[i : i + 1, :, :height, :width]).feature_maps
        for ours, theirs in zip(feature_maps, alone, strict=True):
            torch.testing.assert_close(ours[i, :, : height // 8, : width // 8], theirs[0], atol=1e-5, rtol=1e-5)


def test_unknown_stage_names_the_known_ones():
    with pytest.raises(ValueError, match=r"stage1.*stage9"):
        build(RegViTBackbone, out_features=["stage9"])


def test_upernet_of_transformers_builds_on_it():
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    backbone = tiny_config(**TINY, out_features=["stage1", "stage2", "stage3"])
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    model = UperNetForSemanticSegmentation(config).eval()
    assert isinstance(model.backbone, RegViTBackbone)
    assert model(pixels(1, 32, 48)).logits.shape == (1, 4, 32, 48)


def test_dpt_of_transformers_builds_on_it():
    from transformers import DPTConfig, DPTForDepthEstimation

    backbone = tiny_config(
        **{**TINY, "num_hidden_layers": 4, "reshape_hidden_states": False},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = DPTConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
        patch_size=8,
    )
    model = DPTForDepthEstimation(config).eval()
    assert isinstance(model.backbone, RegViTBackbone)
    assert model(pixels(1, 32, 32)).predicted_depth.isfinite().all()


# --- All heads -------------------------------------------------------------------------------------------------------

LABELS = {
    RegViTForImageClassification: torch.tensor([1, 4]),
    RegViTForSemanticSegmentation: torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(2)),
    RegViTForDepthEstimation: torch.ones(2, 16, 16)
    + torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("cls", LABELS)
def test_every_parameter_of_a_head_gets_a_gradient(cls):
    """Check that no parameter is unused, because DistributedDataParallel would search for it in every step."""
    variants = [
        {},
        {"use_mask_token": True},
        {"pooling": "mean_patch"},
        {"pooler_act": "tanh"},
        {"head_layers": [0, 2]},
    ]
    for fields in variants:
        model = build(cls, **fields).train()
        model(pixels(), labels=LABELS[cls]).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == [], fields


@pytest.mark.parametrize("fields", [{}, {"use_mask_token": True}, {"pooler_act": "tanh"}, {"final_norm": "pooled"}])
def test_every_parameter_of_the_backbone_gets_a_gradient(fields):
    model = build(RegViTModel, **fields).train()
    output = model(pixels())
    (output.pooler_output.sum() + output.patch_tokens.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model = build(RegViTBackbone, use_mask_token=True).train()
    model(pixels()).feature_maps[0].sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("cls", LABELS)
@torch.no_grad()
def test_tuples_and_hidden_states_on_request(cls):
    model = build(cls)
    output = model(pixels(), labels=LABELS[cls], output_hidden_states=True)
    loss, prediction, states = model(pixels(), labels=LABELS[cls], output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, output[0])
    assert torch.equal(prediction, output[1])
    assert len(states) == len(output.hidden_states) == 4
    without = model(pixels())
    assert without.loss is None
    assert without.hidden_states is None
    model.set_attn_implementation("eager")
    assert len(model(pixels(), output_attentions=True).attentions) == 3


@pytest.mark.parametrize("cls", [RegViTForSemanticSegmentation, RegViTForDepthEstimation])
def test_dense_heads_need_normed_tokens(cls):
    with pytest.raises(ValueError, match="final_norm='tokens'"):
        build(cls, final_norm="pooled")


def test_a_head_has_labels():
    with pytest.raises(ConfigError, match="num_labels=0"):
        build(RegViTForImageClassification, num_labels=0)


# --- Trainer ---------------------------------------------------------------------------------------------------------


# Sixteen fixed noise images with labels.
PHOTOS = [{"pixel_values": image, "labels": torch.tensor(i % 5)} for i, image in enumerate(pixels(16, seed=8))]


def trainer(model, folder, *, data: list[dict[str, torch.Tensor]], **arguments):
    from transformers import Trainer, TrainingArguments

    defaults = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    compute_metrics = arguments.pop("compute_metrics", None)
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=compute_metrics,
    )


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, atol: float = 0.0) -> list[str]:
    assert set(ours) == set(theirs)
    return [name for name in ours if not torch.allclose(ours[name], theirs[name], atol=atol, rtol=0)]


def test_accumulation_changes_neither_loss_nor_gradients(tmp_path):
    assert RegViTModel.accepts_loss_kwargs is False
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            build(RegViTForImageClassification), tmp_path, data=PHOTOS[:8], max_steps=2,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        run.train()
        entries = [entry for entry in run.state.log_history if "grad_norm" in entry]
        results.append((state_of(run.model), entries))
    (state, entries), (accumulated, accumulated_entries) = results
    assert differing(state, accumulated, atol=1e-5) == []
    assert differing(state, state_of(build(RegViTForImageClassification)), atol=1e-5)  # and it did train
    for ours, theirs in zip(entries, accumulated_entries, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_resumed_run_restores_every_tensor_and_ends_where_the_whole_one_does(tmp_path):
    arguments = {
        "data": PHOTOS, "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
        "optim": "adamw_torch",
    }  # fmt: skip
    whole = trainer(build(RegViTForImageClassification), tmp_path, **arguments)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    loaded = RegViTForImageClassification.from_pretrained(checkpoint)
    assert differing(state_of(loaded), saved) == []

    resumed = trainer(build(RegViTForImageClassification, seed=7), tmp_path / "resumed", **arguments)
    seen = []

    def before_each_step(module, args) -> None:
        seen.append(state_of(module))

    resumed.model.register_forward_pre_hook(before_each_step)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert (
        differing(seen[0], saved) == []
    )  # the first step after the resume starts from the saved tensors, all of them
    assert differing(state_of(resumed.model), state_of(whole.model)) == []
    assert differing(state_of(whole.model), saved)


def test_the_best_model_comes_back_with_every_tensor(tmp_path):
    evaluations = []

    def first_is_best(prediction) -> dict[str, float]:
        evaluations.append(prediction)
        return {"score": 1.0 / len(evaluations)}

    run = trainer(
        build(RegViTForImageClassification), tmp_path, data=PHOTOS, max_steps=3, per_device_train_batch_size=4,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, compute_metrics=first_is_best,
    )  # fmt: skip
    run.train()
    assert len(evaluations) == 3
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 3))
    assert differing(state_of(run.model), best) == []
    unchanged = set(best) - set(differing(best, last))
    assert unchanged == set()
