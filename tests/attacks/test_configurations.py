"""Damaged and hostile configurations of models: each loads as it says, or is refused with a typed error."""

import json
import time
from contextlib import suppress

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError

from builders import save_model, tiny_model, tiny_source
from hf_regvit import CheckpointError, convert, open_model

pytestmark = pytest.mark.attacks
VALUES = [
    None, True, False, 0, -1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../x", "owner/name",
    "os.system", "1", [], [1], ["x"], [[]], {}, {"a": 1}, {"0": "x"}, {"a": {"b": []}}, "\0", "é" * 1000,
]  # fmt: skip
EXTRA = [
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "quantization_config", "auto_map",
    "num_labels", "id2label", "label2id", "out_features", "out_indices", "return_dict", "model_type", "architectures",
    "transformers_version", "tie_word_embeddings", "problem_type", "vision_config", "register_neurons", "__class__",
    "__init__", "to_dict",
]  # fmt: skip
# ValueError: a family that is not supported. The other errors of Python would name no file.
TYPED = (ValueError, FileNotFoundError, MemoryError)


@pytest.mark.parametrize("family", ["regvit", "dinov2"])
def test_fifty_changed_configurations(tmp_path, family):
    """100 in all, one to three fields each."""
    model = tiny_model() if family == "regvit" else tiny_source("Dinov2Model")
    folder, rng = save_model(model, tmp_path / "model"), np.random.default_rng(list(family.encode()))
    config = json.loads((folder / "config.json").read_text())
    fields = sorted({*config, *EXTRA})
    for _ in range(50):
        chosen = rng.choice(fields, int(rng.integers(1, 4)), replace=False)
        changes = {str(name): VALUES[int(rng.integers(len(VALUES)))] for name in chosen}
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        started = time.perf_counter()
        for read in (open_model, convert):
            with suppress(*TYPED):
                read(folder)
        assert time.perf_counter() - started < 20, changes


TEXTS = [
    "",
    "{",
    "[]",
    "3",
    '"x"',
    "null",
    "[" * 100_000,
    '{"a": ' * 100_000,
    '{"a": ' + "[" * 100_000,
    "\0\1",
    "\udcff",
]


@pytest.mark.parametrize("text", TEXTS, ids=[repr(text[:8]) for text in TEXTS])
def test_texts_that_are_no_configuration_are_named(tmp_path, text):
    folder = save_model(tiny_model(), tmp_path / "model")
    for name in ("config.json", "preprocessor_config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            open_model(folder)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("family", ["ViTModel", "Dinov2Model", "RegViTModel"])
def test_a_configuration_does_not_choose_code_of_the_hub(tmp_path, family, field):
    model = tiny_model() if family == "RegViTModel" else tiny_source(family)
    folder = save_model(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: "owner/name"}))
    for read in (open_model, convert, type(model).from_pretrained if family == "RegViTModel" else open_model):
        with pytest.raises((CheckpointError, StrictDataclassError), match="owner/name"):
            read(folder)
