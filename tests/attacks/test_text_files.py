"""Recipes, metrics, labels and tables that are damaged, or made to cost time and memory or to name other files."""

import io
import json
import time
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from builders import encoded, image, image_table, tar_file, tiny_model, write
from hf_regvit import load_images
from hf_regvit.app.recipes import RecipeError, RecipeParser, arguments_class
from hf_regvit.data.decoding import BadImageError
from hf_regvit.data.loading import stream_images
from hf_regvit.data.preparation import prepare_images
from hf_regvit.figures.curves import read_metrics
from hf_regvit.models.processing import EvaluationTransform, default_image_processor

pytestmark = pytest.mark.attacks
RECIPE = """# A recipe
data: builtin:digits
output_dir: OUTPUT
learning_rate: 1e-4
max_steps: 10
head_num_prototypes: 64
local_crop_scale: [0.05, 0.32]
bf16: false
"""


def test_a_hundred_changed_recipes(tmp_path):
    """A recipe is read with its new value, or refused with a sentence that names the file or the option."""
    rng, whole = np.random.default_rng(7), RECIPE.replace("OUTPUT", str(tmp_path / "run"))
    signs = [
        "\0", "\t", "*a", "&a", "!!python/object:os.system", "{", "[", "- ", ": ", "'", '"', "#", "|", ">", "%", "@",
        "é", "\u2028", "---", "...", ".nan", "12:30:45", "2024-99-99", "0x1F", "~", "<<: *a", "[" * 2000,
    ]  # fmt: skip
    refused = read = 0
    for number in range(100):
        text = whole
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(text)))
            cut = int(rng.integers(0, 6))
            text = text[:place] + signs[int(rng.integers(len(signs)))] + text[place + cut :]
        path, started = write(tmp_path / f"{number}.yaml", text.encode("utf-8", "replace")), time.process_time()
        try:
            RecipeParser(arguments_class("pretrain")).parse(["--config", str(path)])
        except (RecipeError, ValueError, SystemExit):
            refused += 1
        else:
            read += 1
        assert time.process_time() - started < 5
    assert refused + read == 100
    assert refused > 50
    assert read > 5


# Nine levels of nine references each: 9^9 values.
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
ALIASES += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)) + "data: *a8"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIASES, "too many aliases"),
        ("[" * 100_000, "levels"),
        ("{a: " * 20_000, "levels"),
        ("- " * 100_000, "levels"),
        ("data: x\n" + "# comment\n" * 100_000, "too long"),
        ("data: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("data: 2024-99-99", "is not valid YAML"),
    ],
    ids=["aliases", "brackets", "braces", "dashes", "long", "object", "date"],
)
def test_recipes_that_cost_minutes_are_refused_at_once(tmp_path, text, words):
    started = time.process_time()
    with pytest.raises(RecipeError, match=words):
        RecipeParser(arguments_class("pretrain")).parse(["--config", str(write(tmp_path / "recipe.yaml", text))])
    assert time.process_time() - started < 5


def test_a_few_aliases_are_fine(tmp_path):
    lines = ["local_crop_scale: &s [0.1, 0.2]", "global_crop_scale: *s", f"output_dir: {tmp_path}/run", "data: x"]
    RecipeParser(arguments_class("pretrain")).parse(["--config", str(write(tmp_path / "a.yaml", "\n".join(lines)))])


def test_metrics_of_any_size_take_little_memory(tmp_path):
    path = write(tmp_path / "metrics.jsonl", "".join(f'{{"step": {i}}}\n' for i in range(120_000)))
    with path.open("ab") as file:
        file.write(b"[" * 100_000 + b'\n{"step": "x"}\n{"step": 120000}\n')
        file.truncate(file.tell() + 200 * 2**20)  # one long line of zeros, which takes no space on the disk
    tracemalloc.start()
    lines = read_metrics(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(lines), lines[0]["step"], lines[-1]["step"]) == (100_000, 20_001, 120_000)
    assert peak < 100 * 2**20


@pytest.mark.parametrize("cell", ["PATH", "file:PATH", "../outside.png", "~/outside.png", "/etc/hostname"])
@pytest.mark.parametrize("opened", ["table", "stream"])
def test_a_table_from_elsewhere_names_no_files_of_this_machine(tmp_path, monkeypatch, cell, opened):
    outside = write(tmp_path / "outside.png", image())
    monkeypatch.chdir(write(tmp_path / "data" / "x" / "a", b"").parent)
    cell = cell.replace("PATH", str(outside))
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    Dataset.from_dict({"image": [{"bytes": None, "path": cell}]}, features=features).to_parquet(tmp_path / "a.parquet")
    if opened == "table":
        with pytest.raises(BadImageError, match=r"holds only the path|No such file"):
            load_images(tmp_path / "a.parquet")[0]
    else:
        stream = stream_images(tmp_path / "a.parquet")
        assert [record.data for record in stream.open_shard(0)] == [None]


def test_a_table_that_the_user_has_built_may_name_files(tmp_path):
    path = str(write(tmp_path / "mine.png", image()))
    table = Dataset.from_dict({"image": [path]}, features=Features({"image": ImageFeature()}))
    transform = EvaluationTransform.for_model(tiny_model(), default_image_processor(32))
    for images in (table, table.to_iterable_dataset()):
        assert sum(len(ids) for ids, _ in prepare_images(images, transform)) == 1


@pytest.mark.parametrize("name", ["/abs.png", "../up.png", "a/../../up.png", "a/..", "sub/../../../up.png"])
def test_members_of_an_archive_stay_inside(tmp_path, name):
    source = load_images(tar_file(tmp_path / "a.tar", {name: encoded(1), "fine.png": encoded(0)}))
    assert source.ids == ["a.tar#fine.png"]
    assert name.endswith("/..") or "path out of the archive" in str(source.problems[0])
    stream = stream_images(tmp_path / "a.tar")
    assert [record.id for record in stream.open_shard(0)] == ["a.tar#fine.png"]


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"label": ' * 50_000, b"9" * 5_000, b'{"label": 1e999}', b"\xff"]
)
def test_labels_of_any_content_are_no_labels(tmp_path, content):
    write(tmp_path / "a.png", image())
    write(tmp_path / "a.json", content)
    assert load_images(tmp_path).labels is None
    members = {"a.png": encoded(0), "a.json": content}
    assert load_images(tar_file(tmp_path / "b.tar", members)).labels is None


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_forty_damaged_containers(tmp_path, kind):
    """Images are read or refused one by one, or the container is refused by name."""
    path, rng = tmp_path / f"a.{kind}", np.random.default_rng(len(kind))
    if kind == "tar":
        tar_file(path, {f"{i}.png": encoded(i) for i in range(3)})
    else:
        image_table(path, image=[encoded(i) for i in range(3)])
    whole = path.read_bytes()
    for number in range(40):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=int(rng.integers(1, 10))):
            data[place] = int(rng.integers(256))
        changed = write(
            tmp_path / str(number) / path.name, bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))])
        )
        try:
            source = load_images(changed)
        except (ValueError, OSError) as error:
            message = io.StringIO(str(error)).readline()
            if path.name not in message and str(number) not in message:
                raise
            continue
        for index in range(len(source)):
            try:
                source[index]
            except BadImageError:
                continue


def test_the_message_of_a_damaged_json_file_is_short(tmp_path):
    write(tmp_path / "classes.json", json.dumps({"a": "b"}))
    write(tmp_path / "images" / "0.png", image())
    write(tmp_path / "masks" / "0.png", encoded(np.zeros((20, 24), np.uint8)))
    from hf_regvit.data.maps import load_masks

    for text in ("[" * 100_000, "{", '{"a": "b"}', "3"):
        write(tmp_path / "classes.json", text)
        with pytest.raises(ValueError, match=r"classes\.json") as caught:
            load_masks(tmp_path)
        assert len(str(caught.value)) < 1000
