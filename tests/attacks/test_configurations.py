"""Damaged and hostile configurations of models: each loads as it says, or is refused with a typed error."""

import itertools
import json
import time
from contextlib import suppress

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

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
        started = time.process_time()
        for read in (open_model, convert):
            with suppress(*TYPED):
                read(folder)
        assert time.process_time() - started < 20, changes


@pytest.mark.parametrize(
    ("field", "value"),
    [*itertools.product(["quantization_config"], ["x", [], ["x"], 3]),
     *itertools.product(["hidden_size", "num_attention_heads"], [0, 10**19])],
)  # fmt: skip
@pytest.mark.parametrize("family", ["RegViTModel", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel"])
def test_fields_of_a_wrong_kind_or_size_are_refused(tmp_path, family, field, value):
    folder = save_model(tiny_model() if family == "RegViTModel" else tiny_source(family), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    for read in (open_model, convert):
        with pytest.raises(TYPED):
            read(folder)


SIDES = [
    {"height": 10**9, "width": 10**9}, {"height": -1, "width": 16}, {"height": 16.5, "width": 16},
    {"height": "16", "width": "16"}, {"height": None, "width": None}, {"shortest_edge": 0}, {"shortest_edge": 10**7},
]  # fmt: skip
STATISTICS = [None, [0.5, 0.5], [0.5, 0.5, float("nan")], [[0.5] * 3], ["a", "b", "c"]]
FIELDS = {
    "size": [*SIDES, True, [0.5, 0.5]], "crop_size": [*SIDES, {"shortest_edge": 16}, 10**30], "image_mean": STATISTICS,
    "image_std": [*STATISTICS, [0, 0, 0], [-1, 1, 1]], "rescale_factor": [0, "x", [1], float("inf"), -1],
    "resample": [-1, 99, 10**30], "do_resize": ["x", [], {"a": 1}], "do_normalize": [[1], 3], "do_rescale": ["", {}],
    "device": ["cuda:99", -1, [], "x"],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_fields_of_an_image_processor_with_which_no_image_can_be_made_are_refused_by_name(tmp_path, field, value):
    folder = save_model(tiny_model(), tmp_path / "model")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=rf"{field}|has a (mean|std) of 2 channels"):
        open_model(folder).embed(Image.new("RGB", (20, 24)))


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
