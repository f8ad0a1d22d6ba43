"""Test the ways to open a model, and what a reader returns for images."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from test_features import WIDE, build
from torch import nn
from transformers import ViTImageProcessor

from builders import class_folder, noise, normal, save_model, tiny_model, tiny_timm
from hf_regvit import (
    FinetuningArguments,
    RegViTConfig,
    RegViTForImageClassification,
    RegViTModel,
    diagnose,
    evaluate_backbone,
    retrofit,
)
from hf_regvit.data.decoding import BadImageError
from hf_regvit.data.loading import load_images
from hf_regvit.evaluation.extraction import extract_features
from hf_regvit.finetuning.model import open_for_task
from hf_regvit.hub.bundle import bundle
from hf_regvit.models.configuration_regvit import CheckpointCorruptError, CheckpointError
from hf_regvit.models.conversion import convert
from hf_regvit.models.families import final_norm
from hf_regvit.models.foreign_weights import first_line
from hf_regvit.models.loading import open_backbone, open_model, open_regvit, weights_fingerprint
from hf_regvit.models.processing import UnknownProcessorError, default_image_processor
from hf_regvit.models.tokens import TokenReader, read_tokens

OTHER = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def processor_of(**changes):
    return ViTImageProcessor(**{"size": {"height": 32, "width": 32}, **OTHER, **changes})


def reader_of(name="regvit", **changes):
    return TokenReader(build(name), processor_of(**changes))


def saved(folder, name="regvit"):
    """Save a model with its processor, and return the model."""
    model = build(name)
    model.save_pretrained(folder)
    processor_of().save_pretrained(folder)
    return model


# --- Reading ---


@pytest.mark.parametrize("name", ["regvit", "regvit_classifier", "deit", "clip", "siglip_vision_model"])
def test_a_reader_reads_what_read_tokens_reads(name):
    model = build(name)
    reader = TokenReader(model)
    assert reader.description.num_layers == 2
    assert reader.family_name == reader.description.family
    expected = TokenReader(model).read_many(normal(2, 3, 32, 32), {"residual": "all", "attention": (-1,)})
    found = reader.read_many(normal(2, 3, 32, 32), {"residual": "all", "attention": (-1,)})
    for site in expected:
        for value, right in zip(found[site].values, expected[site].values, strict=True):
            assert torch.equal(value, right)
    assert torch.equal(reader.read(normal(2, 3, 32, 32), layers=(1,)).at(1), expected["residual"].at(1))
    assert torch.equal(read_tokens(reader, normal(2, 3, 32, 32)).at(2), expected["residual"].at(2))


@pytest.mark.parametrize("name", ["regvit", "regvit_classifier", "deit", "dinov3_vit", "siglip_vision_model"])
def test_embed_is_the_feature_of_extraction(name):
    reader = reader_of(name)
    images = [noise(i, size) for i, size in enumerate([(40, 30), (30, 40), (64, 64)])]
    features = extract_features(reader, images)
    expected = features.patches.mean(1) if features.cls is None else features.cls
    found = reader.embed(images, batch_size=2)
    assert found.shape == (3, 24)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    unit = reader.embed(images, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-6)


@torch.no_grad()
def test_embed_is_the_pooled_output_of_a_dino():
    reader = reader_of("dinov2_with_registers")
    values = reader.transform(noise(0))[None]
    np.testing.assert_allclose(reader.embed(noise(0)), reader.model(values).pooler_output, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, 1, 0])
def test_patch_maps_are_the_normed_patches_in_place(layer):
    reader = reader_of("deit")
    images = [noise(i) for i in range(3)]
    reading = reader.read(torch.stack([reader.transform(image) for image in images]), layers=(layer,))
    expected = final_norm(reader.model)(reading.patches()).detach().unflatten(1, (4, 4))
    found = reader.patch_maps(images, layer=layer, batch_size=2)
    assert found.shape == (3, 4, 4, 24)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_maps_are_rows_of_the_attention():
    reader = reader_of()  # 3 registers
    images = [noise(i) for i in range(3)]
    reading = reader.read(torch.stack([reader.transform(image) for image in images]), site="attention")
    for query, row in (("cls", 0), (("register", 0), 1), (("register", 2), 3), (("patch", 2, 1), 4 + 2 * 4 + 1)):
        found = reader.attention_maps(images, query=query, batch_size=2)
        assert found.shape == (3, 3, 4, 4)
        np.testing.assert_allclose(found.reshape(3, 3, 16), reading.at()[:, :, row, 4:], atol=1e-6)


@pytest.mark.parametrize(
    "query", ["register", ("register", 3), ("register", -1), ("patch", 4, 0), ("patch", 1), "all", ("cls", 1)]
)
def test_queries_that_the_model_does_not_have(query):
    with pytest.raises(ValueError, match=r"no token query=.*CLS \+ 3 registers \+ 4 x 4 patches; expected 'cls', "):
        reader_of().attention_maps(noise(0), query=query)


def test_a_model_without_cls_has_no_query_cls():
    with pytest.raises(ValueError, match=r"no token query='cls'.*no CLS \+ 0 registers"):
        reader_of("siglip_vision_model").attention_maps(noise(0))


def test_sizes_may_differ_in_embed_but_not_in_maps():
    model = build("regvit")
    whole = TokenReader(model, processor_of()).transform_for(keep_aspect=True)
    reader = TokenReader(model, whole)
    images = [noise(0, (64, 32)), noise(1, (64, 32)), noise(2, (32, 64))]
    alone = np.concatenate([reader.embed(image) for image in images])
    np.testing.assert_allclose(reader.embed(images), alone, atol=1e-5)
    assert reader.patch_maps(images[:2]).shape == (2, 4, 8, 24)
    for maps in (reader.patch_maps, reader.attention_maps):
        for batch_size in (1, 8):
            with pytest.raises(ValueError, match=r"32 x 64 and 64 x 32 pixels.*Pass images of one size, or a proc"):
                maps(images, batch_size=batch_size)
    with pytest.raises(ValueError, match="batch_size=0"):
        reader.embed(images, batch_size=0)


def test_values_that_are_not_finite_are_an_error():
    reader = reader_of()
    reader.tower.layers[1].mlp.fc2.bias.data[0] = float("nan")
    for read in (reader.embed, reader.patch_maps):
        with pytest.raises(ValueError, match="NaN or infinity at block 2"):
            read(noise(0))


# --- Kinds of images ---


def test_every_kind_of_image(tmp_path):
    reader = reader_of()
    images = [noise(i) for i in range(2)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).movedim(2, 0) for array in arrays]
    source = load_images(tmp_path, split=None)
    expected = reader.embed(images)
    kinds = {
        "paths": [tmp_path / "0.png", str(tmp_path / "1.png")], "arrays": arrays, "tensors": tensors,
        "floats": [array / 255 for array in arrays], "float tensors": [tensor / 255 for tensor in tensors],
        "bfloat16": [(tensor / 255).to(torch.bfloat16) for tensor in tensors], "batch": np.stack(arrays),
        "batch of tensors": torch.stack(tensors), "source": source, "records": [source[0], source[1]],
        "mixed": (images[0], arrays[1]),
    }  # fmt: skip
    for kind, given in kinds.items():
        found = reader.embed(given)
        np.testing.assert_allclose(found, expected, atol=0.5 if kind == "bfloat16" else 1e-6, err_msg=kind)
    for one in (images[0], tmp_path / "0.png", arrays[0], tensors[0], source[0]):
        np.testing.assert_allclose(reader.embed(one), expected[:1], atol=1e-6)
    grey = np.asarray(images[0].convert("L"))[..., None]
    np.testing.assert_allclose(reader.embed(grey), reader.embed(images[0].convert("L")), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (3, TypeError, "images is a int, expected one image or a sequence of Pillow images, paths"),
        ({"image": 3}, TypeError, "images is a dict"),
        ([noise(0), 3], TypeError, "Image 1 is a int, expected one of Pillow images, paths, arrays"),
        ([], ValueError, "images is empty"),
        (np.zeros((3, 40, 40)), TypeError, r"Image 0 is a ndarray of shape \(3, 40, 40\) and dtype float64"),
        (np.zeros((40, 40), np.uint8), TypeError, r"shape \(40, 40\) and dtype uint8, expected one of Pillow"),
        (torch.zeros(40, 40, 3), TypeError, r"a Tensor of shape \(40, 40, 3\)"),
        (np.zeros((40, 40, 3), np.int64), TypeError, "dtype int64"),
        (torch.full((3, 40, 40), -1.5), ValueError, r"from -1\.5 to -1\.5.*normalized.*reader\.read\(pixel_values\)"),
        (np.full((40, 40, 3), np.nan), ValueError, "from nan to nan"),
        (["nowhere.jpg"], BadImageError, r"nowhere\.jpg"),
    ],
)
def test_what_is_not_an_image(images, error, message):
    for read in (reader_of().embed, reader_of().patch_maps, reader_of().attention_maps):
        with pytest.raises(error, match=message):
            read(images)


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(TypeError, match=r"is a folder, expected an image\. Pass load_images\('"):
        reader_of().embed(tmp_path)


# --- The processor ---


def test_the_processor_is_the_one_of_the_model(tmp_path):
    model = saved(tmp_path)
    expected = processor_of()(images=noise(0), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(open_model(tmp_path).transform(noise(0)), expected)
    assert torch.equal(TokenReader(type(model).from_pretrained(tmp_path)).transform(noise(0)), expected)
    given = default_image_processor(32)
    assert open_model(tmp_path, processor=given).processor is given
    assert open_model(open_model(tmp_path), processor=given).processor is given
    model.image_processor = given
    assert TokenReader(model).processor is given


def test_a_transform_that_cannot_be_saved_with_the_model_is_named_before_anything_is_written(tmp_path):
    model = build("regvit")
    model.image_processor = TokenReader(model, processor_of()).transform
    with pytest.raises(TypeError, match="EvaluationTransform is no image_processor of transformers; use one"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_a_processor_images_are_refused_and_pixels_are_read(tmp_path):
    model = build("regvit")
    model.save_pretrained(tmp_path)
    for reader in (TokenReader(model), open_model(tmp_path), TokenReader(tiny_timm(noise=0.2))):
        assert reader.processor is None
        assert reader.read(normal(2, 3, 32, 32)).grid == (4, 4)
        for read in (reader.embed, reader.patch_maps, reader.attention_maps):
            with pytest.raises(UnknownProcessorError, match=r"No image processor was given.*Pass processor=\.\.\."):
                read(noise(0))
    assert issubclass(UnknownProcessorError, ValueError)


def test_timm_processors_come_from_its_configuration():
    model = tiny_timm(noise=0.2)
    model.pretrained_cfg = {"architecture": "vit", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.testing.assert_close(TokenReader(model).transform(Image.new("RGB", (50, 60), "white")).max().item(), 2.0)


# --- Opening ---


def test_modules_stay_as_they_are():
    model = build("vit").train().to(torch.bfloat16)
    reader = open_model(model)
    assert reader.model is model
    assert model.training
    assert model.dtype == torch.bfloat16
    assert open_model(reader) is reader
    assert open_model(model, dtype=torch.float32).model.dtype == torch.float32
    assert str(reader.device) == "cpu"


def test_wrappers_are_removed():
    model = build("vit")
    expected = read_tokens(model, normal(2, 3, 32, 32)).at(2)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert TokenReader(wrapped).model is model
        assert torch.equal(read_tokens(wrapped, normal(2, 3, 32, 32)).at(2), expected)


def test_run_folders_open_their_backbone(tmp_path, caplog):
    model = saved(tmp_path / "run" / "backbone")
    with caplog.at_level(logging.INFO, "hf_regvit"):
        reader = open_model(tmp_path / "run", device="cpu")
    assert f"'{tmp_path / 'run'}' runs on cpu." in caplog.text
    assert not reader.model.training
    assert torch.equal(reader.read(normal(2, 3, 32, 32)).at(2), read_tokens(model, normal(2, 3, 32, 32)).at(2))
    assert reader.transform.mean == (0.5,) * 3
    assert open_model(str(tmp_path / "run"), dtype=torch.float16).model.dtype == torch.float16


def test_weights_files_are_converted(tmp_path):
    import timm

    arguments = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0, "reg_tokens": 2}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="num_attention_heads"):
        open_model(tmp_path / "weights.pth")


def test_sources_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, and neither has a backbone/ in it\. Pass the"):
        open_model(tmp_path)
    for name in ("a/b/c", "./nope", "weights.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"'{name}' is neither a file nor a folder, nor a Hub id"):
            open_model(name)
    with pytest.raises(FileNotFoundError, match=r"'timm/no_such_vit' cannot be loaded by timm \("):
        open_model("timm/no_such_vit")
    with pytest.raises(TypeError, match=r"source is a dict, expected a folder, a Hub id, timm/NAME, a weights file"):
        open_model({})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' is not valid JSON"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "somebodys"}')
    with pytest.raises(ValueError, match="model_type 'somebodys' is not in the family table"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["regvit", "vit"])
def test_damaged_weights_are_named(name, tmp_path):
    saved(tmp_path, name)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors' cannot be read as safetensors"):
        open_model(tmp_path)


def test_weights_that_differ_from_the_manifest_are_refused(tmp_path):
    saved(tmp_path)
    files = {"model.safetensors": {"sha256": "0" * 64, "size": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointCorruptError, match=r"sha256 of '.*model\.safetensors' differs"):
        open_model(tmp_path)


def test_a_repr_says_what_was_opened():
    assert repr(reader_of("deit")) == (
        "TokenReader(DeiTModel: deit, 2 blocks, width 24, CLS + 0 registers, patches of 8 x 8 pixels, cpu)"
    )


# --- RegViT ---


@pytest.mark.parametrize("name", ["regvit", "regvit_classifier"])
def test_a_regvit_opens_with_its_class(name, tmp_path):
    model = saved(tmp_path / "backbone", name)
    for source in (tmp_path, tmp_path / "backbone", str(tmp_path)):
        found = open_regvit(source)
        assert type(found) is type(model)
        assert TokenReader(found).transform.mean == (0.5,) * 3
    assert open_regvit(model) is model
    assert open_regvit(TokenReader(model)) is model


def test_other_models_are_converted_and_keep_their_processor(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(**WIDE)).save_pretrained(tmp_path)
    processor_of().save_pretrained(tmp_path)
    model = open_regvit(tmp_path)
    assert type(model) is RegViTForImageClassification
    assert TokenReader(model).transform.mean == (0.5,) * 3
    timm_model = tiny_timm(noise=0.2)
    timm_model.pretrained_cfg = {"architecture": "vit", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    assert TokenReader(convert(timm_model)).transform.std == (0.25,) * 3
    assert convert(tiny_timm(noise=0.2)).image_processor is None
    assert RegViTModel(RegViTConfig(**WIDE)).config.hidden_size == 24


# --- Models that images do not fit, and quantized weights ---


@pytest.mark.parametrize("channels", [1, 2, 12])
def test_models_of_other_channels_read_pixels_and_say_so_before_the_first_image(tmp_path, channels):
    folder = str(save_model(tiny_model(num_channels=channels), tmp_path / "m"))
    plain = save_model(tiny_model(num_channels=channels, num_register_tokens=0), tmp_path / "plain")
    images = load_images(class_folder(tmp_path / "data", cat=6, dog=6))
    reader, own = open_model(folder), torch.randn(2, channels, 32, 32)
    assert reader.read(own).at().shape == (2, 21, 32)
    arguments = FinetuningArguments(
        model_name_or_path=folder, data=str(tmp_path / "data"), output_dir=str(tmp_path / "o")
    )
    starts = [
        lambda: reader.embed(noise(0)),
        lambda: diagnose(folder, images),
        lambda: extract_features(reader, images),
        lambda: evaluate_backbone(folder, str(tmp_path / "data")),
        lambda: retrofit(plain, images),
        lambda: open_for_task(arguments, None),
        lambda: open_backbone(folder),
        lambda: bundle(folder, tmp_path / "bundle"),
    ]
    for start in starts:
        with pytest.raises(ValueError, match=rf"reads {channels} channels, but images are opened as RGB.*\.read"):
            start()


class Quantized(torch.Tensor):
    """Tensor without memory of its own, as torchao stores quantized weights."""

    @staticmethod
    def __new__(cls, levels, scale):
        return torch.Tensor._make_wrapper_subclass(cls, levels.shape, dtype=torch.float32)

    def __init__(self, levels, scale):
        self.levels, self.scale = levels, scale

    def __tensor_flatten__(self):
        return ["levels", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "detach" in str(function):
            return cls(args[0].levels, args[0].scale)
        raise NotImplementedError


def test_the_fingerprint_of_quantized_weights_is_that_of_their_parts():
    model = build("regvit")
    found = set()
    for level in (1, 2, 1):
        weight = Quantized(torch.full((72, 24), level, dtype=torch.int8), torch.ones(72))
        model.layers[0].attention.qkv.weight = nn.Parameter(weight, requires_grad=False)
        found.add(weights_fingerprint(model))
    assert len(found) == 2


def test_quantized_checkpoints_are_not_trained_converted_or_published(tmp_path):
    folder = save_model(tiny_model(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    (folder / "config.json").write_text(json.dumps(config))
    for start in (open_regvit, open_backbone, lambda source: bundle(source, tmp_path / "bundle")):
        with pytest.raises(CheckpointError, match=r"quantized \(torchao\).*not trained, converted or published"):
            start(str(folder))


@pytest.mark.parametrize("error", [OSError(), NotImplementedError(), RuntimeError(" \n")])
def test_an_error_without_text_has_its_name(error):
    assert first_line(error) == type(error).__name__
    assert first_line(ValueError("one\ntwo")) == "one"
