"""Tests of the multi-crop data set, its sampler, block masks and the collator."""

import dataclasses
import itertools
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from builders import encoded
from hf_regvit.data import bad_images as bad_images_module
from hf_regvit.data import decoding as image_guard
from hf_regvit.data import tables
from hf_regvit.data.augmentation import MultiCrop, normalize_pixels
from hf_regvit.pretraining import crops as crops_module
from hf_regvit.training import samplers

# --- Data set, sampler, masks, collator


def small_set(tiles, **options) -> crops_module.MultiCropDataset:
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=2, patch_size=8)
    return crops_module.MultiCropDataset(tiles.subset(range(0, 2214, 100)), multi_crop, seed=5, **options)


def test_dataset_item(tiles):
    dataset = small_set(tiles)
    item = dataset[(3, 4)]
    assert (item["sample_id"], item["epoch"]) == (4, 3)
    expected = dataset.multi_crop(dataset.source[4].image, seed=5, epoch=3, sample_id=4)
    assert torch.equal(item["global_crops"], expected["global_crops"])
    assert torch.equal(item["local_crops"], expected["local_crops"])


@pytest.mark.parametrize("locals_from_globals", [False, True])
def test_gram_crops_are_the_global_crops_at_their_size(tiles, locals_from_globals):
    """The same regions, flips, colors and blur as a run with larger crops, and the student's crops unchanged."""
    sizes = {"local_size": 16, "num_local_crops": 2, "patch_size": 8, "locals_from_globals": locals_from_globals}
    plain, larger = (MultiCrop(global_size=size, **sizes) for size in (32, 48))
    both = dataclasses.replace(plain, gram_size=48)
    for index in range(6):
        draw = {"seed": 5, "epoch": 1, "sample_id": index}
        crops = both(tiles[index].image, **draw)
        assert torch.equal(crops["gram_crops"], larger(tiles[index].image, **draw)["global_crops"])
        for name, expected in plain(tiles[index].image, **draw).items():
            assert torch.equal(crops[name], expected)
    samples = [{**both(tiles[index].image, **draw), "sample_id": index, "epoch": 1} for index in (3, 4)]
    batch = crops_module.DinoCollator((4, 4), seed=5)(samples)
    assert batch["gram_crops"].shape == (2, 2, 3, 48, 48)
    assert torch.equal(batch["gram_crops"][1, 0], normalize_pixels(samples[0]["gram_crops"])[1])
    with pytest.raises(ValueError, match=r"gram_size=50 is not a multiple of patch_size=8\. Use 48"):
        dataclasses.replace(plain, gram_size=50)


@pytest.mark.parametrize("budget", [0, 3 * 64 * 64 * 4, 2**20])
def test_dataset_cache_keeps_to_its_budget_and_changes_nothing(tiles, budget):
    dataset = small_set(tiles)
    dataset.cache_bytes = budget
    first = [dataset[(0, i)]["global_crops"] for i in range(len(dataset))]
    assert dataset._cached_bytes <= budget
    assert len(dataset._cache) == min(len(dataset), budget // (64 * 64 * 4))
    assert all(torch.equal(crops, dataset[(0, i)]["global_crops"]) for i, crops in enumerate(first))


def test_dataset_workers_start_where_opencv_has_threads(tiles):
    """Shutting down a thread pool of the parent in a forked worker once caused a deadlock."""
    import cv2

    cv2.setNumThreads(2)
    picture = np.zeros((2000, 2000, 3), np.uint8)
    for _ in range(3):
        cv2.GaussianBlur(picture, (9, 9), 2.0)  # large enough for OpenCV to start its pool
    dataset = small_set(tiles)
    loader = torch.utils.data.DataLoader(dataset, sampler=[(0, 0), (0, 1)], num_workers=1, timeout=60)
    assert len(list(loader)) == 2
    assert cv2.getNumThreads() == 1


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_dataset_batches_do_not_depend_on_workers(tiles, num_workers):
    dataset = small_set(tiles)
    collator = crops_module.DinoCollator((4, 4), seed=5)
    sampler = samplers.EpochSampler(len(dataset), seed=5)
    sampler.set_epoch(2)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, sampler=sampler, collate_fn=collator, num_workers=num_workers
    )
    batches = list(loader)
    keys = list(sampler)[8:16]
    expected = collator([dataset[key] for key in keys])
    assert batches[1].keys() == expected.keys()
    assert all(torch.equal(batches[1][name], expected[name]) for name in expected)


def test_sampler_is_a_permutation_per_epoch():
    sampler = samplers.EpochSampler(50, seed=1)
    first = list(sampler)
    assert len(sampler) == len(first) == 50
    assert [epoch for epoch, _ in first] == [0] * 50
    assert sorted(index for _, index in first) == list(range(50))
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert [index for _, index in sampler] != [index for _, index in first]
    assert next(iter(sampler))[0] == 1
    assert list(samplers.EpochSampler(50, seed=2)) != first


def test_sampler_nothing_to_sample():
    with pytest.raises(ValueError, match="There are 0 training images for steps of 1"):
        samplers.EpochSampler(0, seed=1)


# ---- Weights: Mixed sources: keys are unique, shares are met, and weights of None change nothing.


def weights_keys(epochs, **options):
    sampler = samplers.EpochSampler(**options)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yield list(sampler)


@pytest.mark.parametrize("weights", [[3, 1], [1, 3], [0.5, 0.5], [1, 0.001]])
def test_weights_shares_and_no_key_twice(weights):
    options = {"num_samples": 100, "parts": (80, 20), "weights": weights, "seed": 3}
    epochs = list(weights_keys(9, **options))
    for keys in epochs:
        assert len(keys) == 100
        small = sum(index >= 80 for _, index in keys)
        assert small == round(100 * weights[1] / sum(weights))
    whole = [key for keys in epochs for key in keys]
    assert len(set(whole)) == len(whole)
    # Every completed pass over a source had each of its images once.
    for low, high in ((0, 80), (80, 100)):
        passes = {}
        for number, index in whole:
            if low <= index < high:
                passes.setdefault(number, []).append(index)
        for number in sorted(passes)[:-1]:
            assert sorted(passes[number]) == list(range(low, high))


def test_weights_starts_anywhere():
    options = {"num_samples": 50, "parts": (40, 10), "weights": [1, 1], "seed": 3, "images_per_step": 10}
    (whole,) = weights_keys(1, **options)
    sampler = samplers.EpochSampler(**options)
    sampler.start_at(0, 20)
    assert list(sampler) == whole[20:]


def test_weights_without_weights_sources_are_one_after_another():
    assert list(samplers.EpochSampler(50, seed=3, parts=(40, 10))) == list(samplers.EpochSampler(50, seed=3))


def test_weights_the_order_of_sources_does_not_change_their_shares():
    """A tie in the number of images must not depend on the order in which a processor adds the weights."""
    weights = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1])
    shares = samplers.checked_weights(weights, 10)
    orders = [np.random.default_rng(seed).permutation(10) for seed in range(40)]
    assert len({weights[order].sum() for order in orders}) > 1
    assert all((samplers.checked_weights(weights[order], 10) == shares[order]).all() for order in orders)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, 1, 1]])
def test_weights_weights_that_cannot_be_meant(weights):
    with pytest.raises(ValueError, match=r"data_weights=.*one positive number for each of the 2 sources"):
        samplers.EpochSampler(50, seed=3, parts=(40, 10), weights=weights)


def stream_of(num_shards=4, rows=25, name="s", broken=None):
    """Numbered 16 x 16 images; the red channel is the shard, the green one the row."""

    def open_shard(shard):
        for row in range(rows):
            if (shard, row) == broken:
                raise OSError("Truncated file")
            picture = encoded(Image.new("RGB", (16, 16), (shard, row, 0)), "PNG")
            yield tables.StreamRecord(f"{name}/{shard}#{row}", picture)

    return tables.ImageStream(name, num_shards, open_shard)


def ids(sampler, count):
    return [(number, record.id) for number, record in itertools.islice(sampler, count)]


def test_stream_every_image_once_per_pass_in_a_new_order():
    sampler = samplers.StreamSampler([stream_of()], seed=1, buffer_size=30)
    keys = ids(sampler, 300)
    assert [number for number, _ in keys] == [0] * 100 + [1] * 100 + [2] * 100
    orders = [[id for _, id in keys[start : start + 100]] for start in (0, 100, 200)]
    assert all(len(set(order)) == 100 for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # Images are shuffled across shards: the first tenth has images of more than one shard.
    assert len({id.split("#")[0] for id in orders[0][:10]}) > 1
    assert keys == ids(samplers.StreamSampler([stream_of()], seed=1, buffer_size=30), 300)
    assert keys != ids(samplers.StreamSampler([stream_of()], seed=2, buffer_size=30), 300)


@pytest.mark.parametrize("skip", [0, 1, 99, 100, 137])
def test_stream_starts_anywhere(skip):
    whole = ids(samplers.StreamSampler([stream_of()], seed=1, buffer_size=30), 200)
    sampler = samplers.StreamSampler([stream_of()], seed=1, buffer_size=30)
    sampler.start_at(skip)
    assert ids(sampler, 200 - skip) == whole[skip:]


@pytest.mark.parametrize(("shards", "world_size"), [(4, 2), (4, 4), (4, 3), (1, 2), (5, 2)])
def test_stream_processes_share_a_pass_without_overlap(shards, world_size):
    every = []
    for rank in range(world_size):
        sampler = samplers.StreamSampler([stream_of(shards)], seed=1, rank=rank, world_size=world_size)
        every += [key for key in ids(sampler, 2 * 25 * shards) if key[0] == 0]
    assert len(every) == len(set(every)) == 25 * shards


@pytest.mark.parametrize(("shards", "world_size"), [(4, 2), (3, 2), (1, 2)])
def test_stream_shares_are_as_large_as_those_of_split_dataset_by_node(shards, world_size, tmp_path):
    import datasets
    from datasets.distributed import split_dataset_by_node

    for shard in range(shards):
        datasets.Dataset.from_dict({"n": list(range(25))}).to_parquet(str(tmp_path / f"{shard}.parquet"))
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    for rank in range(world_size):
        theirs = sum(1 for _ in split_dataset_by_node(table, rank, world_size))
        sampler = samplers.StreamSampler([stream_of(shards)], seed=1, rank=rank, world_size=world_size)
        ours = sum(number == 0 for number, _ in ids(sampler, 2 * 25 * shards))
        assert ours == theirs


def test_stream_several_streams():
    both = [stream_of(2, 10, "a"), stream_of(3, 10, "b")]
    keys = ids(samplers.StreamSampler(both, seed=1), 50)
    assert len(set(keys)) == 50  # one pass over all
    weighted = ids(samplers.StreamSampler(both, seed=1, weights=[3, 1]), 4000)
    share = sum(id.startswith("a") for _, id in weighted) / 4000
    assert 0.72 < share < 0.78
    assert len(set(weighted)) == 4000


def test_stream_f38_the_rest_of_a_broken_shard_is_left_out_and_recorded(tmp_path):
    bad = bad_images_module.BadImages(tmp_path / "bad_images.jsonl")
    sampler = samplers.StreamSampler([stream_of(broken=(2, 10))], seed=1, bad_images=bad)
    keys = ids(sampler, 170)
    assert [number for number, _ in keys] == [0] * 85 + [1] * 85
    (line,) = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    assert "shard 2" in line
    assert "Truncated file" in line


def test_stream_a_lost_connection_is_no_broken_shard():

    broken = Mock(side_effect=ConnectionError("reset by peer"))
    with pytest.raises(ConnectionError):
        next(iter(samplers.StreamSampler([tables.ImageStream("s", 1, broken)], seed=1)))


def test_stream_nothing_to_read():
    with pytest.raises(ValueError, match="No image could be read from 's'"):
        next(iter(samplers.StreamSampler([stream_of(rows=0)], seed=1)))


def test_stream_number_of_an_id():
    """Fixed values, because a resumed run must draw the same numbers as the first one."""
    assert samplers.stream_sample_id("shard-000.tar#000017.jpg") == 6888450132931468485
    numbers = {samplers.stream_sample_id(f"{i}") for i in range(5000)}
    assert len(numbers) == 5000
    assert max(numbers) < 2**63


def stream_dataset(stream, **options):
    multi_crop = MultiCrop(global_size=16, local_size=8, num_local_crops=1, patch_size=8)
    return crops_module.MultiCropStream([stream], multi_crop, seed=5, **options)


def test_stream_says_what_a_resumed_run_can_expect(caplog):
    with caplog.at_level("INFO", logger="hf_regvit"):
        stream_dataset(stream_of()).sampler(rank=1, world_size=2)
        assert not caplog.messages
        stream_dataset(stream_of()).sampler()
    (message,) = caplog.messages
    assert message.startswith("Streaming 4 shards of s. A resumed run reads them again")
    assert "does not hold for another number of processes or if shards have changed" in message


def test_stream_items():
    dataset = stream_dataset(stream_of())
    key = next(iter(dataset.sampler()))
    item = dataset[key]
    sample_id = samplers.stream_sample_id(key[1].id)
    expected = dataset.multi_crop(image_guard.open_image(key[1].data), seed=5, epoch=key[0], sample_id=sample_id)
    assert torch.equal(item["global_crops"], expected["global_crops"])
    assert (item["sample_id"], item["epoch"]) == (sample_id, 0)


@pytest.mark.parametrize("with_bad_ones", [False, True])
def test_stream_batches_do_not_depend_on_workers(with_bad_ones):
    stream = stream_of(2, 12)
    if with_bad_ones:
        whole = stream.open_shard

        def open_shard(shard):
            for number, record in enumerate(whole(shard)):
                yield dataclasses.replace(record, data=None) if number % 5 == 0 else record

        stream = dataclasses.replace(stream, open_shard=open_shard)

    def batches(num_workers):
        dataset = stream_dataset(stream, bad_images=bad_images_module.BadImages(max_bad_share=1.0))
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=4, sampler=dataset.sampler(), num_workers=num_workers,
            collate_fn=crops_module.DinoCollator((2, 2), seed=5),
        )  # fmt: skip
        return list(itertools.islice(loader, 8))

    alone = batches(0)
    assert all(batch["global_crops"].shape == (2, 4, 3, 16, 16) for batch in alone)
    for num_workers in (1, 2):
        for one, other in zip(alone, batches(num_workers), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_stream_bad_images_are_replaced_within_their_batch(tmp_path):
    record = tables.StreamRecord("a", encoded(Image.new("RGB", (16, 16)), "PNG"))
    bad = bad_images_module.BadImages(tmp_path / "bad.jsonl")
    dataset = stream_dataset(stream_of(), bad_images=bad)
    items = dataset.__getitems__([(0, record), (0, tables.StreamRecord("b", b"<html>"))])
    assert [item["sample_id"] for item in items] == [
        samplers.stream_sample_id("a"),
        samplers.stream_sample_id("b"),
    ]
    assert '"path": "b"' in (tmp_path / "bad.jsonl").read_text()
    with pytest.raises(bad_images_module.TooManyBadImagesError, match="None of the 1 images"):
        dataset.__getitems__([(0, tables.StreamRecord("b", b""))])
    with pytest.raises(image_guard.BadImageError, match="the cell is empty"):
        stream_dataset(stream_of())[(0, tables.StreamRecord("c", None))]


def test_stream_too_many_bad_images_in_a_stream():
    record = tables.StreamRecord("good", encoded(Image.new("RGB", (16, 16)), "PNG"))
    dataset = stream_dataset(stream_of(), bad_images=bad_images_module.BadImages(max_bad_share=0.01))
    keys = [[(0, record), (0, tables.StreamRecord(f"bad {i}", b""))] for i in range(11)]
    for pair in keys[:10]:
        dataset.__getitems__(pair)
        dataset.__getitems__(pair)  # repeated on purpose: no new image
    with pytest.raises(bad_images_module.TooManyBadImagesError, match=r"11 of the \d+ images"):
        dataset.__getitems__(keys[10])


def slow_positions(masks):
    indices, weights = [], []
    for row, mask in enumerate(masks.flatten(0, -2).tolist()):
        for column, hidden in enumerate(mask):
            if hidden:
                indices.append(row * len(mask) + column)
                weights.append(1 / sum(mask))
    return torch.tensor(indices, dtype=torch.int64), torch.tensor(weights)


def test_masks_masked_positions_equal_the_slow_twin():
    masks = torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    masks[0, 1] = False
    indices, weights = crops_module.masked_positions(masks)
    expected = slow_positions(masks)
    assert torch.equal(indices, expected[0])
    assert torch.equal(weights, expected[1])
    assert weights.sum().item() == pytest.approx(9)  # every masked crop has a total weight of 1


def test_masks_nothing_masked():
    indices, weights = crops_module.masked_positions(torch.zeros(2, 3, 4, dtype=torch.bool))
    assert indices.shape == weights.shape == (0,)
    assert indices.dtype == torch.int64


def test_masks_block_mask_on_a_rectangular_grid():
    for target in (0, 1, 5, 17, 40):
        mask = crops_module.block_mask((5, 12), target, random.Random(target))
        assert mask.shape == (5, 12)
        assert mask.sum() <= target


def test_masks_tiny_grid_ends():
    """An empty mask after ten tries, because no rectangle fits strictly inside a 1 x 1 grid."""
    assert crops_module.block_mask((1, 1), 1, random.Random(0)).sum() == 0


def test_masks_share_of_empty_masks_on_a_4x4_grid():
    rng = random.Random(0)
    empty = sum(crops_module.block_mask((4, 4), 1, rng).sum() == 0 for _ in range(2000)) / 2000
    assert 0.15 < empty < 0.35  # the specification measured about a quarter


@pytest.mark.parametrize(
    ("batch", "grid", "bound"),
    [(64, (14, 14), 3771), (64, (16, 16), 4941), (32, (16, 16), 2496), (16, (16, 16), 1274), (12, (16, 16), 967)],
)
def test_masks_total_is_stratified_below_its_bound(batch, grid, bound):
    edges = np.linspace(0.1, 0.5, batch + 1)
    assert sum(int(grid[0] * grid[1] * edge) for edge in edges[1:]) == bound
    totals = [crops_module.batch_masks(grid, 2 * batch, random.Random(seed)).sum() for seed in range(3)]
    assert max(totals) <= bound
    assert min(totals) > 0.9 * bound


def collator_batch(tiles, **options):
    dataset = small_set(tiles)
    samples = [dataset[(2, i)] for i in range(6)]
    return samples, crops_module.DinoCollator((4, 4), **{"seed": 3} | options)(samples)


def test_collator_keys_and_shapes(tiles):
    samples, batch = collator_batch(tiles)
    assert list(batch)[:5] == ["global_crops", "local_crops", "masks", "mask_indices", "mask_weights"]
    assert batch["sample_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch["epochs"].tolist() == [2] * 6
    assert batch["global_crops"].shape == (2, 6, 3, 32, 32)
    assert batch["local_crops"].shape == (2, 6, 3, 16, 16)
    assert batch["masks"].shape == (2, 6, 16)
    assert batch["masks"].dtype == torch.bool
    for crop in range(2):
        for i, sample in enumerate(samples):
            assert torch.equal(batch["global_crops"][crop, i], normalize_pixels(sample["global_crops"])[crop])
            assert torch.equal(batch["local_crops"][crop, i], normalize_pixels(sample["local_crops"])[crop])
    indices, weights = slow_positions(batch["masks"])
    assert torch.equal(batch["mask_indices"], indices)
    assert torch.equal(batch["mask_weights"], weights)


def test_collator_masks_depend_on_seed_epoch_and_ids(tiles):
    samples, batch = collator_batch(tiles)
    assert torch.equal(batch["masks"], collator_batch(tiles)[1]["masks"])
    assert not torch.equal(batch["masks"], collator_batch(tiles, seed=4)[1]["masks"])
    collator = crops_module.DinoCollator((4, 4), seed=3)
    for key in ("epoch", "sample_id"):
        changed = [sample | {key: sample[key] + 1} for sample in samples]
        assert not torch.equal(batch["masks"], collator(changed)["masks"])


def test_collator_share_of_masked_crops(tiles):
    _, batch = collator_batch(tiles, mask_ratio=(0.3, 0.6), mask_probability=0.25)
    assert (batch["masks"].sum(-1) > 0).sum() <= 3
    assert not collator_batch(tiles, mask_probability=0.0)[1]["masks"].any()
