"""Attention of any token, maps of any family, layer-by-norm histogram, LOST stages, on rectangular grids."""

import pytest
import timm
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTImageProcessor

from builders import noise, pixels, tiny_model
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.evaluation.lost import lost_box
from hf_regvit.figures import maps as F
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.tokens import TokenReader

MODEL = tiny_model(hidden_size=24, num_attention_heads=3, num_register_tokens=2)


PIXELS = pixels(2, 32, 48)


# Reader of images of 32 x 48 pixels, as they are.
READER = TokenReader(MODEL, ViTImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3))


IMAGE = noise(1, (48, 32))


def test_attention_of_every_kind_of_token():
    model, pixels = READER.model, READER.transform(IMAGE)[None]
    model.set_attn_implementation("eager")
    expected = model(pixels, output_attentions=True).attentions[-1].detach()  # (1, heads, T, T), T = 1 + 2 + 4 * 6
    model.set_attn_implementation("sdpa")
    for query, row in (("cls", 0), (("register", 0), 1), (("register", 1), 2), (("patch", 2, 3), 3 + 2 * 6 + 3)):
        actual = torch.from_numpy(READER.attention_maps(IMAGE, query=query))
        torch.testing.assert_close(actual, expected[:, :, row, 3:].unflatten(-1, (4, 6)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "query", ["register", ("register", 2), ("register", -1), ("patch", 4, 0), ("patch", 0, 6), "patch"]
)
def test_attention_of_a_token_that_is_not_there(query):
    with pytest.raises(ValueError, match="query="):
        READER.attention_maps(IMAGE, query=query)


def test_maps_of_other_families():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0
    ).eval()
    (maps, _) = F.read_token_maps(vit, PIXELS)
    assert maps.attention.shape == (1, 4, 6)
    assert maps.registers.shape == (0, 24)
    expected = vit.forward_features(PIXELS)[0, 1:].detach()
    torch.testing.assert_close(maps.patch_tokens.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_without_cls_the_maps_have_none():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=32, patch_size=8, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3
    )
    model = SiglipVisionModel(config).eval()
    (maps,) = F.read_token_maps(model, torch.randn(1, 3, 32, 32))
    assert maps.attention.shape == (0, 4, 4)
    with pytest.raises(ValueError, match="no CLS"):
        TokenReader(model, default_image_processor(32)).attention_maps(Image.new("RGB", (32, 32)))


def test_overlay_has_the_mean_and_every_head_at_the_proportion_of_the_image():
    figure = F.attention_overlay_figure(IMAGE, torch.from_numpy(READER.attention_maps(IMAGE)[0]), name="CLS")
    shown = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert shown == ["image", "CLS, mean over 3 heads", "head 1", "head 2", "head 3"]
    box = figure.axes[1].get_position()
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    assert box.width * width / (box.height * height) == pytest.approx(48 / 32, rel=0.02)


def test_overlay_marks_the_cell_of_the_query():
    figure = F.attention_overlay_figure(Image.new("RGB", (48, 32)), torch.rand(2, 4, 6), cell=(1, 2))
    (line,) = figure.axes[1].lines
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (20, 12)


def test_layer_figure_has_a_row_per_layer_and_its_cut_offs():
    images = [Image.effect_noise((40, 32), 60).convert("RGB") for _ in range(8)]
    report = diagnose(MODEL, images, processor=default_image_processor(32), progress=False)
    figure = F.layer_norm_figure(report)
    (axis,) = figure.axes
    assert axis.get_ylim() == (-0.5, 2.5)
    assert axis.get_title() == "no distinct outliers"
    assert len(axis.collections) == 1  # the histogram, and no cut-off


@pytest.mark.slow
def test_images_of_a_report(tmp_path):
    images = [Image.effect_noise((40, 32), 60).convert("RGB") for _ in range(8)]
    report = diagnose(MODEL, images, processor=default_image_processor(32), progress=False)
    files = F.write_report_figures(report, tmp_path / "figures")
    names = [file.name for file in files]
    assert names == [
        "layer_norms.png",
        "positions.png",
        *(f"example_{i:02d}.png" for i in range(len(report.examples))),
    ]
    for file in files:
        assert Image.open(file).width > 100


def test_lost_stages_show_seed_and_box():
    torch.manual_seed(0)
    features = torch.randn(24, 8)
    result = lost_box(features, (4, 6))
    figure = F.lost_figure(Image.new("RGB", (48, 32)), result)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "inverse degree, seed", "similarity to the seed", "expansion", "mask", "box"]
    (mark,) = figure.axes[1].lines
    row, column = divmod(result.seed, 6)
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == ((column + 0.5) * 8, (row + 0.5) * 8)
    (found,) = figure.axes[5].patches
    x1, y1, x2, y2 = result.box((8, 8), (32, 48))
    assert (found.get_x(), found.get_y(), found.get_width(), found.get_height()) == (x1, y1, x2 - x1, y2 - y1)
