"""The demo without a browser: reading and caching, content of maps and files, and what the server exposes."""

import json
import os
import re
import runpy
import socket
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from builders import noise, tiny_model, with_outliers
from hf_regvit import FeatureSettings
from hf_regvit.app import cli
from hf_regvit.app.demo import build_app, launch_options, write_features, write_figures
from hf_regvit.app.demo_page import MapRequest, read_views, results_page
from hf_regvit.app.exploration import Explorer, InputImage
from hf_regvit.evaluation import dense_features
from hf_regvit.evaluation.extraction import TokenFeatures
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.tokens import TokenReader

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
    "num_register_tokens": 2,
}  # fmt: skip
SIZE = (60, 40)  # of the images
SPACE = Path(__file__).resolve().parents[2] / "examples" / "space"


def reader(**changes):
    return TokenReader(tiny_model(**SIZES | changes), default_image_processor(32))


@pytest.fixture(scope="module")
def explorer():
    models = {
        "plain": with_outliers(tiny_model(**SIZES | {"num_register_tokens": 0}), block=3, cells=(9,), factor=100),
        "registers": tiny_model(**SIZES),
    }
    reference = [noise(seed, SIZE) for seed in range(20)]
    models = {name: TokenReader(model, default_image_processor(32)) for name, model in models.items()}
    return Explorer(models, reference=reference)


IMAGE = InputImage.of(noise(99, SIZE), "noise")


# --- Reading ---


def test_a_model_runs_once_for_all_blocks_heads_and_clicks(explorer):
    before = explorer.num_passes
    for layer in (1, 2, 3, -1):
        for place in ((0.1, 0.1), (0.9, 0.5)):
            for head in (0, 1, 2):
                request = MapRequest(("registers",), side=32, layer=layer if layer > 0 else 3, head=head, place=place)
                results_page(read_views(explorer, IMAGE, request), request)
    assert explorer.num_passes == before + 1
    explorer.view(IMAGE, "registers", side=48)
    assert explorer.num_passes == before + 2


def test_the_same_name_with_other_pixels_is_another_image(explorer):
    one, other = InputImage.of(noise(5, SIZE), "x"), InputImage.of(noise(6, SIZE), "x")
    assert one.key != other.key
    assert one.key == InputImage.of(noise(5, SIZE), "y").key
    first, second = (explorer.view(each, "registers", side=32).tokens for each in (one, other))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("query", ["cls", ("register", 1), ("patch", 2, 3)])
@pytest.mark.parametrize("head", [None, 1])
def test_attention_is_the_one_of_the_figures(explorer, query, head):
    view = explorer.view(IMAGE, "registers", side=32, layer=2)
    reader = explorer.readers["registers"]
    whole = reader.transform_for(image_size=32, keep_aspect=True)
    reader = TokenReader(reader.model, whole)
    expected = torch.from_numpy(reader.attention_maps(IMAGE.image, query=query, layer=2)[0])
    expected = expected.mean(0) if head is None else expected[head]
    torch.testing.assert_close(view.attention_from(query, head=head), expected, atol=1e-3, rtol=1e-3)  # float16 kept
    with pytest.raises(ValueError, match=r"no token query=\('register', 9\)"):
        view.attention_from(("register", 9))


def test_similarity_norms_and_place_against_loops(explorer):
    view = explorer.view(IMAGE, "registers", side=32)
    reader = explorer.readers["registers"]
    pixels = reader.transform_for(image_size=32, keep_aspect=True)(IMAGE.image)[None]
    raw = reader.read(pixels).patches()[0]
    rows, columns = view.grid
    assert (rows, columns) == (8, 12)
    cell = view.cell((0.51, 0.26))
    assert cell == (2, 6)
    assert view.cell((1.0, 1.0)) == (7, 11)
    with torch.no_grad():
        normed = reader.model.layernorm(raw)
    similarity = view.similarity_to(cell)
    for row in range(rows):
        for column in range(columns):
            a, b = normed[row * columns + column], normed[cell[0] * columns + cell[1]]
            assert similarity[row, column].item() == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-5)
            assert view.norms[row, column].item() == pytest.approx(raw[row * columns + column].norm().item(), rel=1e-5)


def test_outliers_are_found_by_what_is_usual_in_the_model(explorer):
    view = explorer.view(IMAGE, "plain", side=32)
    assert view.outliers.sum() == 1
    assert view.outliers.flatten()[9]
    assert explorer.view(IMAGE, "plain", side=32, layer=2).cutoff is None
    assert not explorer.view(IMAGE, "registers", side=32).outliers.any()
    request = MapRequest(("plain",), side=32, layer=3)
    page = results_page({"plain": view}, request)
    assert "1 of 96 patches is an artifact" in page
    assert page.count("class=outlier") == 2  # in the image and in the norms


def test_memory_is_bounded_and_the_oldest_goes_first():
    explorer = Explorer({"m": reader()}, reference=[noise(0, SIZE)], cache_bytes=200_000)
    images = [InputImage.of(noise(seed, SIZE), str(seed)) for seed in range(6)]
    for each in images:
        explorer.view(each, "m", side=32)
    held = sum(view.num_bytes for view in explorer._kept.values())
    assert 0 < held <= 200_000
    passes = explorer.num_passes
    explorer.view(images[-1], "m", side=32)
    assert explorer.num_passes == passes
    explorer.view(images[0], "m", side=32)
    assert explorer.num_passes == passes + 1


def test_where_not_all_blocks_fit_only_the_one_asked_for_is_read():
    explorer = Explorer({"m": reader()}, reference=[noise(0, SIZE)], cache_bytes=50_000)
    explorer.view(InputImage.of(noise(0, SIZE), "x"), "m", side=32, layer=2)
    assert [key[-1] for key in explorer._kept] == [2]


def test_a_strip_is_read_at_fewer_patches():
    explorer = Explorer({"m": reader()}, reference=[noise(0, SIZE)], max_patches=100)
    for size in ((60, 40), (400, 24), (24, 400)):
        view = explorer.view(InputImage.of(noise(0, size), "x"), "m", side=128)
        assert view.norms.numel() <= 110, size


def test_a_model_without_cls_and_registers():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=32
    )
    models = {"siglip": TokenReader(SiglipVisionModel(config).eval(), default_image_processor(32))}
    explorer, image = Explorer(models, reference=[noise(0, SIZE)]), InputImage.of(noise(0, SIZE), "x")
    request = MapRequest(("siglip",), side=32, layer=2)
    views = read_views(explorer, image, request)
    page = results_page(views, request)
    assert "This model has no CLS token." in page
    assert "Register 1" not in page


def test_a_model_whose_attention_has_an_unknown_formula_shows_everything_else(tmp_path):
    pytest.importorskip("timm")
    from timm.layers import DiffAttention
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=2, reg_tokens=2, attn_layer=DiffAttention
    )
    models = {"differential": TokenReader(model.eval(), default_image_processor(32)), "registers": reader()}
    explorer = Explorer(models, reference=[noise(0, SIZE)])
    request = MapRequest(("differential", "registers"), side=32, layer=2)
    views = read_views(explorer, IMAGE, request)
    page = results_page(views, request)
    assert page.count("The attention of this model has a formula that is not known.") == 3  # patch, CLS, registers
    assert torch.equal(views["differential"].patches, views["differential"].features("x").patches[0])
    with pytest.raises(ValueError, match="its formula is not known"):
        views["differential"].attention_from("cls")
    with zipfile.ZipFile(write_figures(views, IMAGE, request, tmp_path)) as archive:
        assert len(archive.namelist()) == 2 + 3  # no attention of the patch in the first model


def test_nan_is_named():
    model = tiny_model(**SIZES)
    model.layers[1].mlp.fc1.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="'broken' produces NaN"):
        Explorer({"broken": TokenReader(model, default_image_processor(32))}, reference=[noise(0, SIZE)])


@pytest.mark.slow
def test_settings_of_dense_features_set_the_first_view_and_average_views(tmp_path):
    settings = FeatureSettings(layer=2, views=4, image_size=48, pool_to_grid=True)
    settings.save(tmp_path / "dense_settings.json")
    models, reference = {"m": reader(), "other": reader(num_register_tokens=0)}, [noise(0, SIZE)]
    explorer = Explorer(models, reference=reference, settings=tmp_path / "dense_settings.json")
    assert explorer.default_side("m") == 48
    view, plain = explorer.view(IMAGE, "m", side=48, layer=2), Explorer(models, reference=reference)
    pixels = explorer.readers["m"].transform_for(image_size=48, keep_aspect=True)(IMAGE.image)[None]
    expected = dense_features.read_views(explorer.readers["m"], pixels, (2,), views=4).patches()[0]
    assert view.grid == (12, 18)
    torch.testing.assert_close(view.patches, expected, atol=1e-5, rtol=0)
    one = plain.view(IMAGE, "m", side=48, layer=2)
    assert (view.patches - one.patches).abs().max() > 1e-3
    torch.testing.assert_close(view.norms, one.norms)
    torch.testing.assert_close(view.attention, one.attention)
    app = build_app(models, reference=reference, dense_settings=str(tmp_path / "dense_settings.json"))
    values = {part["props"].get("elem_id"): part["props"].get("value") for part in app.config["components"]}
    assert (values["layer"], values["side"]) == (2, 48)
    replace(settings, model={"family": "clip"}).save(tmp_path / "dense_settings.json")
    with pytest.raises(ValueError, match="Run regvit dense for this model"):
        Explorer(models, reference=reference, settings=tmp_path / "dense_settings.json")


def test_layer_and_empty_models_are_refused(explorer):
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        explorer.view(IMAGE, "plain", side=32, layer=4)
    with pytest.raises(ValueError, match="at least one model"):
        Explorer({})


# --- The page and the files ---


def test_two_models_side_by_side(explorer):
    request = MapRequest(("plain", "registers"), side=32, layer=2, head=2)
    page = results_page(read_views(explorer, IMAGE, request), request)
    assert "models-2" in page
    assert page.count("<article>") == 7 + 2
    assert page.count("<figure>") == 2 * 7 + 2  # registers: only the model that has them
    assert "head 2" in page
    assert "block 2 of 3" in page


def test_equal_registers_are_one_map():
    model = tiny_model(**SIZES | {"num_register_tokens": 4})
    with torch.no_grad():
        model.embeddings.register_tokens[:, 2:] = model.embeddings.register_tokens[:, 1:2]
    made = TokenReader(model, default_image_processor(32))
    explorer = Explorer({"m": made}, reference=[noise(0, SIZE)])
    request = MapRequest(("m",), side=32, layer=1)
    page = results_page(read_views(explorer, InputImage.of(noise(1, SIZE), "x"), request), request, address="a=1&b=2")
    assert re.findall(r"<h3>(Register.*?)</h3>", page) == ["Register 1", "Registers 2 to 4"]
    assert 'data-address="a=1&amp;b=2"' in page


def test_names_of_models_are_text_not_markup():
    explorer = Explorer({"<script>": reader()}, reference=[noise(0, SIZE)])
    request = MapRequest(("<script>",), side=32, layer=3)
    page = results_page(read_views(explorer, IMAGE, request), request)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_deeper_model_is_read_as_far_from_the_end():
    models = {"three": reader(), "five": reader(num_hidden_layers=5)}
    explorer = Explorer(models, reference=[noise(0, SIZE)])
    views = read_views(explorer, IMAGE, MapRequest(("three", "five"), side=32, layer=2))
    assert [view.layer for view in views.values()] == [2, 4]
    views = read_views(explorer, IMAGE, MapRequest(("five", "three"), side=32, layer=1))
    assert [view.layer for view in views.values()] == [1, 1]


def test_features_are_those_of_extraction(explorer, tmp_path):
    views = read_views(explorer, IMAGE, MapRequest(("registers",), side=32, layer=3))
    path = write_features(views, IMAGE, tmp_path)
    assert path.suffix == ".safetensors"
    stored = TokenFeatures.load(path)
    assert stored.grid == (8, 12)
    assert stored.registers.shape == (1, 2, 24)
    assert torch.equal(stored.patches[0], views["registers"].patches)
    both = read_views(explorer, IMAGE, MapRequest(("plain", "registers"), side=32, layer=3))
    with zipfile.ZipFile(write_features(both, IMAGE, tmp_path)) as archive:
        assert len(archive.namelist()) == 2


@pytest.mark.parametrize("names", [("owner/vit", "owner_vit"), (f"{'long/' * 20}a", f"{'long/' * 20}b")])
def test_files_of_two_models_with_names_that_fall_together(names, tmp_path):
    """Two folders that differ only at the end of a long path: the download used to hold the second one twice."""
    models = {name: reader(num_register_tokens=i) for i, name in enumerate(names)}
    explorer = Explorer(models, reference=[noise(0, SIZE)])
    image = InputImage.of(noise(0, SIZE), "写真" * 100)  # 600 bytes; file systems take 255
    path = write_features(read_views(explorer, image, MapRequest(names, side=32, layer=3)), image, tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "out")
    stored = [TokenFeatures.load(file) for file in sorted((tmp_path / "out").iterdir())]
    assert [features.registers.shape[1] for features in stored] == [0, 1]


@pytest.mark.slow
def test_figures_are_images(explorer, tmp_path):
    request = MapRequest(("plain",), side=32, layer=3)
    path = write_figures(read_views(explorer, IMAGE, request), IMAGE, request, tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert len(names) == 3
        for name in names:
            with archive.open(name) as file:
                assert Image.open(file).size[0] > 300
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# --- What is exposed ---


@pytest.fixture(scope="module")
def app():
    models = {"a": reader(), "b": reader(num_register_tokens=0)}
    return build_app(models, compare="b", reference=[noise(0, SIZE)])


def test_the_server_is_for_this_machine_and_serves_no_files(app):
    assert launch_options(host="0.0.0.0")["server_name"] == "0.0.0.0"
    options = launch_options(port=7860)
    assert options["server_name"] == "127.0.0.1"
    assert options["share"] is False
    assert options["strict_cors"] is True
    assert options["allowed_paths"] == []
    assert options["show_error"] is False
    assert options["max_file_size"] == "20mb"
    assert not options["enable_monitoring"]
    assert not options["mcp_server"]
    assert app.analytics_enabled is False
    assert app._queue.max_size == 32
    assert all(function.api_visibility == "private" for function in app.fns.values())
    assert not re.search(r"https?://", options["css"])
    assert not [font for font in options["theme"]._stylesheets if "//" in font]


def test_heavy_functions_share_one_place(app):
    reading = [function for function in app.fns.values() if function.concurrency_id == "read"]
    assert len(reading) >= 8
    assert {function.concurrency_limit for function in reading} == {1}


def handler(app, name):
    return next(f.fn for f in app.fns.values() if f.fn is not None and f.fn.__name__ == name)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "empty.png", "empty.png"),
        (b"no image at all", "notes.png", "notes.png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.png", "drawing.png"),
    ],
)
def test_a_wrong_file_is_a_message_without_paths(app, tmp_path, content, name, words):
    from gradio import Error

    (tmp_path / name).write_bytes(content)
    with pytest.raises(Error) as caught:
        handler(app, "_open")(str(tmp_path / name))
    assert words in caught.value.message
    assert str(tmp_path) not in caught.value.message
    assert caught.value.print_exception is False


def test_a_bomb_is_refused_from_its_header(app, tmp_path):
    from gradio import Error

    Image.new("1", (8_000, 8_000)).save(tmp_path / "bomb.png")
    with pytest.raises(Error, match="8000x8000"):
        handler(app, "_open")(str(tmp_path / "bomb.png"))


def test_failures_of_the_machine_do_not_reach_the_visitor(app, monkeypatch, caplog):
    from gradio import Error

    from hf_regvit.app import demo

    monkeypatch.setattr(demo, "read_views", Mock(side_effect=RuntimeError("out of memory at /secret/place")))
    with pytest.raises(Error) as caught:
        handler(app, "_show")(InputImage.of(noise(0, SIZE), "x"), (0.5, 0.5), "a", "none", 32, 3, 0)
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text


def test_sliders_follow_the_model(app):
    page = SimpleNamespace()
    side, layer, head = handler(app, "_adapt")("b", 30)
    page.side = side
    assert (side["minimum"], side["step"], side["value"]) == (16, 4, 32)
    assert layer["maximum"] == layer["value"] == 3
    assert [value for _, value in head["choices"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({}, (16, 192)),
        ({"image_size": 8}, (8, 192)),
        ({"image_size": 224}, (16, 224)),
        ({"patch_size": 32}, (32, 1536)),
    ],
)
def test_the_resolution_a_model_was_made_for_is_on_the_slider(changes, sides):
    """The server refuses values outside of the slider, so the page would show nothing at all."""
    app = build_app({"a": reader(**changes)}, reference=[noise(0, SIZE)])
    side = next(block for block in app.blocks.values() if getattr(block, "elem_id", None) == "side")
    assert (side.minimum, side.maximum) == sides
    assert side.minimum <= side.value <= side.maximum
    assert side.preprocess(side.value) == side.value
    update, _, _ = handler(app, "_adapt")("a", 4000)
    assert update["minimum"] <= update["value"] <= update["maximum"]


def test_a_model_of_one_block_has_a_page():
    models = {
        "one": reader(num_hidden_layers=1),
        "three": reader(),
    }
    app = build_app(models, reference=[noise(0, SIZE)])
    layer = next(block for block in app.blocks.values() if getattr(block, "elem_id", None) == "layer")
    assert (layer.value, layer.interactive) == (1, False)
    _, layer, _ = handler(app, "_adapt")("three", 32)
    assert (layer["maximum"], layer["value"], layer["interactive"]) == (3, 3, True)


def test_a_forgotten_image_is_said_to_be(app):
    """Gradio resets an expired state to its initial value, so that must not be an image."""
    from gradio import Error, State

    images = [block for block in app.blocks.values() if isinstance(block, State) and block.time_to_live == 3600]
    assert [block.value for block in images] == [None]
    with pytest.raises(Error, match="no longer available"):
        handler(app, "_show")(None, (0.5, 0.5), "a", "none", 32, 3, 0)


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_with_what_to_do(tmp_path, capsys):
    tiny_model(**SIZES).save_pretrained(tmp_path)
    default_image_processor(32).save_pretrained(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["demo", "--model", str(tmp_path), "--port", str(port)]) == 1
    assert f"error: Port {port} is already in use" in capsys.readouterr().err
    assert "GRADIO_TEMP_DIR" not in os.environ  # a later demo in this process would write into a folder that is gone


def test_compare_must_be_one_of_the_models():
    with pytest.raises(ValueError, match=r"compare='c' is not one of the models\. Choose from a"):
        build_app({"a": reader()}, compare="c")


def test_dry_run_of_the_command(capsys):
    assert cli.main(["demo", "--model", "x", "--compare", "y", "--dry_run", "--json"]) == 0
    assert '"compare": "y"' in capsys.readouterr().out


# --- The Space ---


def test_header_of_the_space():
    _, header, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["sdk"] == "gradio"
    assert (SPACE / card["app_file"]).is_file()
    assert card["license"] == "apache-2.0"
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colors
    assert len(card["title"]) <= 60
    assert len(card["short_description"]) <= 60
    assert re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"])
    import gradio

    assert gradio.__version__.split(".")[0] == card["sdk_version"].split(".")[0]
    assert (SPACE / "requirements.txt").read_text().split() == ["hf_regvit[demo]"]
    assert "REGVIT_MODEL" in text


def test_the_space_runs_the_demo_on_all_addresses(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    ((_, command, environment),) = calls
    assert command[1:4] == ["-m", "hf_regvit", "demo"]
    assert cli.main([*command[3:], "--dry_run", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)
    assert options["compare"] == "facebook/dinov2-with-registers-small"
    monkeypatch.setattr(os, "environ", environment)
    assert launch_options()["server_name"] == "0.0.0.0"
