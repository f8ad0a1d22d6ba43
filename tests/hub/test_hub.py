"""Tests of the files that may be published, the contents of a bundle, and retries of a push."""

import json
import logging
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from PIL import Image, PngImagePlugin

import fake_hub
import hf_regvit.hub.publish as publishing
from builders import save_model, tiny_model, tiny_source
from fake_hub import OWNER, READ_TOKEN, WRITE_TOKEN
from hf_regvit import CheckpointCorruptError, RegViTForImageClassification
from hf_regvit.hub.bundle import bundle, read_bundle
from hf_regvit.hub.card import CardError, card_header
from hf_regvit.hub.publish import publish
from hf_regvit.hub.scan import PrivateContentError, may_be_published, scan
from hf_regvit.hub.upload import (
    BackgroundPushes,
    PermanentPushError,
    PushError,
    RetryPolicy,
    send_folder,
    with_retries,
)
from hf_regvit.models.configuration_regvit import CheckpointError
from hf_regvit.models.loading import checkpoint_folder, open_model
from hf_regvit.models.processing import default_image_processor

QUICK = RetryPolicy(attempts=3, first_wait=0.01, longest_wait=1.0, timeout=1.0)
SECRET = "hf_" + "A1b2" * 9
HOME = "/" + "home/someone/secret"  # in two parts, because this file is scanned as well
CARD = {"license": "mit"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = tiny_model(RegViTForImageClassification, id2label={0: "cat", 1: "dog"})
    return save_model(model, tmp_path_factory.mktemp("checkpoint"))


# --- What may be published


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json",
     "README.md", "modeling_regvit.py", "figures/curves.png", "reports/artifacts.json", "recipe.yaml"],
)  # fmt: skip
def test_files_of_a_model_may_be_published(name):
    assert may_be_published(name)


@pytest.mark.parametrize(
    "name",
    ["training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "pytorch_model.bin", "other.py", ".env",
     "trainer_state.json", "figures/notes.txt", "reports/training_args.bin", "figures/a/b.png", "token",
     "model.safetensors.bak", "checkpoint-2/model.safetensors", "resolved_recipe.yaml"],
)  # fmt: skip
def test_everything_else_stays_here(name):
    assert not may_be_published(name)


HEX = "0123456789abcdef"
SECRETS = {
    "hub": SECRET,
    "organisation": "api_" + "org_" + "AbCd" * 9,
    "aws": "AKIA" + "A1B2C3D4E5F6G7H8",
    "aws of a role": "ASIA" + "A1B2C3D4E5F6G7H8",
    "aws secret": "AWS_SECRET_ACCESS_" + "KEY=wJalrXUtnFEMI/K7MDENG+bPxRfiCYEX",
    "github": "ghp_" + "a" * 36,
    "github of an app": "ghs_" + "a" * 36,
    "github, fine-grained": "github_" + "pat_11ABCDEFG0" + "x1Y2" * 10,
    "gitlab": "glpat-" + "a1B2" * 5,
    "openai": "sk-" + "proj-" + "b1" * 15,
    "anthropic": "sk-" + "ant-api03-" + "c" * 40,
    "slack": "xoxb-" + "1" * 12,
    "google": "AIza" + "c" * 35,
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + "C" * 20,
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0" + ".SflKxwRJSMeKKF2QT4",
    "pem": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "pem without a kind": "-----BEGIN " + "PRIVATE KEY-----",
    "ssh": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "pgp": "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----",
    "address": "https://me:pass" + "word@example.org/x",
    "address of a database": "postgresql+psycopg://me:pass" + "word@db.example.org:5432/x",
    "address without a user": "redis://:pass" + "word@example.org",
    "signed address": "https://a.example.org/x?sv=1&sig=" + "aB3%2B" * 6,
    "assigned": "api_" + "key: 0123456789abcdef",
    "hub_token": '"hub_' + 'token": "abcdefghijklmnop"',
    "access token": "'access" + "_token' = 'abcdefghijklmnop'",
    "wandb in the environment": "WANDB_API_" + "KEY=" + (HEX * 3)[:40],
    "wandb in a recipe": '"wandb_' + 'key": "' + (HEX * 3)[:40] + '"',
    "wandb on the command line": "wandb " + "login " + (HEX * 3)[:40],
    "wandb, new": "wandb_" + "v1_" + "aB3_" * 12,
    "azure": "DefaultEndpointsProtocol=https;Account" + "Key=" + "aB3+" * 10 + "==",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=list(SECRETS))
@pytest.mark.parametrize("name", ["config.json", "README.md", "recipe.yaml", "reports/metrics.jsonl"])
def test_secrets_are_found_with_file_and_line(tmp_path, secret, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"first\nsecond\na line with {secret} inside\n")
    with pytest.raises(PrivateContentError, match=f"{name}, line 3") as error:
        scan(tmp_path, [name])
    assert secret not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [f'"data": "{HOME}/x"', f"see {HOME}/", "~/" + "runs", "file:" + "//x/y", f'"data": "{HOME}"'.replace("/", "\\/"),
     f"--data={HOME}", f"data:{HOME}", f"({HOME})", f"[{HOME}, x]", f"`{HOME}`", f">{HOME}</td>",
     "/" + "mnt/disk 1/My Pictures/x.png", "/" + "m/data/x", "/" + "m/Data",
     "C:\\" + "Users\\me", '"D:\\' + '\\data\\\\x"', "C:/" + "Users/me/x",
     "\\\\" + "server\\share\\x", json.dumps("\\\\" + "server\\share\\x")],
)  # fmt: skip
def test_paths_of_this_machine_are_found(tmp_path, text):
    (tmp_path / "README.md").write_text(f"a\n{text}\n")
    with pytest.raises(PrivateContentError, match=r"README.md, line 2"):
        scan(tmp_path, ["README.md"])
    scan(tmp_path, ["README.md"], paths=False)


@pytest.mark.parametrize(
    "text",
    ["CLS/registers/patches", "https://huggingface.co/org/model/blob/main/x.py", "[x](figures/a.png)", "</td></tr>",
     "and / or", "use_mask_token: true", "num_register_tokens: 4", "mask_token = self.mask_token_of_the_model",
     "images/s", "1/2/3", "hf_regvit", "data:image/png;base64," + "iVBORw0K/AAAA/BBBB+/cc/dd" * 20, "w/o ",
     '"picture": "' + "/9j/4AAQ" * 60 + '=="', "km/h/s",
     "tokenizer_name: bert-base-uncased-something", "a//b", "i.e./e.g.", "mask-ratio-of-the-patches-in-0-to-1",
     "cls_token: 0123456789abcdef", '"sha256": "' + HEX * 4 + '"', '"commit": "' + (HEX * 3)[:40] + '"',
     "wandb 0.21, file of sha256 " + HEX * 4, "report_to: wandb", "sk-learn-is-a-name-without-digits-in-it",
     "https://example.org:8080/a/b", "git@github.com:owner/name.git", "mail me@example.org: or write",
     "doi:10.1000/182", "18:25/19:38", "\\\\alpha\\\\beta", "10 km/h: 3 m/s", "password: null", "hub_token: null",
     "https://huggingface.co/papers/2309.16588?x=1&signal=2", '"0": "/m/0jbk", "1": "/g/11b7_4k"'],
)  # fmt: skip
def test_ordinary_text_is_no_secret(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    scan(tmp_path, ["README.md"])


def test_images_and_weights_are_looked_through_too(tmp_path):
    from safetensors.torch import save_file

    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", f"made at {HOME}/x.py")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=notes)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"source": f"{HOME}/y"})
    for name in ("a.png", "model.safetensors"):
        with pytest.raises(PrivateContentError, match=name):
            scan(tmp_path, [name])


# --- Bundles


def test_a_bundle_holds_what_a_stranger_needs_and_nothing_else(checkpoint, tmp_path):
    made = bundle(checkpoint, tmp_path / "bundle", card=CARD)
    assert made.names == [
        "README.md", "config.json", "configuration_regvit.py", "model.safetensors", "modeling_regvit.py",
        "preprocessor_config.json", "manifest.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == sorted(made.names)
    assert made.model_class == "RegViTForImageClassification"
    assert made.parameters == RegViTForImageClassification.from_pretrained(checkpoint).num_parameters()
    assert read_bundle(tmp_path / "bundle") == made
    header = card_header((tmp_path / "bundle" / "README.md").read_text())
    assert (header["license"], header["pipeline_tag"]) == ("mit", "image-classification")


def test_large_weights_are_sharded(checkpoint, tmp_path):
    made = bundle(checkpoint, tmp_path / "bundle", card=CARD, max_shard_size="10KB")
    shards = [name for name in made.files if name.startswith("model-")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in made.files
    whole = bundle(checkpoint, tmp_path / "whole", card=CARD)
    assert made.parameters == whole.parameters


def test_what_training_leaves_is_not_bundled(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "notes.txt"):
        (copy / name).write_bytes(b"x")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "use_cache": False, "_name_or_path": HOME}))
    made = bundle(copy, tmp_path / "bundle", card=CARD)
    assert not {"training_args.bin", "optimizer.pt", "rng_state.pth", "notes.txt"} & set(made.names)
    published = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert not {"use_cache", "_name_or_path"} & set(published)


def test_a_secret_in_the_configuration_leaves_no_bundle(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["id2label"]["1"] = f"{HOME}/dogs"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrivateContentError, match=r"(README.md|config.json), line \d+, contains an absolute path"):
        bundle(copy, tmp_path / "bundle", card=CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_f43_a_flipped_bit_in_the_source_is_found_where_its_sums_were_kept(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    bundle(copy, tmp_path / "bundle", card=CARD)
    source = tmp_path / "bundle"
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        CheckpointCorruptError, match=r"sha256 of '.*model\.safetensors' differs from .*remove the manifest"
    ):
        bundle(source, tmp_path / "again", card=CARD)
    (source / "manifest.json").write_text('["of something else"]')
    bundle(source, tmp_path / "again", card=CARD)


@pytest.mark.parametrize(
    ("content", "named"), [("{", "not valid JSON"), ("[]", "holds a list"), ("\ud83d", "not valid JSON")]
)
def test_f52_a_broken_configuration_is_named(checkpoint, tmp_path, content, named):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "config.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError, match=rf"config\.json' .*{named}|config\.json' is {named}"):
        checkpoint_folder(copy)


BROKEN = {
    "retrofit_report.json": ("{}", r"retrofit_report\.json' is not a report of `regvit retrofit`"),
    "resolved_recipe.yaml": ("a: [b", r"resolved_recipe\.yaml' is not valid YAML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_of_a_run_are_named(checkpoint, tmp_path, name):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    content, words = BROKEN[name]
    (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        bundle(copy, tmp_path / "bundle", card=CARD)
    assert not (tmp_path / "bundle").exists()


def test_a_recipe_of_something_else_is_named(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "resolved_recipe.yaml").write_text("- a list")
    with pytest.raises(CheckpointError, match="holds a list"):
        bundle(copy, tmp_path / "bundle", card=CARD)
    (copy / "resolved_recipe.yaml").write_text("data: x")
    with pytest.raises(CheckpointError, match=r"is incomplete: 'global_crop_size' is missing"):
        bundle(copy, tmp_path / "bundle", card=CARD)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "Its fields: none"),
        ('{"bimodal": true}', "is not a report of this version"),
    ],
)
def test_reports_that_are_none_are_named(checkpoint, tmp_path, content, words):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"report\.json' .*{words}"):
        bundle(checkpoint, tmp_path / "bundle", card=CARD, reports=[tmp_path])


def test_a_file_in_place_of_the_bundle_is_told_at_once(checkpoint, tmp_path):
    (tmp_path / "bundle").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        bundle(checkpoint, tmp_path / "bundle", card=CARD)


def test_a_bundle_without_a_licence_is_none(checkpoint, tmp_path):
    with pytest.raises(CardError, match="the header has no 'license'"):
        bundle(checkpoint, tmp_path / "bundle")
    with pytest.raises(CardError, match="license_name and license_link"):
        bundle(checkpoint, tmp_path / "bundle", card={"license": "other"})


def test_folders_that_cannot_be_bundled_are_named(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json, and neither has a backbone"):
        checkpoint_folder(tmp_path)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        bundle(copy, tmp_path / "bundle", card=CARD)
    (copy / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match=r"type 'vit', not a RegViT\. Run `regvit convert"):
        bundle(copy, tmp_path / "bundle", card=CARD)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        bundle(checkpoint, tmp_path / "full", card=CARD)
    with pytest.raises(CheckpointError, match="no field colour"):
        bundle(checkpoint, tmp_path / "bundle", card={"colour": "red"})
    with pytest.raises(CheckpointError, match="no report at"):
        bundle(checkpoint, tmp_path / "bundle", card=CARD, reports=[tmp_path])
    (tmp_path / "report.json").write_text('{"strange": 1}')
    with pytest.raises(CheckpointError, match="neither a report of"):
        bundle(checkpoint, tmp_path / "bundle", card=CARD, reports=[tmp_path])


@pytest.mark.parametrize("name", ["optimizer.pt", "extra.md"])
def test_a_file_that_came_later_is_refused(checkpoint, tmp_path, name):
    bundle(checkpoint, tmp_path / "bundle", card=CARD)
    (tmp_path / "bundle" / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=name):
        read_bundle(tmp_path / "bundle")


def test_a_bundle_that_has_changed_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "bundle"
    bundle(checkpoint, folder, card=CARD)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors.*bundle again.*--description"):
        read_bundle(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_bundle(folder)


def test_preprocessing_in_words():
    from hf_regvit.hub.bundle import describe_preprocessing

    processor = {"do_resize": True, "size": {"shortest_edge": 256}, "do_center_crop": True, "image_mean": [0.5],
                 "crop_size": {"height": 224, "width": 200}, "image_std": [0.2]}  # fmt: skip
    words = describe_preprocessing(json.dumps(processor))
    assert words == "resized to 256, cropped to 224 x 200, mean [0.5], standard deviation [0.2]"
    words = describe_preprocessing(json.dumps(processor | {"do_normalize": False}))
    assert words == "resized to 256, cropped to 224 x 200, not normalized"
    assert describe_preprocessing("center crop 224") == "center crop 224"


# --- Pushes


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    (path / "model.safetensors").write_bytes(bytes(300_000))
    return path


def send(folder, name="tiny", **options):
    names = sorted(path.name for path in folder.iterdir())
    return send_folder(folder, name, names=names, message="m", retry=QUICK, **{"private": True, **options})


def test_a_push_makes_a_private_repository_and_one_commit(hub, folder):
    sent = send(folder)
    assert (sent.repo_id, sent.changed, sent.tries) == (f"{OWNER}/tiny", True, 1)
    repo = hub.repos[sent.repo_id]
    assert repo.private
    assert [commit.message for commit in repo.commits] == ["initial commit", "m"]
    assert hub.files(sent.repo_id)["model.safetensors"] == bytes(300_000)
    assert hub.sent("PUT /lfs") == [300_000]


def test_f65_a_second_push_sends_nothing(hub, folder):
    first = send(folder)
    hub.requests.clear()
    again = send(folder)
    assert (again.changed, again.commit) == (False, first.commit)
    assert not hub.sent("PUT /lfs")
    assert not hub.sent("/commit/")


def test_f65_a_broken_push_goes_on_where_it_was(hub, folder):
    hub.fail("/commit/", 503, times=3)
    with pytest.raises(PushError, match=r"after 3 attempts: 503 .*uploaded files are not sent again"):
        send(folder)
    assert hub.sent("PUT /lfs") == [300_000]
    assert send(folder).changed
    assert hub.sent("PUT /lfs") == [300_000]  # still once


@pytest.mark.parametrize(
    ("kind", "route"),
    [(503, "/api/repos/create"), ("reset", "/api/repos/create"),
     *((kind, "/commit/") for kind in (500, 502, 503, 504, 429, 408, 412, "reset", "silence"))],
)  # fmt: skip
def test_f65_every_passing_fault_costs_one_try(hub, folder, kind, route):
    hub.fail(route, kind, times=1, headers={"Retry-After": "0.01"})
    assert send(folder).tries == 2
    assert len(hub.repos[f"{OWNER}/tiny"].commits) == 2


def test_f65_a_conflict_is_tried_again_and_an_existing_repository_is_none(hub, folder):
    send(folder)  # the repository exists from here on: creating it answers 409
    (folder / "config.json").write_text('{"a": 1}')
    hub.fail("/commit/", 409, times=1)
    assert send(folder).tries == 2
    assert hub.files(f"{OWNER}/tiny")["config.json"] == b'{"a": 1}'


@pytest.mark.parametrize("kind", [504, "reset"])
def test_f65_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder, kind):
    hub.fail("/commit/", kind, times=1, applied=True)
    sent = send(folder)
    repo = hub.repos[f"{OWNER}/tiny"]
    assert sent.commit == repo.commits[-1].oid
    assert len(repo.commits) == 2


def test_f65_somebody_elses_commit_in_between_is_kept(hub, folder, monkeypatch):
    send(folder)
    repo = hub.repos[f"{OWNER}/tiny"]
    (folder / "config.json").write_text('{"b": 1}')
    original, answered = fake_hub._Handler._preupload, []

    def answer_and_commit(handler, name, repo_, commit, rest):
        if not answered:
            answered.append(True)
            repo.commits.append(type(commit)("f" * 40, "theirs", {**commit.files, "LICENSE": b"text"}))
        return original(handler, name, repo_, commit, rest)

    monkeypatch.setattr(fake_hub._Handler, "_preupload", answer_and_commit)
    assert send(folder).tries == 2  # 412: the parent is not the newest commit
    assert [commit.message for commit in repo.commits[-2:]] == ["theirs", "m"]
    assert {"LICENSE", "config.json"} <= set(repo.commits[-1].files)


def test_f65_the_server_says_how_long_to_wait(hub, folder, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.fail("/commit/", 429, times=1, headers={"Retry-After": "0.7"})
    send(folder)
    assert waits == [pytest.approx(0.7)]
    hub.fail("/commit/", 429, times=1, headers={"Retry-After": "3600"})
    (folder / "config.json").write_text("[]")
    with pytest.raises(PushError, match="asks to wait 3600 s"):
        send(folder)


def test_waits_double_with_some_chance_up_to_a_bound(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    retry = RetryPolicy(attempts=6, first_wait=1.0, longest_wait=6.0)
    with pytest.raises(PushError, match="after 6 attempts: ConnectionError: down"):
        with_retries(Mock(side_effect=ConnectionError("down")), what="x", retry=retry)
    assert all(low <= wait <= high for wait, low, high in zip(waits, (1, 2, 4, 6, 6), (1.5, 3, 6, 6, 6), strict=True))


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "does not accept the token"), (403, "no write access to 'tiny'"), (404, "'tiny' does not exist"),
     (413, "too large")],
)  # fmt: skip
def test_f65_lasting_errors_are_told_at_once(hub, folder, status, said):
    hub.fail("/commit/", status, times=9)
    with pytest.raises(PermanentPushError, match=said):
        send(folder)
    assert len(hub.sent("/commit/")) == 1


def test_f65_tokens_that_may_not_write(hub, folder):
    with pytest.raises(PermanentPushError, match="has no write access"):
        send(folder, token=READ_TOKEN)
    with pytest.raises(PermanentPushError, match="does not accept the token") as error:
        send(folder, token="hf_" + "q" * 34)
    assert "qqq" not in str(error.value)


def test_offline_and_bad_names_are_told(hub, folder, monkeypatch):
    with pytest.raises(PermanentPushError, match="'a/b/c' is not a valid Hub repository id"):
        send(folder, name="a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PermanentPushError, match="HF_HUB_OFFLINE is set"):
        send(folder)


def test_a_private_repository_that_stays_private_is_told(hub, folder, caplog):
    send(folder, private=False)
    assert "remains private" not in caplog.text
    hub.repos[f"{OWNER}/tiny"].private = True
    with caplog.at_level(logging.WARNING, logger="hf_regvit.hub.upload"):
        send(folder, private=False)
    assert f"'{OWNER}/tiny' exists and remains private" in caplog.text
    assert hub.repos[f"{OWNER}/tiny"].private


def test_a_public_repository_is_only_used_if_that_was_said(hub, folder):
    send(folder, private=False)
    (folder / "config.json").write_text("[]")
    with pytest.raises(PermanentPushError, match="exists and is public"):
        send(folder, accept_public=False)
    assert send(folder, accept_public=True).changed


def test_weights_of_another_layout_are_removed_and_nothing_else(hub, folder):
    send(folder)
    hub.repos[f"{OWNER}/tiny"].commits[-1].files["notes.md"] = b"by hand"
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*shards, "model.safetensors.index.json"):
        (folder / name).write_bytes(name.encode())
    send(folder)
    assert set(hub.files(f"{OWNER}/tiny")) == {
        ".gitattributes", "notes.md", "README.md", "config.json", *shards, "model.safetensors.index.json"
    }  # fmt: skip


def test_a_branch_is_made(hub, folder):
    hub.fail("/branch/", 409, times=1)  # the branch exists already; the fake Hub has no other branches
    with pytest.raises(PushError):
        send(folder, revision="v2")
    assert hub.sent("/branch/v2")


def test_nothing_is_sent_without_being_asked(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "verify", lambda *args, **options: None)
    done = publish(checkpoint, "someone/tiny", output_dir=tmp_path / "bundle", card=CARD)
    assert done.sent is None
    assert not hub.requests
    with pytest.raises(CheckpointError, match="--repo_id"):
        publish(checkpoint, output_dir=tmp_path / "other", card=CARD, push=True)
    done = publish(checkpoint, "someone/tiny", output_dir=tmp_path / "bundle", push=True, retry=QUICK)  # continues
    assert done.sent.changed
    assert set(hub.files("someone/tiny")) == {".gitattributes", *done.bundle.names}
    assert hub.repos["someone/tiny"].private
    assert 'name = "someone/tiny"' in hub.files("someone/tiny")["README.md"].decode()


def test_what_a_card_leaves_open_is_said(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "verify", lambda *args, **options: None)
    local = publish(checkpoint, output_dir=tmp_path / "local", card={**CARD, "base_model": "runs"}).summary()
    assert "weights of runs" in local["license not stated"]
    assert local["base model"] == "'runs' is not on the Hub under this name; give its id with --base_model"
    stated = {"base_model": "google/vit", "base_model_license": "mit", "data_license": "mit"}
    complete = publish(checkpoint, output_dir=tmp_path / "complete", card={**CARD, **stated}).summary()
    assert not {"license not stated", "base model"} & set(complete)


def test_a_module_and_a_name_are_published_like_a_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "verify", lambda *args, **options: None)
    monkeypatch.chdir(tmp_path)
    expected = bundle(checkpoint, tmp_path / "bundle", card=CARD)
    loaded = RegViTForImageClassification.from_pretrained(checkpoint)
    fresh = tiny_model(RegViTForImageClassification, id2label={0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match="No image processor was given and none is saved"):
        publish(fresh, output_dir=tmp_path / "fresh", card=CARD)
    reader = open_model(fresh, processor=default_image_processor(32))
    with pytest.raises(CheckpointError, match=r"the transform of a timm model, which cannot be saved"):
        publish(open_model(fresh, processor=reader.transform), output_dir=tmp_path / "transform", card=CARD)
    for number, model in enumerate((loaded, reader, str(checkpoint))):
        made = publish(model, "someone/tiny", output_dir=tmp_path / f"bundle{number}", card=CARD).bundle
        assert made.files["model.safetensors"] == expected.files["model.safetensors"]
        assert made.files["preprocessor_config.json"] == expected.files["preprocessor_config.json"]
    assert publish(loaded, "someone/tiny", card=CARD).bundle.folder == Path("bundles/tiny")
    assert publish(str(checkpoint), card=CARD).bundle.folder == Path("bundles") / checkpoint.name
    with pytest.raises(CheckpointError, match=r"is a ViTModel, not a RegViT\. Call `hf_regvit\.convert"):
        publish(tiny_source("ViTModel"), output_dir=tmp_path / "vit", card=CARD)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a model that can be loaded from the Hub"):
        publish("someone/missing", output_dir=tmp_path / "missing", card=CARD)


def test_a_bundle_that_was_made_with_other_options_is_not_reused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "verify", lambda *args, **options: None)
    place = {"output_dir": tmp_path / "bundle"}
    publish(checkpoint, card=CARD, **place)
    publish(checkpoint, **place)  # no new options
    for said in ({"card": {"license": "apache-2.0"}}, {"card": {**CARD, "description": "New."}}):
        with pytest.raises(CheckpointError, match=f"made with a different {list(said['card'])[-1]}.*--output_dir"):
            publish(checkpoint, **said, **place)
    with pytest.raises(CheckpointError, match="a different repo_id"):  # otherwise its card would load from a folder
        publish(checkpoint, "someone/tiny", card=CARD, **place)
    with pytest.raises(CheckpointError, match="a different max_shard_size"):
        publish(checkpoint, card=CARD, max_shard_size="10KB", **place)
    content = (tmp_path / "bundle" / "manifest.json").read_text()
    assert "mit" not in json.loads(content)["options"].values()


# --- In the background


def test_background_pushes_run_in_order_and_keep_failures(caplog):
    pushes, order = BackgroundPushes(), []

    with caplog.at_level(logging.WARNING):
        pushes.start(lambda: order.append(1), label="one")
        pushes.start(Mock(side_effect=PushError("the Hub is down")), label="two")
        pushes.start(lambda: order.append(3), label="three")
        pushes.wait(10)
    assert order == [1, 3]
    assert (pushes.sent, pushes.failures) == (["one", "three"], ["two: the Hub is down"])
    assert "training is not affected" in caplog.text
    assert not pushes.busy


def test_a_push_that_does_not_end_is_given_up():
    import threading

    pushes, release = BackgroundPushes(), threading.Event()
    pushes.start(release.wait, label="slow")
    pushes.wait(0.05)
    release.set()
    assert pushes.failures == ["push of slow: not finished after 0 s"]


def test_the_base_model_has_the_same_rules(tmp_path):
    save_model(tiny_model(), tmp_path / "a" / "backbone")
    made = bundle(tmp_path / "a", tmp_path / "bundle", card=CARD)  # the folder of a run
    assert made.model_class == "RegViTModel"


def test_the_token_never_shows(hub, folder, caplog):
    hub.fail("/commit/", 500, times=1)
    with caplog.at_level(logging.DEBUG, logger="hf_regvit"):
        send(folder, token=WRITE_TOKEN)
    assert WRITE_TOKEN not in caplog.text


# --- The text on tokens in the card


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"num_register_tokens": 0}, "The tokens are `[CLS | patches]`. This model has no registers"),
     ({"num_register_tokens": 2}, "`output.output_mask` is False for registers"),
     ({"num_register_tokens": 2, "discard_registers": True}, "the model returns `[CLS | patches]`")],
)  # fmt: skip
def test_a_card_says_which_tokens_there_are(tmp_path, fields, said):
    bundle(save_model(tiny_model(**fields), tmp_path / "model"), tmp_path / "bundle", card=CARD)
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert said in text
    assert text.count("output_mask") == ("False for registers" in said)


@pytest.mark.slow
def test_example_images_of_a_diagnosis_are_published_if_asked_for(checkpoint, tmp_path):
    from hf_regvit import diagnose
    from hf_regvit.data.builtin import builtin_images

    model = RegViTForImageClassification.from_pretrained(checkpoint).eval()
    pictures = [picture.resize((24, 24)) for picture in list(builtin_images().values())[:8]]
    report = diagnose(model, pictures, processor=default_image_processor(32), progress=False)
    report.save(tmp_path / "diagnosis")
    for wanted in (False, True):
        made = bundle(
            checkpoint, tmp_path / f"bundle{wanted}", card=CARD, reports=[tmp_path / "diagnosis"],
            example_pictures=wanted,
        )  # fmt: skip
        assert ("figures/example_00.png" in made.names) == wanted
        text = (made.folder / "README.md").read_text()
        assert text.count("hf_regvit 0") == 1  # its version, once


def evaluated(models, folder):
    from hf_regvit import compare_backbones, load_images

    train, judged = (load_images("digits", split=part).subset(range(60)) for part in ("train", "validation"))
    table = compare_backbones(models, judged, train=train, tasks=("knn",), knn_k=[5])
    table.save(folder)
    return table


def test_the_model_index_holds_the_numbers_of_the_published_model_wherever_it_stands(checkpoint, tmp_path, caplog):
    """Once, for a base model and its fine-tuned copy in this order, the numbers of the base model were published."""
    save_model(tiny_model(RegViTForImageClassification, seed=1, hidden_size=8), tmp_path / "base")
    table = evaluated([str(tmp_path / "base"), str(checkpoint)], tmp_path / "evaluation")
    values = [report.scores[0].value for report in table.reports]
    assert values[0] != values[1]
    bundle(checkpoint, tmp_path / "bundle", card=CARD, reports=[tmp_path / "evaluation"])
    card = (tmp_path / "bundle" / "README.md").read_text()
    (result,) = card_header(card)["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [round(values[1], 4)]
    assert "| base: Weighted kNN" in card
    assert "| Weighted kNN" in card  # the rows of this model omit its name

    evaluated([str(tmp_path / "base")], tmp_path / "of another")
    caplog.clear()
    bundle(checkpoint, tmp_path / "without", card=CARD, reports=[tmp_path / "of another"])
    assert "is an evaluation of different weights (base)" in caplog.text
    card = (tmp_path / "without" / "README.md").read_text()
    assert "model-index" not in card_header(card)
    assert "| base: Weighted kNN" in card


def test_a_diagnosis_of_other_weights_is_noticed(checkpoint, tmp_path, caplog):
    from hf_regvit.diagnosis.diagnose import diagnose
    from hf_regvit.diagnosis.report import ArtifactReport

    images = [Image.effect_noise((16, 16), 60 + i).convert("RGB") for i in range(16)]
    path = diagnose(checkpoint, images).save(tmp_path / "own")
    bundle(checkpoint, tmp_path / "one", card=CARD, reports=[path])
    assert "different weights" not in caplog.text
    content = json.loads(path.read_text())
    content["model"]["weights"] = "0" * 32
    path.write_text(json.dumps(content))
    assert ArtifactReport.load(path).model["weights"] == "0" * 32
    bundle(checkpoint, tmp_path / "two", card=CARD, reports=[path])
    assert f"'{path}' is a diagnosis of different weights" in caplog.text


def test_a_diagnosis_of_several_models_is_asked_for_the_one(checkpoint, tmp_path):
    for name in ("0-a", "1-b"):
        (tmp_path / "diagnosis" / name).mkdir(parents=True)
        (tmp_path / "diagnosis" / name / "report.json").write_text("{}")
    (tmp_path / "diagnosis" / "comparison.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"compares several models.*Pass the report .*0-a', '.*1-b'\."):
        bundle(checkpoint, tmp_path / "bundle", card=CARD, reports=[tmp_path / "diagnosis"])


@pytest.mark.parametrize("repo_id", ["../x", "owner/name/x", "owner/a name", "owner/..", 'owner/x"+y', "-a/b", "name"])
def test_a_repository_that_cannot_be_is_refused_before_anything_is_made(repo_id, tmp_path):
    """The id would appear in the card, in code that users run."""
    with pytest.raises(CheckpointError, match=r"^'.*' (is not a valid Hub repository id|has no owner).* Use owner/"):
        publish(tmp_path / "nothing", repo_id, output_dir=tmp_path / "bundle", card={"license": "mit"})
    assert not list(tmp_path.iterdir())
