"""The public names of the package: the frozen list, what tools see of it, and the lines that a user would guess."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTImageProcessor, pipeline

import hf_regvit
from builders import noise

# Adding a name is a promise to keep it; removing one breaks the code of users. Both are decisions for the CHANGELOG.
NAMES = """
    ArtifactReport CheckpointCorruptError CheckpointError ConfigError ConversionError EvaluationReport
    EvaluationTable ExportError ExportReport ExportedModel FeatureSettings FinetuningArguments ImageTooSmallError
    PretrainingArguments RegViTBackbone RegViTConfig RegViTForDepthEstimation RegViTForImageClassification
    RegViTForSemanticSegmentation RegViTModel RegViTModelOutput RegisterNeurons RetrofitError RetrofitResult
    TokenFeatures TokenReader TokenReading UnknownProcessorError __version__ add_test_time_registers check_data
    choose_features compare_backbones convert convert_back diagnose discover_objects embed evaluate_backbone export
    extract_features find_register_neurons finetune knn_classify load_exported load_images open_model patch_maps
    pretrain publish read_tokens remove_position repair_in_place
    retrofit
"""

ORDINARY_USE = """
import numpy as np
import torch
from PIL import Image
import hf_regvit
from hf_regvit import TokenReader, convert, embed, open_model, patch_maps, read_tokens

reader: TokenReader = open_model("facebook/dinov2-small", device="cpu", dtype=torch.float32)
features: np.ndarray = reader.embed([Image.new("RGB", (64, 64)), "a.jpg"], normalize=True)
same: np.ndarray = embed("facebook/dinov2-small", "a.jpg", batch_size=8)
maps: np.ndarray = patch_maps(reader, hf_regvit.load_images("photos"), layer=-1)
attention: np.ndarray = reader.attention_maps("a.jpg", query=("register", 0))
tokens = read_tokens(reader, torch.zeros(1, 3, 224, 224), layers="all", site="residual")
norms = [tokens.patches(layer).norm(dim=-1) for layer in tokens.layers]
model = convert("facebook/dinov2-small", verify=False)
config: hf_regvit.RegViTConfig = hf_regvit.RegViTConfig.from_preset("small")
arguments = hf_regvit.PretrainingArguments(output_dir="run")
"""


def test_the_names_are_frozen():
    assert sorted(hf_regvit.__all__) == sorted(NAMES.split())


def test_every_name_exists_and_is_listed():
    assert set(hf_regvit.__all__) <= set(dir(hf_regvit))
    for name in hf_regvit.__all__:
        assert getattr(hf_regvit, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        hf_regvit.no_such_name  # noqa: B018


@pytest.mark.slow
def test_ordinary_use_is_typed(tmp_path):
    (tmp_path / "use.py").write_text(ORDINARY_USE)
    (tmp_path / "wrong.py").write_text(
        "import hf_regvit\nhf_regvit.open_model('a', divice='cpu')\nhf_regvit.no_such_name\n"
    )
    root = Path(__file__).parents[1]  # `make check` has read the types of torch, which takes a minute, into this cache
    options = ["--config-file", root / "pyproject.toml", "--cache-dir", root / ".mypy_cache"]
    found = {
        name: subprocess.run(
            [sys.executable, "-m", "mypy", *options, name], cwd=tmp_path, capture_output=True, text=True
        ).stdout
        for name in ("use.py", "wrong.py")
    }
    assert "Success: no issues found" in found["use.py"], found["use.py"]
    assert 'Unexpected keyword argument "divice" for "open_model"' in found["wrong.py"], found["wrong.py"]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Save a tiny DINOv2 with its processor, as it would be on the Hub."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
        folder
    )
    return str(folder)


IMAGES = [noise(seed) for seed in range(3)]


def test_the_lines_that_one_would_guess(name, tmp_path):
    reader = hf_regvit.open_model(name)
    features = reader.embed(IMAGES)
    assert features.shape == (3, 24)
    np.testing.assert_allclose(hf_regvit.embed(name, IMAGES), features, atol=1e-6)
    np.testing.assert_allclose(hf_regvit.embed(reader.model, IMAGES), features, atol=1e-6)
    assert hf_regvit.patch_maps(name, IMAGES).shape == (3, 4, 4, 24)
    assert reader.attention_maps(IMAGES, query="cls").shape == (3, 3, 4, 4)
    assert reader.attention_maps(IMAGES, query=("register", 0)).shape == (3, 3, 4, 4)
    pixels = torch.stack([reader.transform(image) for image in IMAGES])
    reading = hf_regvit.read_tokens(name, pixels)
    np.testing.assert_allclose(reader.final_norm(reading.cls()).detach(), features, atol=1e-5)
    assert repr(reading) == "TokenReading(residual of block 2, 3 images, CLS + 2 registers + 4 x 4 patches)"
    # The converted model has the same features, and its folder is enough for a pipeline.
    model = hf_regvit.convert(name)
    np.testing.assert_allclose(hf_regvit.embed(model, IMAGES), features, atol=1e-5)
    model.save_pretrained(tmp_path)
    found = pipeline("image-feature-extraction", model=str(tmp_path))(IMAGES[0])
    np.testing.assert_allclose(np.array(found)[0, 0], features[0], atol=1e-4)


def test_a_plain_vit_says_what_to_use(name, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(**sizes, intermediate_size=48)).save_pretrained(tmp_path)
    for cls in (hf_regvit.RegViTModel, hf_regvit.RegViTForImageClassification, hf_regvit.RegViTConfig):
        with pytest.raises(ValueError, match=r"this is a `vit`; use convert, e\.g\. hf_regvit\.convert") as error:
            cls.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value).splitlines()[0]
    with pytest.raises(ValueError, match=r"this is a `dinov2_with_registers`; use convert"):
        hf_regvit.RegViTModel.from_pretrained(name)


def test_conversion_says_how_registers_are_added(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    with pytest.raises(
        ValueError, match=r"num_register_tokens=4, but .* has no registers.*resize_register_tokens\(4\)"
    ):
        hf_regvit.convert(model, num_register_tokens=4)
    assert hf_regvit.convert(model).resize_register_tokens(4).config.num_register_tokens == 4
