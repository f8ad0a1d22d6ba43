"""Makes the common test suite of the installed transformers importable from outside its source tree.

`scripts/dev/get_hf_common_tests.py` has put its `tests/` folder into `.cache/hf_common/`. The source distribution
lacks what those files import relatively (exporters, generation, configuration constants, one module per pipeline); the
stand-ins are here and in `pipeline_checks.py`. Three things more are patched, each only for the time it is needed: the
mixins import transformers a second time by path, they read a list of tiny models of the Hub at import, and they look
up by class name, in the static tables of transformers, which class wants labels.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pipeline_checks
import pytest
import transformers
from transformers.models.auto import modeling_auto

import hf_regvit

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / ".cache" / "hf_common" / f"transformers-{transformers.__version__}" / "tests"
PACKAGE = "hf_tests"  # the name under which the suite is imported

MODEL_CLASSES = (
    hf_regvit.RegViTModel,
    hf_regvit.RegViTForImageClassification,
    hf_regvit.RegViTForSemanticSegmentation,
    hf_regvit.RegViTForDepthEstimation,
    hf_regvit.RegViTBackbone,
)

NAME_TABLES = {
    "MODEL_MAPPING_NAMES": "RegViTModel",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "RegViTBackbone",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "RegViTForImageClassification",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": "RegViTForSemanticSegmentation",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES": "RegViTForDepthEstimation",
}

PIPELINES = {
    "image-feature-extraction": hf_regvit.RegViTModel,
    "image-classification": hf_regvit.RegViTForImageClassification,
}

# Values that the common configuration fields do not have by default; the configuration tests set and read them back.
CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["RegViTModel"],
    "id2label": {0: "cat", 1: "dog"},
    "label2id": {"cat": 0, "dog": 1},
    "problem_type": "regression",
}


def stop_without_suite() -> None:
    """Skip the calling module with a reason where the suite was not fetched; fail where CI forgot to."""
    if (SUITE / "test_modeling_common.py").is_file():
        return
    reason = f"{SUITE.relative_to(ROOT)} is absent: run `python scripts/dev/get_hf_common_tests.py` first"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def import_suite(tiny_models: Path) -> types.SimpleNamespace:
    """Import the mixins; `tiny_models` is a folder that `save_tiny_models` fills before the pipeline tests run."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(SUITE)]
    sys.modules[PACKAGE] = package
    stand_ins = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_VALUES},
    }
    # Up to transformers 5.15 or so the modules of all pipelines are imported at once, later by name when a test runs.
    text = (SUITE / "test_pipeline_mixin.py").read_text()
    for module_name, class_name in re.findall(r"^from \.(pipelines\.\w+) import (\w+)$", text, re.MULTILINE):
        stand_ins[module_name] = {class_name: type(class_name, (), {})}
    for name, content in stand_ins.items():
        module = types.ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module

    (tiny_models / "reports").mkdir()
    summary = {
        model_class.__name__: {
            "tokenizer_classes": [],
            "processor_classes": ["BitImageProcessor", "BitImageProcessorPil"],
            "model_classes": [model_class.__name__],
        }
        for model_class in PIPELINES.values()
    }
    (tiny_models / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))

    names = ("test_modeling_common", "test_backbone_common", "test_configuration_common", "test_pipeline_mixin")
    with (
        # A second copy of transformers would have second copies of every class.
        mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
        mock.patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": str(tiny_models)}),
    ):
        modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    for task, checks in pipeline_checks.CHECKS.items():
        entry = modules[3].pipeline_test_mapping[task]
        by_name = isinstance(entry["test"], str)
        entry["test"] = f"{checks.__module__}.{checks.__name__}" if by_name else checks
    return types.SimpleNamespace(
        ModelTesterMixin=modules[0].ModelTesterMixin,
        BackboneTesterMixin=modules[1].BackboneTesterMixin,
        ConfigTester=modules[2].ConfigTester,
        PipelineTesterMixin=modules[3].PipelineTesterMixin,
    )


@contextlib.contextmanager
def registered_by_name() -> Iterator[None]:
    """Our class names in the static tables. Other tests must see transformers as a user does, hence not for ever."""
    with contextlib.ExitStack() as stack:
        for table, name in NAME_TABLES.items():
            stack.enter_context(mock.patch.dict(getattr(modeling_auto, table), {"regvit": name}))
        yield


def save_tiny_models(folder: Path, config: hf_regvit.RegViTConfig) -> None:
    """One model and processor per pipeline, where the pipeline tests look for them."""
    height, width = config.image_shape
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    for model_class in PIPELINES.values():
        target = folder / "regvit" / model_class.__name__
        model_class(config).save_pretrained(target)
        processor.save_pretrained(target)
