"""Test invalid input to the model and to conversion, one test per row of the fault table (ids F22 to F53).

Every fault must raise an error that names the file and the value, before memory is allocated, and must never leave a
tensor randomly initialized.
"""

import argparse
import json
import logging
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from builders import MakesFolder, dinov2_state, tiny_model
from hf_regvit import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    ImageTooSmallError,
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)
from hf_regvit.models import modeling_regvit as modeling
from hf_regvit.models.conversion import convert
from hf_regvit.models.source_families import ConversionError

CLASSES = [
    RegViTModel,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTForDepthEstimation,
    RegViTBackbone,
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Save a checkpoint of a backbone with 4 registers."""
    tiny_model(image_size=16, num_labels=5).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# --- Images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(60, 57, "64 x 56"), (16, 17, "16 x 16"), (9, 16, "8 x 16"), (31, 8, "32 x 8")],
)
def test_f22_size_that_is_no_multiple_of_the_patch(cls, height, width, nearest):
    model = tiny_model(cls, image_size=16, num_labels=5)
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels.*patch size of 8 x 8.*{nearest}") as error:
        model(torch.zeros(1, 3, height, width))
    assert "pixel_mask" in str(error.value)
    rows, columns = (int(side) for side in nearest.split(" x "))
    model.eval()(torch.zeros(1, 3, rows, columns))  # the advice works


def test_f22_padded_image_that_is_no_multiple_of_the_patch():
    mask = torch.zeros(1, 16, 16)
    mask[:, :12, :16] = 1
    with pytest.raises(ValueError, match=r"12 x 16 pixels.*16 x 16"):
        tiny_model(image_size=16, num_labels=5)(torch.zeros(1, 3, 16, 16), pixel_mask=mask)


def test_f22_mask_that_is_no_rectangle_in_the_top_left_corner():
    hole, elsewhere = torch.ones(1, 16, 16), torch.zeros(1, 16, 16)
    hole[:, 8:, 8:] = 0
    elsewhere[:, 8:, 8:] = 1
    for mask, error in ((hole, "top left corner"), (elsewhere, "top left corner|0 x 0 pixels")):
        with pytest.raises(ValueError, match=error):
            tiny_model(image_size=16, num_labels=5)(torch.zeros(1, 3, 16, 16), pixel_mask=mask)


@pytest.mark.parametrize("shape", [(1, 16, 24), (2, 16, 16), (1, 4), (1, 3, 16, 16)])
def test_f22_mask_of_another_shape(shape):
    with pytest.raises(ValueError, match=rf"pixel_mask has shape \({', '.join(map(str, shape))}\).*\(1, 16, 16\)"):
        tiny_model(image_size=16, num_labels=5)(torch.zeros(1, 3, 16, 16), pixel_mask=torch.ones(shape))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("height", "width"), [(7, 16), (16, 4), (1, 1)])
def test_f23_image_smaller_than_a_patch(cls, height, width):
    with pytest.raises(ImageTooSmallError, match=rf"{height} x {width} pixels.*8 x 8.*at least 8 x 8"):
        tiny_model(cls, image_size=16, num_labels=5)(torch.zeros(1, 3, height, width))


def test_f23_padded_image_smaller_than_a_patch():
    with pytest.raises(ImageTooSmallError, match=r"0 x 0 pixels"):
        tiny_model(image_size=16, num_labels=5)(torch.zeros(1, 3, 16, 16), pixel_mask=torch.zeros(1, 16, 16))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16), (1, 16, 16, 3)])
def test_f24_wrong_channel_count(cls, shape):
    with pytest.raises(ValueError, match=r"shape \(" + ", ".join(map(str, shape))) as error:
        tiny_model(cls, image_size=16, num_labels=5)(torch.zeros(shape))
    assert "(batch, 3, height, width)" in str(error.value)
    assert "num_channels" in str(error.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_pixels_at_all(cls):
    with pytest.raises(ValueError, match="pixel_values is missing"):
        tiny_model(cls, image_size=16, num_labels=5)()


# --- Weights ---------------------------------------------------------------------------------------------------------


def with_changed_header(raw: bytes, change: Callable[[dict], None]) -> bytes:
    """Change the entries of the header of a safetensors file."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


DAMAGES = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:4],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-100],
    "no JSON": lambda raw: raw[:8] + b"x" * 200 + raw[208:],
    "huge length": lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    "overlap": lambda raw: with_changed_header(
        raw, lambda header: header["layernorm.bias"].update(data_offsets=header["layernorm.weight"]["data_offsets"])
    ),
    "wrong shape": lambda raw: with_changed_header(raw, lambda header: header["layernorm.bias"].update(shape=[33])),
    "unknown type": lambda raw: with_changed_header(raw, lambda header: header["layernorm.bias"].update(dtype="F33")),
    "pickle renamed": lambda raw: pickle.dumps({"layernorm.bias": [0.0] * 32}),
    "surplus bytes": lambda raw: raw + b"\0" * 64,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_f42_broken_safetensors(damage, folder):
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    for load in (RegViTModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointCorruptError) as error:
            load(folder)
        assert f"'{file}' cannot be read as safetensors" in str(error.value)


def test_f42_broken_shard_is_named(tmp_path):
    tiny_model(image_size=16, num_labels=5).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    with pytest.raises(CheckpointCorruptError, match=shards[1].name):
        RegViTModel.from_pretrained(tmp_path)


def test_f42_missing_shard_is_named(tmp_path):
    tiny_model(image_size=16, num_labels=5).save_pretrained(tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(OSError, match=lost.name):
        RegViTModel.from_pretrained(tmp_path)


def test_f42_renamed_file_and_no_file(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(OSError, match=r"no file named model\.safetensors.*checkpoint"):
        RegViTModel.from_pretrained(folder)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("forgiving", [False, True])
def test_f44_missing_registers_are_never_drawn_at_random(cls, forgiving, tmp_path):
    tiny_model(cls, image_size=16, num_labels=5).save_pretrained(tmp_path)
    prefix = "" if cls is RegViTModel else "regvit."
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{prefix}embeddings.register_tokens"))
    with pytest.raises(CheckpointError) as error:
        cls.from_pretrained(tmp_path, ignore_mismatched_sizes=forgiving)
    assert str(tmp_path) in str(error.value)
    assert "num_register_tokens=4, but the checkpoint has no register tokens" in str(error.value)
    assert "resize_register_tokens" in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["embeddings.cls_token", "embeddings.position_embeddings", "layers.1.layer_scale2.lambda1", "layernorm.bias"],
)
def test_f44_any_other_missing_tensor_is_named(key, folder):
    rewrite(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"{key} is missing"):
        RegViTModel.from_pretrained(folder)


def test_f44_renamed_tensor_is_named_twice(folder):
    rewrite(folder, lambda tensors: tensors.update({"layers.0.norm1.gamma": tensors.pop("layers.0.norm1.weight")}))
    with pytest.raises(CheckpointError, match=r"norm1\.weight is missing.*norm1\.gamma is in the checkpoint"):
        RegViTModel.from_pretrained(folder)


def test_f44_surplus_tensor_is_named(folder):
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+ is in the checkpoint but not in the model"):
        RegViTModel.from_pretrained(folder, num_hidden_layers=1)


def test_f44_advice_for_missing_registers_works(folder):
    rewrite(folder, lambda tensors: tensors.pop("embeddings.register_tokens"))
    model = RegViTModel.from_pretrained(folder, num_register_tokens=0).resize_register_tokens(4)
    assert model(torch.zeros(1, 3, 16, 16)).register_tokens.shape == (1, 4, 32)


@pytest.mark.parametrize("cls", [RegViTModel, RegViTForImageClassification, AutoModel])
@pytest.mark.parametrize("forgiving", [False, True])
@pytest.mark.parametrize("wanted", [1, 8])
def test_f45_wrong_number_of_registers(cls, forgiving, wanted, folder):
    with pytest.raises(CheckpointError) as error:
        cls.from_pretrained(folder, num_register_tokens=wanted, ignore_mismatched_sizes=forgiving)
    assert f"num_register_tokens={wanted}, but the checkpoint has 4" in str(error.value)
    assert "resize_register_tokens(n)" in str(error.value)
    assert str(folder) in str(error.value)


def test_f45_wrong_number_in_the_file_itself(folder):
    rewrite_config(folder, num_register_tokens=2)
    with pytest.raises(CheckpointError, match="num_register_tokens=2, but the checkpoint has 4"):
        RegViTModel.from_pretrained(folder)


@pytest.mark.parametrize("wanted", [-1, 5000])
def test_f45_impossible_resize_leaves_the_model_as_it_was(wanted):
    model = tiny_model(image_size=16, num_labels=5).eval()
    before = model(torch.zeros(1, 3, 16, 16)).last_hidden_state
    with pytest.raises(ConfigError, match=f"num_register_tokens={wanted}"):
        model.resize_register_tokens(wanted)
    assert model.config.num_register_tokens == 4
    assert torch.equal(model(torch.zeros(1, 3, 16, 16)).last_hidden_state, before)


def test_f45_other_sizes_that_do_not_match(folder):
    with pytest.raises(CheckpointError, match=r"position_embeddings.*\(1, 5, 32\).*\(1, 17, 32\).*image_size"):
        RegViTModel.from_pretrained(folder, image_size=32, ignore_mismatched_sizes=True)


def test_f45_head_of_another_size_is_started_anew_only_on_request(tmp_path):
    tiny_model(RegViTForImageClassification, image_size=16, num_labels=5).save_pretrained(tmp_path)
    rewrite_config(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(
        CheckpointError, match=r"classifier\.weight.*\(5, 64\).*\(2, 64\).*ignore_mismatched_sizes=True"
    ):
        RegViTForImageClassification.from_pretrained(tmp_path)
    model = RegViTForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (2, 64)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, saved[name])


@pytest.mark.parametrize("cls", CLASSES)
def test_f46_registers_into_a_model_without(cls, tmp_path):
    tiny_model(cls, image_size=16, num_labels=5).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="num_register_tokens=0, but the checkpoint has register tokens"):
        cls.from_pretrained(tmp_path, num_register_tokens=0)


@pytest.mark.parametrize("wanted", [0, 2, 8])
def test_f46_conversion_keeps_the_registers_it_finds(wanted):
    with pytest.raises(ConversionError, match="register_tokens"):
        convert(OFFICIAL, num_register_tokens=wanted, **HOW_IT_RUNS)


def test_f44_conversion_never_draws_registers_at_random(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, num_register_tokens=3
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("embeddings.register_tokens"))
    with pytest.raises((ConversionError, CheckpointError), match="register"):
        convert(tmp_path)
    state = {name: tensor for name, tensor in OFFICIAL.items() if name != "register_tokens"}
    with pytest.raises(ConversionError, match="register_tokens"):
        convert(state, num_register_tokens=4, **HOW_IT_RUNS)


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_f42_cut_pickle(keep, tmp_path):
    torch.save(OFFICIAL, tmp_path / "run.pth")
    (tmp_path / "run.pth").write_bytes((tmp_path / "run.pth").read_bytes()[:keep])
    with pytest.raises(CheckpointCorruptError, match=r"run\.pth"):
        convert(tmp_path / "run.pth", **HOW_IT_RUNS)


# --- Pickles ---------------------------------------------------------------------------------------------------------

OFFICIAL = dinov2_state(registers=4, depth=1, patches=4)
HOW_IT_RUNS = {
    "num_attention_heads": 2, "layer_norm_eps": 1e-6, "interpolate_antialias": True, "interpolate_offset": 0.0,
    "verify": False,
}  # fmt: skip


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_f48_malicious_pickle_is_not_run_by_conversion(form, tmp_path):
    content = {**OFFICIAL, "epoch": MakesFolder(tmp_path / "owned")}
    file = tmp_path / "weights.pth"
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointCorruptError, match=r"weights\.pth.*never runs code") as error:
        convert(file, **HOW_IT_RUNS)
    assert "weights_only" not in str(error.value)  # must not advise to disable the protection
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("load", [RegViTModel.from_pretrained, AutoModel.from_pretrained, convert])
def test_f48_malicious_pickle_in_a_checkpoint_is_not_even_opened(load, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"layernorm.bias": MakesFolder(tmp_path / "owned")}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ConversionError), match="checkpoint"):
        load(folder)
    assert not (tmp_path / "owned").exists()


def test_f48_harmless_pickle_is_no_checkpoint_of_ours_either(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        RegViTModel.from_pretrained(folder)


def test_f49_the_command_line_of_a_training_run_is_inert(tmp_path):
    torch.save({"model": OFFICIAL, "args": argparse.Namespace(lr=0.1)}, tmp_path / "run.pth")
    model = convert(tmp_path / "run.pth", **HOW_IT_RUNS)
    assert torch.equal(model.embeddings.register_tokens, OFFICIAL["register_tokens"])


def test_f49_other_types_are_refused_with_what_to_do(tmp_path):
    torch.save({"model": OFFICIAL, "score": np.float64(0.5)}, tmp_path / "run.pth")
    with pytest.raises(CheckpointCorruptError, match=r"run\.pth.*save its tensors as safetensors"):
        convert(tmp_path / "run.pth", **HOW_IT_RUNS)


# --- Configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 100_000}, "hidden_size=100000"),
        ({"hidden_size": 65536, "num_hidden_layers": 200, "num_attention_heads": 1}, "hidden_size=65536"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"num_register_tokens": -4}, "num_register_tokens=-4"),
        ({"pooling": "registers"}, "pooling='registers'"),
    ],
)
def test_f50_absurd_config_on_disk_or_as_override(fields, named, folder):
    for load in (RegViTModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ConfigError, match=named):
            load(folder, **fields)
    rewrite_config(folder, **fields)
    for load in (RegViTConfig.from_pretrained, RegViTModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ConfigError, match=named):
            load(folder)


def test_f50_model_larger_than_the_machine_is_refused_before_it_is_built(monkeypatch):
    config = RegViTConfig.from_preset("small")  # 22 M parameters, 0.08 GiB
    monkeypatch.setattr(modeling.os, "sysconf", {"SC_PHYS_PAGES": 10_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    built = []
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda self, *args, **kwargs: built.append(args))
    with pytest.raises(MemoryError, match=r"hidden_size=384.*num_hidden_layers=12.*GiB.*meta"):
        RegViTModel(config)
    assert built == []


def test_f50_model_larger_than_the_machine_may_be_built_on_meta(monkeypatch):
    monkeypatch.setattr(modeling.os, "sysconf", {"SC_PHYS_PAGES": 10_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    with torch.device("meta"):
        assert RegViTModel(RegViTConfig.from_preset("small")).layernorm.weight.is_meta


def peak_kib():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def test_f50_weights_that_do_not_fit_are_refused_before_memory_is_spent(folder):
    """Check that a config of 403 M parameters with weights of 0.03 M does not allocate 1.6 GB first."""
    rewrite_config(folder, hidden_size=2048, num_hidden_layers=8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again; that of earlier tests would hide this one
    before = peak_kib()
    with pytest.raises(CheckpointError, match="does not fit RegViTModel"):
        RegViTModel.from_pretrained(folder)
    assert peak_kib() - before < 300 * 1024


def test_f51_code_in_the_repository_is_never_needed_and_never_run(tmp_path):
    tiny_model(RegViTForImageClassification, image_size=16, num_labels=5).save_pretrained(tmp_path / "repo")
    for name in ("modeling_regvit.py", "configuration_regvit.py"):
        assert (tmp_path / "repo" / name).is_file()
        (tmp_path / "repo" / name).write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})\n")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "repo")  # works without trust_remote_code
    assert type(model) is RegViTForImageClassification
    assert type(AutoModel.from_pretrained(tmp_path / "repo")) is RegViTModel
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'\xff\xfe{"model_type": "regvit"}', r"not UTF-8 text \(byte 0\)"),
        (b"[1, 2]", "holds a list"),
        (b'"regvit"', "holds a str"),
        (b"", r"line 1: not valid JSON"),
        (b'{"model_type": "regvit",\n "hidden_size": 32,\n', r"line 3: not valid JSON"),
        (b'{"a": "' + b"x" * (17 * 2**20) + b'"}', r"17,825,801 bytes.*16,777,216"),
    ],
    ids=["encoding", "list", "text", "empty", "cut", "huge"],
)
def test_f52_broken_config_file(content, reason, folder):
    (folder / "config.json").write_bytes(content)
    for load in (RegViTConfig.from_pretrained, RegViTModel.from_pretrained):
        with pytest.raises(ConfigError, match=rf"config\.json'.*{reason}"):
            load(folder)
    with pytest.raises((OSError, ValueError, TypeError)):  # the message of transformers depends on its version
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [b'\xff\xfe{"model_type": "dinov2"}', b"[1, 2]", b"", b'{"model_type": "dinov2"'])
def test_f52_broken_config_file_of_a_source(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(folder)


def test_f53_checkpoint_of_a_newer_version_loads_and_says_so(folder, caplog):
    rewrite_config(folder, hf_regvit_version="9.1.0", field_of_the_future=1)
    with caplog.at_level(logging.WARNING):
        model = RegViTModel.from_pretrained(folder)
    text = caplog.text
    assert "saved by hf_regvit 9.1.0" in text
    assert "field_of_the_future" in text
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
