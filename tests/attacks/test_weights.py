"""Damaged and hostile weights: refused, or loaded with the numbers of the intact file, or explained."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from builders import MakesFolder, save_model, tiny_model, tiny_source
from hf_regvit import CheckpointError, ConversionError, RegViTModel, convert, open_model
from hf_regvit.evaluation.extraction import TokenFeatures, iterate_shards
from hf_regvit.models.loading import open_regvit
from hf_regvit.models.manifest import check_weights, verify_checkpoint, whole_checkpoint
from hf_regvit.models.modeling_regvit import RegViTPreTrainedModel
from tiny_run import same_state

pytestmark = pytest.mark.attacks


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoint without a manifest."""
    return save_model(tiny_model(), tmp_path / "model")


def with_manifest(folder: Path, target: Path) -> Path:
    with whole_checkpoint(target) as staged:
        for path in folder.iterdir():
            (staged / path.name).write_bytes(path.read_bytes())
    return target


def changed_weights(content: bytes, rng: np.random.Generator) -> bytes:
    """Change the header, the numbers or the length of a safetensors file."""
    data, size = bytearray(content), int.from_bytes(content[:8], "little")
    way = int(rng.integers(7))
    if way == 0:  # characters of the header
        for place in rng.integers(8, 8 + size, size=int(rng.integers(1, 4))):
            data[place] = int(rng.integers(32, 127))
    elif way == 1:  # bits of the numbers
        data[int(rng.integers(8 + size, len(data)))] ^= 1 << int(rng.integers(8))
    elif way == 2:  # another type of the same size
        kinds = [b'"I32"', b'"U32"']
        places = [i for i in range(8, 8 + size) if data[i : i + 5] == b'"F32"']
        place = places[int(rng.integers(len(places)))]
        data[place : place + 5] = kinds[int(rng.integers(2))]
    elif way == 3:
        del data[int(rng.integers(len(data))) :]
    elif way == 4:
        data += rng.bytes(int(rng.integers(1, 100)))
    elif way == 5:  # two tensors of one shape change places
        tensors = load(content)
        one, other = rng.choice(
            [name for name in sorted(tensors) if name.startswith("layers.") and name.endswith("norm1.bias")], 2, False
        )
        tensors[one], tensors[other] = tensors[other] + 1, tensors[one] + 1
        return save(tensors, {"format": "pt"})
    else:  # NaN or infinity
        tensors = load(content)
        name = sorted(tensors)[int(rng.integers(len(tensors)))]
        tensors[name].view(-1)[0] = float("nan") if rng.random() < 0.5 else float("inf")
        return save(tensors, {"format": "pt"})
    return bytes(data)


def test_a_hundred_changed_files_of_weights(folder, tmp_path):
    """Without a manifest, changed numbers of a valid file load, as they would after training. With one, none do."""
    whole = (folder / "model.safetensors").read_bytes()
    intact, rng = load(whole), np.random.default_rng(16)
    kept = with_manifest(folder, tmp_path / "kept")
    refused = equal = silent = 0
    for _ in range(100):
        content = changed_weights(whole, rng)
        (folder / "model.safetensors").write_bytes(content)
        try:
            model = open_model(folder).model
        except CheckpointError:
            refused += 1
        else:
            equal += same_state(model.state_dict(), intact)
            if not same_state(model.state_dict(), intact):
                silent += 1
                # Only this explains it: another valid file of the same names, types and shapes, with finite numbers.
                stored = load_file(folder / "model.safetensors")
                assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
                    name: (t.dtype, t.shape) for name, t in load(whole).items()
                }
                assert all(tensor.isfinite().all() for tensor in stored.values())
        (kept / "model.safetensors").write_bytes(content)
        if content != whole:
            with pytest.raises(CheckpointError):
                open_model(kept)
    assert refused + equal + silent == 100
    assert refused >= 50
    assert 5 <= silent <= 40


@pytest.mark.parametrize("part", ["config.json", "preprocessor_config.json", "model-extra.safetensors"])
def test_every_file_that_changes_the_outputs_is_in_the_manifest(folder, tmp_path, part):
    kept = with_manifest(folder, tmp_path / "kept")
    open_model(kept)
    if part == "model-extra.safetensors":
        save_file({"a": torch.zeros(1)}, kept / part)
    else:
        (kept / part).write_text((kept / part).read_text().replace("1", "2", 1))
    with pytest.raises(CheckpointError, match=part):
        open_model(kept)


NAMES = [
    "../outside.bin", "../outside.safetensors", "/OUTSIDE", "x.bin", "", ".", "..", "sub/x.safetensors",
    "./x.safetensors", "a\\b.safetensors", "model.safetensors\0", 3, None, ["x"], {"a": 1}, True, "x.safetensors/..",
    "link.safetensors",
]  # fmt: skip
READERS = [open_model, open_regvit, RegViTModel.from_pretrained, RegViTPreTrainedModel.from_pretrained, convert]


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_an_index_names_only_safetensors_beside_it(folder, tmp_path, name):
    """Every name would lead to weights that fit, so only the look at the name keeps them out."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    torch.save(state, tmp_path / "outside.bin")
    torch.save(state, folder / "x.bin")
    (folder / "sub").mkdir()
    save_file(state, folder / "sub" / "x.safetensors", {"format": "pt"})
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    name = str(tmp_path / "outside.safetensors") if name == "/OUTSIDE" else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in READERS:
        with pytest.raises((CheckpointError, ConversionError)):
            read(folder)


def test_an_index_of_foreign_weights_names_only_files_beside_it(tmp_path):
    folder = save_model(tiny_source("Dinov2Model"), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, tmp_path / "outside.bin")
    torch.save(state, folder / "part.bin")
    for name, is_read in (("../outside.bin", False), (str(tmp_path / "outside.bin"), False), ("part.bin", True)):
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)}))
        for read in (open_model, convert):
            if is_read:
                read(folder)
            else:
                with pytest.raises(CheckpointError, match=r"An index in .* names"):
                    read(folder)


def test_a_snapshot_in_the_cache_of_the_hub_may_hold_links(folder, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    state = load_file(folder / "model.safetensors")
    for path in folder.iterdir():
        name = "part.safetensors" if path.suffix == ".safetensors" else path.name
        (blobs / name).write_bytes(path.read_bytes())
        (snapshot / name).symlink_to(blobs / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "part.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_state(open_model(snapshot).model.state_dict(), state)


def test_an_index_of_features_names_only_files_beside_it(tmp_path):
    part = {"registers": torch.zeros(1, 0, 4), "patches": torch.zeros(1, 4, 4)}
    notes = json.dumps({"grid": [2, 2], "ids": ["a"], "skipped": []})
    (tmp_path / "features").mkdir()
    for path in (tmp_path / "outside.safetensors", tmp_path / "features" / "features-00000.safetensors"):
        save_file(part, path, {"hf_regvit": notes})
    for name, is_read in (
        ("features-00000.safetensors", True), ("../outside.safetensors", False),
        (str(tmp_path / "outside.safetensors"), False), (7, False), ("features-00000.safetensors/../x", False),
    ):  # fmt: skip
        index = {"shards": [{"file": name, "ids": ["a"], "skipped": []}]}
        (tmp_path / "features" / "index.json").write_text(json.dumps(index))
        if is_read:
            assert len(TokenFeatures.load(tmp_path / "features")) == 1
        else:
            with pytest.raises(CheckpointError, match="names"):
                list(iterate_shards(tmp_path / "features"))
    for content in ("[]", "{}", '{"shards": 3}', '{"shards": [3]}', "[" * 100_000):
        (tmp_path / "features" / "index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index\.json"):
            TokenFeatures.load(tmp_path / "features")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", ".."])
def test_a_manifest_names_only_files_inside(folder, tmp_path, name):
    kept = with_manifest(folder, tmp_path / "kept")
    (tmp_path / "outside").write_bytes(b"x")
    manifest = json.loads((kept / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    (kept / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        verify_checkpoint(kept, required=())


@pytest.mark.parametrize("how", ["pickle", "torch", "zip", "deflated"])
def test_pickles_run_no_code_and_give_no_advice(tmp_path, how):
    folder = save_model(tiny_source("Dinov2Model"), tmp_path / "model")
    state, file = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    if how == "pickle":
        file.write_bytes(pickle.dumps({"a": MakesFolder(tmp_path / "ran")}))
    elif how in ("torch", "zip"):
        torch.save({"a": MakesFolder(tmp_path / "ran")}, file, _use_new_zipfile_serialization=how == "zip")
    else:
        torch.save(state, tmp_path / "plain")
        with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    for read in (open_model, convert, lambda _: convert(file)):
        with pytest.raises((CheckpointError, ConversionError)) as caught:
            read(folder)
        assert "weights_only" not in str(caught.value)
        assert "pytorch_model.bin" in str(caught.value) or str(folder) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_manifest_of_another_program_is_ignored(folder):
    (folder / "manifest.json").write_text('{"name": "an app", "icons": []}')
    check_weights(folder)
