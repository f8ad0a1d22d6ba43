"""Test-time registers for converted towers: DINOv3 (rotary positions), CLIP, and SigLIP, which has no CLS."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from builders import in_fresh_memory, randomized, tiny_source
from helpers import slow_except
from hf_regvit import ConversionError, RegViTModel, convert, convert_back, diagnose, open_model, retrofit
from hf_regvit.app import cli
from hf_regvit.models.processing import default_image_processor

SIZES = {
    "image_size": 64, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 96,
}  # fmt: skip
SOURCES = {
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 0}),
    "dinov3_gated": ("DINOv3ViTModel", {"num_register_tokens": 0, "use_gated_mlp": True, "hidden_act": "silu"}),
    "clip": ("CLIPVisionModelWithProjection", {"projection_dim": 12}),
    "siglip": ("SiglipVisionModel", {}),
}
PLANTED = [1, 9]  # block and neuron, counted from 0
RATIO = 10.0  # of the norm of a planted patch to the median


def images(count: int, seed: int) -> tuple[list[Image.Image], np.ndarray]:
    """Images of noise with two flat cells each, and the mask (n, 64) of these cells."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    cells = np.zeros((count, 64), dtype=bool)
    for image, flat in zip(pixels, cells, strict=True):
        for cell in rng.choice(64, 2, replace=False):
            row, column = divmod(cell, 8)
            image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 230
            flat[cell] = True
    return [Image.fromarray(image) for image in pixels], cells


@torch.no_grad()
def plant(model: RegViTModel, pixels: torch.Tensor, cells: np.ndarray) -> None:
    """Give one neuron the linear discriminant of the flat cells, and let it write a vector of `RATIO` norms.

    A discriminant is used because random blocks mix the patches: no direction separates the cells by itself.
    """
    block, neuron = PLANTED
    mlp, seen = model.layers[block].mlp, {}
    first, last = (mlp.gate_up_proj, mlp.down_proj) if model.config.use_swiglu_ffn else (mlp.fc1, mlp.fc2)
    hook = first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].double()))
    hidden = model(pixels, output_hidden_states=True).hidden_states[block + 1]
    hook.remove()
    prefix, width = model.config.num_prefix_tokens, model.config.hidden_size
    flat = torch.cat([torch.zeros(len(cells), prefix, dtype=torch.bool), torch.from_numpy(cells)], dim=1)
    inside, outside = seen["x"][flat], seen["x"][~flat]
    spread = outside.T.cov()
    spread += 1e-3 * spread.diagonal().mean() * torch.eye(width).double()
    direction = torch.linalg.solve(spread, inside.mean(0) - outside.mean(0))
    middle = (inside @ direction).median() / 2 + (outside @ direction).max() / 2
    gain = 6 / ((inside @ direction).median() - middle)
    first.weight[neuron], first.bias[neuron] = gain * direction, -gain * middle
    if model.config.use_swiglu_ffn:
        up = neuron + model.config.ffn_hidden_size
        first.weight[up], first.bias[up] = 0, 1
    written = torch.randn(width, generator=torch.Generator().manual_seed(4))
    written = (written - written.mean()) / (written - written.mean()).norm()
    scale = model.layers[block].layer_scale2
    written = written if scale is None else written / scale.lambda1
    last.weight[:, neuron] = RATIO * hidden[:, prefix:].norm(dim=-1).median() / 6 * written


PROCESSOR = default_image_processor(64, resize=64)


def planted_source(name: str):
    """Random model of the family with a planted neuron; the tower was changed as a RegViT and given back."""
    class_name, fields = SOURCES[name]
    source = randomized(tiny_source(class_name, **{**SIZES, **fields}))
    model = convert(source)
    seen, cells = images(64, seed=0)
    reader = open_model(model, processor=PROCESSOR)
    plant(model, torch.stack([reader.transform(image) for image in seen]), cells)
    source.load_state_dict(convert_back(model, like=source))
    return source


@pytest.mark.parametrize("name", slow_except(SOURCES, "siglip"))
@torch.no_grad()
def test_the_planted_neuron_of_a_tower_is_found_and_moved(name, tmp_path):
    source = planted_source(name)
    model = convert(source)  # compares the outputs, with the huge patches in them
    seen, cells = images(48, seed=1)
    reader = open_model(model, processor=PROCESSOR)
    before = diagnose(reader, seen, progress=False)
    assert (before.layer, before.outlier_share) == (PLANTED[0] + 1, pytest.approx(cells.mean()))
    pixels = torch.stack([reader.transform(image) for image in seen[:4]])
    norms = reader.read(pixels, layers=(before.layer,)).patches().norm(dim=-1)
    assert torch.equal(norms > before.cutoff, torch.from_numpy(cells[:4]))

    result = retrofit(reader, seen, progress=False)
    after = result.report.judged["after"]
    assert result.report.neurons == [PLANTED]
    assert (after["outlier_share"], after["layers_with_outliers"]) == (0, [])
    assert after["cls_cosine"] > 0.99
    assert after["patch_cosine"] > 0.99
    assert result.report.judged["random neurons"]["outlier_share"] == pytest.approx(cells.mean())
    vector = "mean patch" if name == "siglip" else "CLS"
    assert f"cosine {vector} " in result.summary()
    assert f"for {vector} and" in result.report.card_text

    loaded = in_fresh_memory(RegViTModel.from_pretrained(result.save(tmp_path / "repaired")))
    repaired = open_model(loaded)  # with the processor beside the weights
    assert torch.equal(loaded(pixels).last_hidden_state, result.model(pixels).last_hidden_state)
    assert torch.equal(loaded(pixels).pooler_output, result.model(pixels).pooler_output)
    assert not diagnose(repaired, seen, progress=False).bimodal
    reading = repaired.read(pixels, layers=(before.layer,))
    assert (reading.registers().norm(dim=-1) > before.cutoff).all()

    assert all(torch.equal(value, source.state_dict()[key]) for key, value in convert_back(model, like=source).items())
    with pytest.raises(ConversionError, match=r"Test-time registers \(register_neurons\) run in RegViT only"):
        convert_back(loaded, like=source)


@pytest.mark.slow
def test_the_command_repairs_a_tower_without_cls(tmp_path):
    model = convert(planted_source("siglip"))
    model.image_processor = PROCESSOR
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images(40, seed=1)[0]):
        image.save(tmp_path / "images" / f"{number:02d}.png")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "images")]
    assert cli.main(["retrofit", *arguments, "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "retrofit_report.json").read_text())
    assert report["neurons"] == [PLANTED]
    assert (tmp_path / "out" / "before_after.png").stat().st_size > 1000
