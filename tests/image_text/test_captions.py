"""Where the texts of a data set are, which text an image gets, and images that have none."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from builders import class_folder, encoded, image_table, json_lines, tar_file, tinted_folder, write
from hf_regvit.data.bad_images import TooManyBadImagesError
from hf_regvit.image_text.captions import ImageTextDataset, class_prompts, open_captioned
from tiny_image_text import arguments

TEXT = datasets.Value("string")


def opened(data, folder=Path("unused"), **options):
    return open_captioned(arguments(folder, data, init_from=None, **options))


def texts_by_name(images) -> dict:
    return {id: images.texts_of(i) for i, id in enumerate(images.source.ids)}


@pytest.mark.parametrize("name", ["text", "caption", "alt"])
def test_texts_of_a_column(name, tmp_path):
    table = image_table(
        tmp_path / "train.parquet",
        types={name: TEXT},
        image=[encoded(i) for i in range(3)],
        **{name: ["a", None, " "]},
    )
    images = opened(tmp_path, **({"text_column": "alt"} if name == "alt" else {}))
    assert [images.texts_of(i) for i in range(3)] == [["a"], [], []]
    assert list(images.corpus()) == ["a"]
    assert images.labeled is None
    assert opened(table, text_column=name).texts_of(0) == ["a"]


def test_a_column_of_lists(tmp_path):
    lists = [["a", "b"], [], ["", "c "]]
    types = {"text": datasets.List(TEXT)}
    image_table(tmp_path / "train.parquet", types=types, image=[encoded(i) for i in range(3)], text=lists)
    assert [opened(tmp_path).texts_of(i) for i in range(3)] == [["a", "b"], [], ["c"]]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_folder_with_metadata(suffix, tmp_path):
    """File names are relative to the metadata file; several entries of an image are several texts."""
    class_folder(tmp_path, one=3, two=1)
    rows = [("0.png", "first"), ("0.png", "again"), ("../one/1.png", 'a "quoted", text'), ("../two/0.png", "")]
    if suffix == "csv":
        content = "file_name,text\n" + "".join('{},"{}"\n'.format(a, b.replace('"', '""')) for a, b in rows)
    else:
        content = "".join(json.dumps({"file_name": a, "text": b, "more": 1}) + "\n\n" for a, b in rows)
    write(tmp_path / "one" / f"metadata.{suffix}", content)
    assert texts_by_name(opened(tmp_path)) == {
        "one/0.png": ["first", "again"], "one/1.png": ['a "quoted", text'], "one/2.png": [], "two/0.png": [],
    }  # fmt: skip


@pytest.mark.parametrize("entry", ["not JSON", "[1]", '{"text": "a"}', '{"file_name": "0.png"}', '{"file_name": 3}'])
def test_a_wrong_entry_of_the_metadata_is_named(entry, tmp_path):
    class_folder(tmp_path, one=2)
    write(tmp_path / "metadata.jsonl", f'{{"file_name": "one/0.png", "text": "a"}}\n{entry}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl', entry 2: .* expected file_name and text or caption"):
        opened(tmp_path)


def test_texts_in_tar_files(tmp_path):
    members = {"a/0.jpg": encoded(0), "a/0.txt": b"zero\n", "a/1.x.png": encoded(1), "a/1.txt": "é".encode()}
    tar_file(tmp_path / "train-0.tar", members | {"2.png": encoded(2), "a/.0.txt": b"hidden"})
    tar_file(tmp_path / "train-1.tar", {"a/0.png": encoded(3), "a/0.txt": b"other shard"})
    assert texts_by_name(opened(tmp_path)) == {
        "train-0.tar#a/0.jpg": ["zero"], "train-0.tar#a/1.x.png": ["é"], "train-0.tar#2.png": [],
        "train-1.tar#a/0.png": ["other shard"],
    }  # fmt: skip


def test_class_names_make_texts(tmp_path):
    tinted_folder(tmp_path, ("dark_red", "green"), train=3, validation=2)
    images = opened(tmp_path, templates=["a {}.", "{} and {}"])
    assert images.texts_of(0) == ["a dark red.", "dark red and dark red"]
    assert len(images.source) == 6
    assert len(images.labeled.heldout) == 4
    assert class_prompts("{x}", ["a {}."]) == ["a {x}."]


def test_images_held_out_for_the_evaluation_are_not_trained_on(tmp_path):
    class_folder(tmp_path / "classes", one=10, two=10)
    images = opened(tmp_path / "classes", templates=["a {}"], train_val_split=0.2)
    assert len(images.source) == 16
    assert not set(images.source.ids) & set(images.labeled.heldout.ids)
    columns = {"image": [encoded(i) for i in range(20)], "text": [f"text {i}" for i in range(20)]}
    names = datasets.ClassLabel(names=["a", "b"])
    image_table(tmp_path / "train.parquet", types={"text": TEXT, "label": names}, label=[0, 1] * 10, **columns)
    file = str(tmp_path / "train.parquet")
    assert len(opened(file).source) == 20  # labels are not used unless they are asked for
    images = opened(file, eval_data=file, train_val_split=0.2)
    assert {id.replace("row/", "text "): [id.replace("row/", "text ")] for id in images.source.ids} == {
        text: [text] for text in list(images.corpus())
    }
    assert not set(images.source.ids) & set(images.labeled.heldout.ids)


@pytest.mark.parametrize("options", [{}, {"text_column": "alt"}, {"templates": ["a {}"]}])
def test_data_without_texts_is_an_error_that_says_what_to_do(options, tmp_path):
    image_table(tmp_path / "train.parquet", types={"other": TEXT}, image=[encoded(0)], other=["a"])
    with pytest.raises(ValueError, match=r"has no texts: .*\['other'\].* Set text_column, or give labeled images"):
        opened(tmp_path, **options)


# ---- Items


@pytest.fixture
def data(tmp_path):
    """Eight images: the third is broken, the fourth has no text, the others have two."""
    content = [encoded(i) if i != 2 else b"broken" for i in range(8)]
    texts = [[f"{i} one", f"{i} two"] if i != 3 else [] for i in range(8)]
    types = {"text": datasets.List(TEXT)}
    return image_table(tmp_path / "train.parquet", types=types, image=content, text=texts)


def dataset(folder, data, **options):
    args = arguments(folder, data, init_from=None, max_bad_share=1.0, **options)
    return ImageTextDataset(open_captioned(args), args), args


def test_items_depend_on_seed_epoch_and_image_alone(data, tmp_path):
    first, second = (dataset(tmp_path / name, data)[0] for name in "ab")
    items = {key: first[key] for key in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1))}
    for key, item in reversed(items.items()):
        again = second[key]
        assert again["text"] == item["text"]
        assert torch.equal(again["pixel_values"], item["pixel_values"])
    assert {items[epoch, 0]["text"] for epoch in range(4)} == {"0 one", "0 two"}
    assert not torch.equal(items[0, 0]["pixel_values"], items[1, 0]["pixel_values"])
    pixels = items[0, 0]["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16), torch.uint8)


def test_a_flip_mirrors_the_crop(data, tmp_path):
    plain, flipped = (dataset(tmp_path / str(p), data, flip_probability=p)[0][0, 0] for p in (0.0, 1.0))
    assert torch.equal(plain["pixel_values"].flip(-1), flipped["pixel_values"])


def test_images_that_cannot_be_used_are_replaced_with_their_text_and_recorded(data, tmp_path):
    made, args = dataset(tmp_path / "run", data)
    for index in range(8):
        item = made[0, index]
        assert item["text"].startswith(f"{item['sample_ids']} ")
        assert (item["sample_ids"] == index) == (index not in (2, 3))
    records = {record["path"]: record["kind"] for record in json_lines(args.folder / "bad_images.jsonl")}
    assert records == {f"{data}, row 2": "not an image", "row/3": "no text"}


def test_too_many_images_without_text_stop_the_run(data, tmp_path):
    args = arguments(tmp_path / "run", data, init_from=None)
    made = ImageTextDataset(open_captioned(args), args)
    with pytest.raises(TooManyBadImagesError, match="1 no text"):
        [made[0, index] for index in range(8)]
