"""Maps read from a model, and the figures drawn from them."""

import dataclasses
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from builders import noise, tiny_model
from hf_regvit.figures import curves as curves_module
from hf_regvit.figures import maps as F

SIZES = {"hidden_size": 24, "num_attention_heads": 3, "num_register_tokens": 4, "layerscale_value": 1.0}


MODEL = tiny_model(**SIZES)


IMAGE = noise(0, (40, 24))


def random_maps(rows=3, columns=5, registers=4) -> F.TokenMaps:
    generator = torch.Generator().manual_seed(0)
    return F.TokenMaps(
        attention=torch.rand(1 + registers, rows, columns, generator=generator) / (rows * columns),
        patch_tokens=torch.randn(rows, columns, 8, generator=generator),
        norms=torch.rand(rows, columns, generator=generator) + 1,
        registers=torch.randn(registers, 8, generator=generator),
    )


@pytest.mark.parametrize("overrides", [{}, {"num_register_tokens": 0}, {"discard_registers": True}])
def test_maps_equal_the_slow_twin(overrides):
    """One patch at a time, with the token order [CLS | registers | patches] spelled out here and nowhere else."""
    model = tiny_model(**SIZES | overrides)
    pixels = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    maps = F.read_token_maps(model, pixels)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(pixels, output_attentions=True, output_hidden_states=True)
    registers = model.config.num_register_tokens
    assert len(maps) == 2
    for image in range(2):
        assert maps[image].attention.shape == (1 + registers, 3, 5)
        for row in range(3):
            for column in range(5):
                token = 1 + registers + row * 5 + column
                for query in range(1 + registers):
                    mean = sum(output.attentions[-1][image, head, query, token] for head in range(3)) / 3
                    assert maps[image].attention[query, row, column].item() == pytest.approx(mean.item(), abs=1e-6)
                norm = output.hidden_states[-1][image, token].square().sum().sqrt()
                assert maps[image].norms[row, column].item() == pytest.approx(norm.item(), rel=1e-5)
                patch = output.patch_tokens[image, row * 5 + column]
                torch.testing.assert_close(maps[image].patch_tokens[row, column], patch)
        torch.testing.assert_close(maps[image].registers, output.register_tokens[image])
        assert (maps[image].attention.sum((1, 2)) < 1).all()  # the rest goes to CLS and registers


@pytest.mark.parametrize("training", [True, False])
def test_model_keeps_its_mode_and_attention(training):
    model = tiny_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    assert implementation != "eager"
    F.read_token_maps(model, torch.zeros(1, 3, 16, 16))
    assert model.training is training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="multiple"):
        F.read_token_maps(model, torch.zeros(1, 3, 17, 16))
    assert model.training is training
    assert model.config._attn_implementation == implementation


def test_pca_recovers_known_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:3]
    scores = torch.randn(400, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    colors = F.pca_colors(scores @ basis + 5)
    assert colors.shape == (400, 3)
    assert colors.min() == 0
    assert colors.max() == 1
    for i in range(3):
        correlation = np.corrcoef(colors[:, i].numpy(), scores[:, i].numpy())[0, 1]
        assert abs(correlation) > 0.97  # not one: the outer percentiles are cut off


def test_pca_shape_scale_and_sign_do_not_matter():
    tokens = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    colors = F.pca_colors(tokens)
    assert colors.shape == (4, 6, 3)
    torch.testing.assert_close(F.pca_colors(tokens.flatten(0, 1) * 7 - 3), colors.flatten(0, 1))
    assert torch.equal(F.pca_colors(tokens.clone()), colors)


def test_pca_constant_tokens_have_one_colour():
    assert torch.isfinite(F.pca_colors(torch.ones(5, 5, 4))).all()


def test_pca_too_few():
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        F.pca_colors(torch.ones(1, 4))


def drawn(figure) -> np.ndarray:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_overview_has_one_panel_each():
    figure = F.overview_figure(IMAGE, random_maps())
    registers = [f"attention of register {i}" for i in range(1, 5)]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "attention of CLS", *registers, "PCA of patches", "norm of patches"]
    panels = figure.axes[:8]
    shapes = {axis.get_title(): axis.images[0].get_array().shape for axis in panels}
    assert shapes["attention of register 4"] == shapes["norm of patches"] == (3, 5)
    # Every panel has the aspect ratio of the image and stays inside of the page.
    size = figure.get_size_inches()
    for axis in panels:
        box = axis.get_position()
        assert box.height * size[1] / (box.width * size[0]) == pytest.approx(24 / 40)
        assert 0 <= box.x0 < box.x1 <= 1
        assert tuple(axis.images[0].get_extent()) in ((0, 40, 24, 0), (-0.5, 39.5, 23.5, -0.5))
    assert drawn(figure).std() > 10


def test_a_map_is_drawn_where_it_belongs():
    """A single bright patch in the last row and first column lights up the lower left corner of its panel."""
    attention = torch.zeros(5, 3, 5)
    attention[:, 2, 0] = 1
    figure = F.overview_figure(IMAGE, dataclasses.replace(random_maps(), attention=attention))
    drawing, axis = drawn(figure).astype(int).sum(-1), figure.axes[1]
    box = axis.get_position()
    height, width = drawing.shape
    panel = drawing[round((1 - box.y1) * height) : round((1 - box.y0) * height), round(box.x0 * width) :]
    panel = panel[:, : round(box.width * width)]
    quarter = panel[2 * len(panel) // 3 : -4, 4 : panel.shape[1] // 6]
    rest = panel[4 : len(panel) // 2, panel.shape[1] // 2 : -4]
    assert quarter.mean() > 3 * rest.mean()
    assert axis.get_xlabel() == "100.0% on patches"


def test_constant_attention_can_be_drawn():
    maps = dataclasses.replace(random_maps(), attention=torch.full((5, 3, 5), 1 / 20))
    drawn(F.overview_figure(IMAGE, maps))


def test_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn(F.overview_figure(IMAGE, random_maps()))
    assert dict(matplotlib.rcParams) == before


def test_progress_of_a_run_in_one_image():
    """One column per image and three rows, with every map in its place."""
    maps = [random_maps(), random_maps()]
    attention = torch.zeros(5, 3, 5)
    attention[0, 2, 0] = 1  # lower left
    maps[1] = F.TokenMaps(attention, maps[1].patch_tokens, maps[1].norms, maps[1].registers)
    page = F.progress_figure([IMAGE, IMAGE], maps, title="step 7")
    assert page.size == (2 * (300 + 6) + 6, 3 * (180 + 24) + 6)
    pixels = np.asarray(page).astype(int)
    column = pixels[:, 312:612]
    top = column[24:204]
    expected = np.asarray(IMAGE.resize((300, 180), Image.Resampling.BICUBIC)).astype(int)
    assert np.array_equal(top, expected)
    below = column[2 * 204 + 24 : 2 * 204 + 204].sum(-1)
    assert below[150:, :30].mean() > 3 * below[:90, 150:].mean()
    assert pixels[2:20, 6:80].min() < 100  # the title
    with pytest.raises(ValueError, match="1 images for 2"):
        F.progress_figure([IMAGE], maps)


def test_learning_curves_draw_what_was_logged():
    lines = [{"step": step, "loss": 5.0 - step, "dino_local_loss": 2.0, "teacher_entropy": 1.0} for step in range(4)]
    lines += [
        {"step": 0, "eval_knn_10": 0.3},
        {"step": 3, "eval_knn_10": 0.5, "feature_std": 0.7, "effective_rank": 9.0},
    ]
    lines += [{"step": 3, "alarm": "one_prototype", "message": "x"}]
    figure = curves_module.curves_figure(lines, num_prototypes=100)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == [
        "loss terms", "entropy of the targets (nats)", "accuracy on labeled images", "spread of CLS"
    ]  # fmt: skip
    curves = {line.get_label(): line for line in panels["loss terms"].lines}
    assert list(curves["sum"].get_xdata()) == [0, 1, 2, 3]
    assert list(curves["sum"].get_ydata()) == [5.0, 4.0, 3.0, 2.0]
    entropy = {line.get_label(): line for line in panels["entropy of the targets (nats)"].lines}
    assert entropy["ln K"].get_ydata()[0] == pytest.approx(np.log(100))
    assert list(panels["accuracy on labeled images"].lines[0].get_ydata()) == [0.3, 0.5]
    assert drawn(figure).std() > 10
    with pytest.raises(ValueError, match="None of the 1 lines"):
        curves_module.curves_figure([{"step": 0, "eval_seconds": 1.0}])
