"""End-to-end tests of publishing to a fake local Hub: verify in a clean process, upload, load without hf_regvit."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DPTImageProcessor

from builders import save_model, tiny_model
from fake_hub import sha256
from hf_regvit import (
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
)
from hf_regvit.app import cli
from hf_regvit.hub import bundle as hub_module
from hf_regvit.hub.bundle import bundle
from hf_regvit.hub.card import card_snippets
from hf_regvit.hub.upload import send_folder
from hf_regvit.hub.verify import verify
from hf_regvit.models.configuration_regvit import CheckpointError
from hf_regvit.models.processing import default_image_processor

pytestmark = pytest.mark.slow

REPO = "someone/tiny"
# Importing hf_regvit fails, as in an installation without it. Run the card's snippet, and again with a pinned commit.
CLEAN_PROCESS = """
    import importlib.abc, sys

    class Hide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_regvit":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hide())
    import json, torch
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    code, revision = open("snippet.py").read(), sys.argv[1]
    scope = {}
    exec(code, scope)
    tensors = {"newest": scope["output"].last_hidden_state.contiguous()}
    pinned = code.replace("(name", f"(name, revision='{revision}'")
    assert pinned.count(revision) == 2
    exec(pinned, scope)
    tensors["pinned"] = scope["output"].last_hidden_state.contiguous()
    assert type(scope["model"]).__module__.startswith("transformers_modules.")
    save_file(tensors, "tensors.safetensors")
"""


STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
DENSE_PROCESSOR = DPTImageProcessor(size={"height": 32, "width": 40}, do_pad=False, **STATISTICS)


CHECKPOINTS = {
    "RegViTForImageClassification": (
        RegViTForImageClassification, None, {"image-feature-extraction", "image-classification"}
    ),
    "RegViTForSemanticSegmentation": (
        RegViTForSemanticSegmentation, DENSE_PROCESSOR, {"image-feature-extraction", "image-segmentation"}
    ),
    "RegViTForDepthEstimation": (
        RegViTForDepthEstimation, DENSE_PROCESSOR, {"image-feature-extraction", "depth-estimation"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_class_is_verified_by_a_stranger(tmp_path, name, capfd):
    model_class, processor, pipelines = CHECKPOINTS[name]
    registers = 0 if name == "RegViTForImageClassification" else 4
    folder = save_model(
        tiny_model(model_class, num_labels=4, num_register_tokens=registers), tmp_path / "model", processor
    )
    bundle(folder, tmp_path / "bundle", card={"license": "mit"})
    found = verify(tmp_path / "bundle", original=folder)
    assert found.largest_difference <= 1e-5
    assert not found.not_run
    assert {loaded.split(".")[0] for loaded in found.loaded.values()} == {"transformers_modules"}
    assert name in {loaded.split(".")[-1] for loaded in found.loaded.values()}
    compared = {key.split(".", 1)[1] for key in found.compared}
    assert pipelines | {"pixel_values", "AutoModel.last_hidden_state"} <= compared
    assert "LOAD REPORT" not in capfd.readouterr().err  # on the head that AutoModel skips on purpose


def test_a_bundle_of_another_model_is_refused(tmp_path):
    folder = save_model(tiny_model(), tmp_path / "model")
    bundle(folder, tmp_path / "bundle", card={"license": "mit"})
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"differ by up to .* from the original \(tolerance 1e-05\)"):
        verify(tmp_path / "bundle", original=folder)


def test_a_bundle_that_strangers_cannot_load_is_refused(tmp_path, monkeypatch):
    folder = save_model(tiny_model(), tmp_path / "model")
    bundle(folder, tmp_path / "bundle", card={"license": "mit"})
    path = tmp_path / "bundle" / "modeling_regvit.py"
    path.write_text("from hf_regvit import RegViTModel\n" + path.read_text())
    from hf_regvit.models.manifest import write_manifest

    write_manifest(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match=r"modeling_regvit\.py' differs from this version of hf_regvit"):
        verify(tmp_path / "bundle")
    monkeypatch.setattr(hub_module, "CODE_FILES", ())
    with pytest.raises(CheckpointError, match="cannot be loaded without hf_regvit"):
        verify(tmp_path / "bundle")


def load_as_stranger(hub, home: Path, revision: str, *, offline: bool = False) -> dict[str, torch.Tensor]:
    """Run the card's snippet without hf_regvit, against the fake Hub or offline against the cache in `home`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= hub.environment(str(home / "hf")) | {"OMP_NUM_THREADS": "1"}
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLEAN_PROCESS), revision],
        env=environment, cwd=home, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(home / "tensors.safetensors")


def test_publish_then_load_pin_and_go_offline(hub, tmp_path, capsys):
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    hub.fail("/commit/", 503, times=1)
    options = ["--license", "mit", "--repo_id", REPO, "--push", "--json"]
    folder = str(save_model(first, tmp_path / "first"))
    assert cli.main(["publish", "--model", folder, "--output_dir", str(tmp_path / "a"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sent"]["tries"] == 2
    assert report["largest_difference"] <= 1e-5
    folder = str(save_model(second, tmp_path / "second"))
    assert cli.main(["publish", "--model", folder, "--output_dir", str(tmp_path / "b"), *options]) == 0
    assert hub.repos[REPO].private

    home = tmp_path / "home"
    home.mkdir()
    (home / "snippet.py").write_text(card_snippets(hub.files(REPO)["README.md"].decode())[0])
    picture = Image.effect_mandelbrot((60, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    picture.save(home / "image.jpg")
    online = load_as_stranger(hub, home, report["sent"]["commit"])
    requests = len(hub.requests)
    offline = load_as_stranger(hub, home, report["sent"]["commit"], offline=True)
    assert len(hub.requests) == requests
    inputs = default_image_processor(32)(Image.open(home / "image.jpg").convert("RGB"), return_tensors="pt")
    for name, model in (("newest", second), ("pinned", first)):
        with torch.inference_mode():
            expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(online[name], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(offline[name], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(online["newest"], online["pinned"], atol=1e-2)


def test_f65_publish_fails_with_one_line_and_keeps_the_bundle(hub, tmp_path, capsys):
    folder = save_model(tiny_model(), tmp_path / "model")
    arguments = ["publish", "--model", str(folder), "--output_dir", str(tmp_path / "bundle"), "--license", "mit",
                 "--repo_id", REPO, "--push"]  # fmt: skip
    hub.fail("/commit/", 503, times=3)
    assert cli.main(arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "after 3 attempts: 503" in error[0]
    assert len(hub.repos[REPO].commits) == 1
    sent = sum(hub.sent("PUT /lfs"))
    assert cli.main(arguments) == 0  # continues
    assert sum(hub.sent("PUT /lfs")) == sent
    assert len(hub.repos[REPO].commits) == 2


SENDER = """
    import sys
    from hf_regvit.hub.scan import public_files
    from hf_regvit.hub.upload import send_folder

    folder = sys.argv[1]
    send_folder(folder, "someone/tiny", names=[*public_files(folder)], message="first", private=True)
"""


@pytest.fixture
def shards(hub, tmp_path, monkeypatch):
    """Return a function that uploads a bundle of several weights files in a process and kills the process."""
    folder = save_model(tiny_model(), tmp_path / "model")
    made = bundle(folder, tmp_path / "bundle", card={"license": "mit"}, max_shard_size="20KB")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= hub.environment(str(tmp_path / "home"))

    def kill_when(done):
        sender = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SENDER), str(made.folder)],
            env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not done():
            assert sender.poll() is None, sender.stderr.read()
            assert time.monotonic() < deadline, "the upload did not reach the expected state in time"
            time.sleep(0.02)
        sender.kill()
        sender.communicate()
        return made

    return kill_when


def test_f65_after_a_kill_in_the_middle_of_an_upload_only_the_rest_is_sent(hub, shards, tmp_path):
    index = json.loads((tmp_path / "bundle" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) >= 4
    missing = (tmp_path / "bundle" / names[1]).read_bytes()
    hub.fail(f"PUT /lfs/{sha256(missing)}", "silence", times=9, seconds=60.0)
    made = shards(lambda: len(hub.objects) == len(names) - 1 and hub.faults[0].times < 9)
    assert len(hub.repos[REPO].commits) == 1  # a partial push is not visible
    hub.faults.clear()
    hub.requests.clear()
    sent = send_folder(made.folder, REPO, names=made.names, message="second", private=True)
    assert sent.changed
    assert hub.sent("PUT /lfs") == [len(missing)]
    assert [commit.message for commit in hub.repos[REPO].commits] == ["initial commit", "second"]
    assert set(hub.files(REPO)) == {".gitattributes", *made.names}
    for name in made.names:
        assert hub.files(REPO)[name] == (made.folder / name).read_bytes(), name


def test_f65_after_a_kill_while_the_commit_is_made_nothing_is_sent_twice(hub, shards):
    hub.fail("/commit/", "silence", times=1, seconds=60.0, applied=True)
    made = shards(lambda: REPO in hub.repos and len(hub.repos[REPO].commits) == 2)
    hub.faults.clear()
    hub.requests.clear()
    sent = send_folder(made.folder, REPO, names=made.names, message="second", private=True)
    assert (sent.changed, sent.commit) == (False, hub.repos[REPO].commits[-1].oid)
    assert not hub.sent("PUT /lfs")
    assert [commit.message for commit in hub.repos[REPO].commits] == ["initial commit", "first"]
