"""Models of a Hub id whose files lie; the Hub is a fake one on this machine."""

import itertools
import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, load_file, save, save_file
from transformers import PreTrainedModel

from builders import save_model, tiny_model, tiny_source
from fake_hub import FakeHub, Repo, _commit, connect
from hf_regvit import CheckpointCorruptError, CheckpointError, ConversionError, RegViTModel, open_model
from hf_regvit.models.loading import open_regvit

pytestmark = pytest.mark.attacks
MAKERS = {"regvit": tiny_model, "dinov2": lambda: tiny_source("Dinov2Model"), "vit": lambda: tiny_source("ViTModel")}
NUMBERS = itertools.count()  # huggingface_hub remembers the commit of a name
READERS = [open_model, open_regvit]  # the second converts what is not a RegViT


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        connect(monkeypatch, hub)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture(params=MAKERS)
def files(request, tmp_path):
    folder = save_model(MAKERS[request.param](), tmp_path / "model")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def serve(hub, files):
    name = f"owner/model-{next(NUMBERS)}"
    hub.repos[name] = Repo(private=False, commits=[_commit("x", files)])
    return name


@pytest.mark.parametrize("read", READERS)
def test_changed_types_of_a_hub_model_are_refused(read, files, hub, tmp_path):
    read(serve(hub, files))
    for kind in (b'"I32"', b'"U32"'):
        header, rest = files["model.safetensors"].split(b"}}", 1)
        changed = header.replace(b'"F32"', kind) + b"}}" + rest
        with pytest.raises(CheckpointError, match=r"model\.safetensors' holds .* expected floating-point"):
            read(serve(hub, files | {"model.safetensors": changed}))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "../../../../outside.safetensors", "OUTSIDE", "x/../y.safetensors"]
)
@pytest.mark.parametrize("read", READERS)
def test_an_index_of_a_hub_model_reads_no_file_of_this_machine(read, name, files, hub, tmp_path):
    state = load_file(tmp_path / "model" / "model.safetensors")
    for place in (tmp_path, tmp_path / "cache", tmp_path / "cache" / "models--owner--x"):
        place.mkdir(parents=True, exist_ok=True)
        save_file(state, place / "outside.safetensors", {"format": "pt"})
    name = str(tmp_path / "outside.safetensors") if name == "OUTSIDE" else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    lying = {key: value for key, value in files.items() if key != "model.safetensors"}
    lying["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises((CheckpointError, ConversionError, OSError)):
        read(serve(hub, lying))


def changed_type(files):
    header, rest = files["model.safetensors"].split(b"}}", 1)
    return files | {"model.safetensors": header.replace(b'"F32"', b'"I32"') + b"}}" + rest}


def rotary_config(files):
    config = json.loads(files["config.json"]) | {"use_position_embeddings": False, "rope_theta": 100.0}
    return files | {"config.json": json.dumps(config).encode()}


OTHER_POSITIONS = r"embeddings\.position_embeddings is in the weights of .*use_position_embeddings=False"


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, changed_type, r"model\.safetensors' holds .* expected floating-point"),
        ({}, rotary_config, OTHER_POSITIONS),
        ({"max_shard_size": "20KB"}, rotary_config, OTHER_POSITIONS),
    ],
)
def test_from_pretrained_checks_the_headers_of_a_hub_model_before_it_reads_the_weights(
    options, change, message, hub, tmp_path, monkeypatch
):
    tiny_model().save_pretrained(tmp_path / "model", **options)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert ("model.safetensors" in files) == (not options)
    RegViTModel.from_pretrained(serve(hub, files))
    name = serve(hub, change(files))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # which creates the model and reads the weights
    with pytest.raises(CheckpointError, match=message):
        RegViTModel.from_pretrained(name)


def test_nan_in_a_hub_model_is_refused(files, hub):
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in load(files["model.safetensors"]).items()}
    with pytest.raises(CheckpointCorruptError, match="NaN"):
        open_model(serve(hub, files | {"model.safetensors": save(state, {"format": "pt"})}))
