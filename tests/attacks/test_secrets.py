"""Secrets and private text in files that would be published: found, wherever text can stand, or gone."""

import base64
import json
import string
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from builders import encoded, image, png_chunk, save_model, tiny_model, write
from hf_regvit import CheckpointError
from hf_regvit.hub.bundle import bundle
from hf_regvit.hub.scan import PrivateContentError, doubtful_content, scan

pytestmark = pytest.mark.attacks
LETTERS = string.ascii_letters + string.digits
HOME = "/" + "home/someone/secret"  # in two parts, because the files of the project are scanned as well


def drawn(kind: int) -> str:
    """Return a secret: 15 kinds, each with three random contents."""
    rng = np.random.default_rng(kind)

    def text(length: int, letters: str = LETTERS) -> str:
        return "".join(rng.choice(list(letters), length))

    capitals = string.ascii_uppercase + string.digits
    kinds = [
        lambda: "hf_" + text(34), lambda: "AKIA" + text(16, capitals), lambda: "ghp_" + text(36),
        lambda: "github_" + "pat_" + text(40), lambda: "glpat-" + text(20), lambda: "sk-" + "1" + text(40),
        lambda: "xox" + "b-" + text(24, string.digits), lambda: "AIza" + text(35), lambda: "pypi-" + "AgE" + text(60),
        lambda: "npm_" + text(36), lambda: "eyJ" + text(20) + ".eyJ" + text(30) + "." + text(43),
        lambda: "api_" + "key=" + text(24), lambda: "-----BEGIN " + "PRIVATE KEY-----",
        lambda: "https://user:" + text(16) + "@example.org/x", lambda: HOME + "/" + text(8),
    ]  # fmt: skip
    return kinds[kind % 15]()


def png_with(secret: str, carrier: str) -> bytes:
    """Return a PNG that holds a text in one of eight places."""
    plain, text = encoded(image()), secret.encode()
    if carrier in ("eXIf", "GPS"):
        exif = Image.Exif()
        exif[0x010E] = secret if carrier == "eXIf" else "a photo"
        if carrier == "GPS":
            exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 29: secret})
        return encoded(image(), "PNG", exif=exif)
    if carrier == "tEXt before the pixels":
        notes = PngImagePlugin.PngInfo()
        notes.add_text("Comment", secret)
        return encoded(image(), "PNG", pnginfo=notes)
    if carrier == "after the end":
        return plain + text
    content = {
        "tEXt after the pixels": png_chunk(b"tEXt", b"Comment\0" + text),
        "zTXt": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text)),
        "private chunk": png_chunk(b"prVt", text),
        "ICC name": png_chunk(b"iCCP", text[:79] + b"\0\0" + zlib.compress(b"profile")),
    }[carrier]
    return plain[:33] + content + plain[33:] if carrier == "ICC name" else plain[:-12] + content + plain[-12:]


PNG_CARRIERS = [
    "eXIf", "GPS", "tEXt before the pixels", "tEXt after the pixels", "zTXt", "after the end", "private chunk",
    "ICC name",
]  # fmt: skip


@pytest.mark.parametrize("carrier", [*PNG_CARRIERS, "escapes of JSON"])
def test_forty_five_secrets_in_each_carrier(tmp_path, carrier):
    """405 in all."""
    for kind in range(45):
        secret = drawn(kind)
        if carrier in PNG_CARRIERS:
            name = write(tmp_path / "figures" / f"{kind}.png", png_with(secret, carrier)).name
            name = f"figures/{name}"
        else:
            name = write(
                tmp_path / f"{kind}.json", '{"a": "' + "".join(f"\\u{ord(c):04x}" for c in secret) + '"}'
            ).name
        with pytest.raises(PrivateContentError):
            scan(tmp_path, [name])


@pytest.mark.parametrize("kind", range(15))
def test_secrets_in_other_text(tmp_path, kind):
    secret = drawn(kind)
    files = {
        "a.md": f"<!-- {secret} -->",
        "a.yaml": 'a: "' + "".join(f"\\x{ord(c):02x}" for c in secret) + '"',
        "a.jsonl": '{"step": 1}\n' + json.dumps({"step": 2, "note": secret}),
        "b.jsonl": '{"step": 1}\n{"note": "' + "".join(f"\\u{ord(c):04x}" for c in secret) + '"}',
        "a.html": "".join(f"&#{ord(c)};" for c in secret),
        "b.html": f'<img src="data:image/png;base64,{base64.b64encode(encoded(image()) + secret.encode()).decode()}">',
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"note": secret})
    save_file({secret: torch.zeros(1)}, tmp_path / "b.safetensors")
    for name in (*files, "a.safetensors", "b.safetensors"):
        with pytest.raises(PrivateContentError, match=name.replace(".", r"\.")):
            scan(tmp_path, [name])


@pytest.mark.parametrize("before", ["-", ")", "*", "+", "=", "%", "]", "}", ";", "&", "'", '"', " ", "(", "|", ","])
def test_a_path_is_found_after_every_sign(tmp_path, before):
    write(tmp_path / "README.md", f"x{before}{HOME}/file")
    with pytest.raises(PrivateContentError, match="absolute path"):
        scan(tmp_path, ["README.md"])


@pytest.fixture
def run(tmp_path) -> Path:
    """Folder of a pretraining run that has only what a card needs."""
    folder = tmp_path / "run"
    save_model(tiny_model(), folder / "backbone")
    recipe = {
        "data": ["photos"], "global_crop_size": 32, "num_local_crops": 2, "local_crop_size": 16,
        "per_device_train_batch_size": 4, "learning_rate": 0.1, "head_num_prototypes": 8, "centering": "softmax",
    }  # fmt: skip
    write(folder / "resolved_recipe.yaml", json.dumps(recipe))
    write(folder / "metrics.jsonl", '{"step": 1, "loss": 1.0}\n')
    write(folder / "curves.png", image())
    return folder


def test_every_image_is_encoded_anew(run, tmp_path):
    for number, carrier in enumerate(PNG_CARRIERS):
        secret = drawn(number)
        write(run / "curves.png", png_with(secret, carrier))
        bundle(run, tmp_path / f"bundle{number}", card={"license": "mit"})
        content = (tmp_path / f"bundle{number}" / "figures" / "curves.png").read_bytes()
        kinds, start = [], 8
        while start < len(content):
            kinds.append(content[start + 4 : start + 8])
            start += 12 + int.from_bytes(content[start : start + 4], "big")
        assert {*kinds} == {b"IHDR", b"IDAT", b"IEND"}
        assert secret.encode() not in content


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "curves.png", "resolved_recipe.yaml", "report.json", "environment.json"]
)
def test_links_in_a_run_are_refused(run, tmp_path, name):
    outside = write(tmp_path / "outside", (run / name).read_bytes() if (run / name).exists() else "{}")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{name}' is a link"):
        bundle(run, tmp_path / "bundle", card={"license": "mit"})
    assert not (tmp_path / "bundle").exists()


def test_links_to_reports_are_refused(run, tmp_path):
    (tmp_path / "report.json").symlink_to(write(tmp_path / "outside.json", '{"bimodal": true}'))
    with pytest.raises(CheckpointError, match="is a link"):
        bundle(run, tmp_path / "bundle", card={"license": "mit"}, reports=[tmp_path / "report.json"])


def test_a_huge_file_of_metrics_is_left_out(run, tmp_path, caplog):
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(3 * 2**30)  # takes no space on the disk
    made = bundle(run, tmp_path / "bundle", card={"license": "mit"})
    assert "reports/metrics.jsonl" not in made.names
    assert "metrics.jsonl' is larger than 64 MiB" in caplog.text


def test_doubtful_content_is_reported_and_published(run, tmp_path):
    card = {
        "license": "mit",
        "description": "Ask someone@university.edu about node17.cluster, 10.1.2.3 or Ab3" + "dE4f" * 6,
    }
    made = bundle(run, tmp_path / "bundle", card=card)
    found = "\n".join(doubtful_content(tmp_path / "bundle", made.names))
    for words in ("an e-mail address ('someone@university.edu')", "the name of a host", "what could be a key"):
        assert words in found
    plain = bundle(run, tmp_path / "plain", card={"license": "mit"})
    assert doubtful_content(tmp_path / "plain", plain.names) == []
