"""Tests of checkpoints loaded with `trust_remote_code=True` in a process where hf_regvit is not installed.

A child process in which `import hf_regvit` fails loads every saved folder through the Auto classes and pipelines and
writes its outputs, which the tests compare with those of the saved models. It also saves the models again, and a
second child process does the same with those copies.
"""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
    pipeline,
)

import hf_regvit
from builders import in_fresh_memory, save_model, tiny_model
from hf_regvit import (
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)

CODE_FILES = [
    Path(hf_regvit.__file__).parent / "models" / name for name in ("configuration_regvit.py", "modeling_regvit.py")
]

# Modules of every installation of transformers with torch, limited to those parts of transformers that are stable.
ALLOWED_IMPORTS = {
    "torch", "safetensors", "huggingface_hub.dataclasses", "huggingface_hub.errors", "transformers",
    "transformers.activations", "transformers.backbone_utils", "transformers.masking_utils",
    "transformers.modeling_layers", "transformers.modeling_outputs", "transformers.modeling_utils",
    "transformers.utils",
}  # fmt: skip

AUTO_CLASSES = {
    "model": (RegViTModel, AutoModel),
    "rotary": (RegViTModel, AutoModel),
    "clip": (RegViTModel, AutoModel),
    "classifier": (RegViTForImageClassification, AutoModelForImageClassification),
    "segmenter": (RegViTForSemanticSegmentation, AutoModelForSemanticSegmentation),
    "depth": (RegViTForDepthEstimation, AutoModelForDepthEstimation),
}

FIELDS = {
    "segmenter": {"register_neurons": [[0, 3], [1, 7]]},  # test-time registers
    "rotary": {"use_position_embeddings": False, "rope_theta": 100, "key_bias": False, "use_swiglu_ffn": True,
               "use_cls_token": False, "attention_pooler": True},
    "clip": {"embedding_norm": True, "final_norm": "cls", "projection_dim": 6, "hidden_act": "quick_gelu",
             "layerscale_value": None, "num_register_tokens": 0},
}  # fmt: skip

CHILD = """
    import importlib.abc, json, sys
    from pathlib import Path

    class Hide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_regvit":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hide())
    try:
        import hf_regvit
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("hf_regvit can be imported, so this test would not verify anything")

    import torch, transformers
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import pipeline

    def in_fresh_memory(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.eval()

    transformers.utils.logging.disable_progress_bar()
    source, target, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    image = Image.open(source / "image.png")
    tensors, facts = {}, {}
    trust = {"trust_remote_code": True}
    for name, auto_class in json.loads((source / "auto_classes.json").read_text()).items():
        folder = source / name
        facts[f"{name}.config"] = transformers.AutoConfig.from_pretrained(folder, **trust).to_dict()
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        facts[f"{name}.processor"] = type(processor).__name__
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        for label, loader in (("own", getattr(transformers, auto_class)), ("base", transformers.AutoModel)):
            model = in_fresh_memory(loader.from_pretrained(folder, **trust))
            facts[f"{name}.{label}.class"] = [type(model).__module__, type(model).__name__]
            with torch.inference_mode():
                output = model(pixel_values)
            tensors.update({f"{name}.{label}.{key}": value for key, value in output.items()})
            if label == "own":
                model.save_pretrained(target / name)
                processor.save_pretrained(target / name)
        tensors[f"{name}.pixel_values"] = pixel_values

    folder, find_class = source / "classifier", transformers.dynamic_module_utils.get_class_from_dynamic_module
    backbone = find_class("modeling_regvit.RegViTBackbone", folder).from_pretrained(folder)
    with torch.inference_mode():
        tensors["backbone"] = in_fresh_memory(backbone)(tensors["classifier.pixel_values"]).feature_maps[0]

    options = {"task": "image-feature-extraction", "model": str(folder), **trust}
    features, pooled = pipeline(**options), pipeline(**options, pool=True)
    classes = pipeline("image-classification", model=str(folder), **trust)
    for tool in (features, pooled, classes):
        in_fresh_memory(tool.model)
    tensors["features"] = features(image, return_tensors=True)
    facts["features.list"] = features(image)
    facts["features.pool"] = pooled(image)
    facts["classes"] = classes(image, top_k=3)
    facts["hidden"] = "hf_regvit" not in sys.modules
    whole = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(whole, target / "tensors.safetensors")
    (target / "facts.json").write_text(json.dumps(facts))
"""


PROCESSOR = BitImageProcessor(
    size={"shortest_edge": 40},
    crop_size={"height": 32, "width": 40},
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """Return a folder with one checkpoint per class, an image and a table for the child, and the saved models."""
    folder = tmp_path_factory.mktemp("saved")
    models = {}
    for name, (model_class, _) in AUTO_CLASSES.items():
        models[name] = tiny_model(model_class, num_labels=5, **FIELDS.get(name, {}))
        with torch.no_grad():  # spread registers and gains, so that a token that is not loaded changes the outputs
            for parameter in models[name].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_model(models[name], folder / name, PROCESSOR)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    table = {name: auto_class.__name__ for name, (_, auto_class) in AUTO_CLASSES.items()}
    (folder / "auto_classes.json").write_text(json.dumps(table))
    return folder, models


def run_child(source: Path, target: Path, home: Path) -> dict:
    """Load every checkpoint under `source` without the package; save copies, outputs and facts under `target`."""
    target.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(source), str(target), str(torch.get_num_threads())],
        env=environment, cwd=home, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        "folder": target,
        "home": home,
        "tensors": load_file(target / "tensors.safetensors"),
        "facts": json.loads((target / "facts.json").read_text()),
    }


@pytest.fixture(scope="module")
def stranger(saved, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("stranger")
    (root / "home").mkdir()
    return run_child(saved[0], root / "copies", root / "home")


def expected_tensors(saved, name: str) -> dict[str, torch.Tensor]:
    """Return the outputs of the saved models in this process, under the keys that the child uses."""
    folder, models = saved
    pixel_values = PROCESSOR(Image.open(folder / "image.png"), return_tensors="pt")["pixel_values"]
    base = getattr(models[name], "regvit", models[name])
    expected = {f"{name}.pixel_values": pixel_values}
    with torch.inference_mode():
        for label, model in (("own", models[name]), ("base", base)):
            expected |= {f"{name}.{label}.{key}": value for key, value in model(pixel_values).items()}
    return expected


# --- The files, without a process ------------------------------------------------------------------------------------


def test_saved_folder_is_complete(saved):
    for name in AUTO_CLASSES:
        folder = saved[0] / name
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json", "configuration_regvit.py", "model.safetensors", "modeling_regvit.py",
            "preprocessor_config.json",
        ]  # fmt: skip
        for path in CODE_FILES:
            assert (folder / path.name).read_bytes() == path.read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_regvit.RegViTConfig",
            "AutoModel": "modeling_regvit.RegViTModel",
            "AutoBackbone": "modeling_regvit.RegViTBackbone",
            "AutoModelForImageClassification": "modeling_regvit.RegViTForImageClassification",
            "AutoModelForSemanticSegmentation": "modeling_regvit.RegViTForSemanticSegmentation",
            "AutoModelForDepthEstimation": "modeling_regvit.RegViTForDepthEstimation",
        }
        assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == (
            "BitImageProcessor"
        )


def test_code_files_import_nothing_a_stranger_lacks():
    relative, absolute = [], set()
    for path in CODE_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                relative.append((path.name, node.level, node.module))
            elif isinstance(node, ast.ImportFrom):
                absolute.add(node.module)
            elif isinstance(node, ast.Import):
                absolute |= {alias.name for alias in node.names}
    assert relative == [("modeling_regvit.py", 1, "configuration_regvit")]
    surplus = {name for name in absolute if name.split(".")[0] not in sys.stdlib_module_names} - ALLOWED_IMPORTS
    assert not surplus


def test_code_files_have_one_line_that_reads_as_a_relative_import():
    # The loader of transformers searches the text, including docstrings and comments, for relative imports to fetch.
    pattern = re.compile(r"^\s*(?:import|from)\s+\.\S*.*$", re.MULTILINE)
    found = [line.strip() for path in CODE_FILES for line in pattern.findall(path.read_text())]
    assert [line.partition(" import ")[0] for line in found] == ["from .configuration_regvit"]
    assert "RegViTConfig" in found[0]


def test_code_files_evaluate_annotations():
    # `config: RegViTConfig` must be the class: from_pretrained reads it, and a string would crash it.
    for path in CODE_FILES:
        assert "from __future__ import annotations" not in path.read_text()


# --- Without the package ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_outputs_are_identical_without_the_package(saved, stranger, name):
    # Load each checkpoint through its own class, and also through AutoModel, which ignores the head.
    for key, expected in expected_tensors(saved, name).items():
        assert torch.equal(stranger["tensors"][key], expected), key


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_classes_come_from_the_folder(saved, stranger, name):
    facts = stranger["facts"]
    assert facts["hidden"]
    assert facts[f"{name}.processor"] == "BitImageProcessor"
    for label, model_class in (("own", AUTO_CLASSES[name][0]), ("base", RegViTModel)):
        module, class_name = facts[f"{name}.{label}.class"]
        assert class_name == model_class.__name__
        assert module.startswith("transformers_modules.")
    expected = json.loads(json.dumps(saved[1][name].config.to_dict()))  # JSON has neither tuples nor integer keys
    assert facts[f"{name}.config"] == {**expected, "_name_or_path": str(saved[0] / name)}


@pytest.mark.slow
def test_pipelines_are_identical_without_the_package(saved, stranger):
    folder, models = saved
    image, processor = Image.open(folder / "image.png"), PROCESSOR
    tools = {"model": models["classifier"].regvit, "image_processor": processor}
    features = pipeline("image-feature-extraction", **tools)
    assert torch.equal(stranger["tensors"]["features"], features(image, return_tensors=True))
    assert stranger["tensors"]["features"].shape == (1, 1 + 4 + 4 * 5, 32)
    assert stranger["facts"]["features.list"] == features(image)
    assert stranger["facts"]["features.pool"] == pipeline("image-feature-extraction", **tools, pool=True)(image)
    classes = pipeline("image-classification", model=models["classifier"], image_processor=processor)
    assert stranger["facts"]["classes"] == classes(image, top_k=3)


@pytest.mark.slow
def test_backbone_is_identical_without_the_package(saved, stranger):
    pixel_values = expected_tensors(saved, "classifier")["classifier.pixel_values"]
    with torch.inference_mode():
        patch_tokens = saved[1]["classifier"].regvit(pixel_values).patch_tokens
    assert torch.equal(stranger["tensors"]["backbone"], patch_tokens.transpose(1, 2).unflatten(2, (4, 5)))


@pytest.mark.slow
def test_a_stranger_can_save_again(saved, stranger, tmp_path):
    for name in AUTO_CLASSES:
        for path in CODE_FILES:
            assert (stranger["folder"] / name / path.name).read_bytes() == path.read_bytes()
    for file in ("image.png", "auto_classes.json"):
        (stranger["folder"] / file).write_bytes((saved[0] / file).read_bytes())
    (tmp_path / "home").mkdir()  # an empty HF_HOME, without code from the first load
    again = run_child(stranger["folder"], tmp_path / "copies", tmp_path / "home")
    assert again["tensors"].keys() == stranger["tensors"].keys()
    for key, expected in stranger["tensors"].items():
        assert torch.equal(again["tensors"][key], expected), key
    assert again["facts"]["classes"] == stranger["facts"]["classes"]


# --- With the package ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [None, True], ids=["untrusted", "trusted"])
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_package_classes_win(saved, name, trust):
    folder = saved[0] / name
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is RegViTConfig
    model = AUTO_CLASSES[name][1].from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is AUTO_CLASSES[name][0]
    base = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    assert type(base) is RegViTModel
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert type(processor) is BitImageProcessor
    expected = expected_tensors(saved, name)
    with torch.inference_mode():
        for label, loaded in (("own", model), ("base", base)):
            for key, value in in_fresh_memory(loaded)(expected[f"{name}.pixel_values"]).items():
                assert torch.equal(value, expected[f"{name}.{label}.{key}"]), key


def test_backbone_loads_from_any_folder(saved):
    pixel_values = expected_tensors(saved, "classifier")["classifier.pixel_values"]
    for loader in (RegViTBackbone, AutoBackbone):
        backbone = in_fresh_memory(loader.from_pretrained(saved[0] / "classifier"))
        with torch.inference_mode():
            (feature_map,) = backbone(pixel_values).feature_maps
            patch_tokens = saved[1]["classifier"].regvit(pixel_values).patch_tokens
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), patch_tokens)
