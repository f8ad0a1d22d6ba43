"""Fine-tuning: label checks, loss and metrics against loops, and runs of a tenth of a second."""

import copy
import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file

from builders import PoisonAt, StopAt, WreckFrom, class_folder
from hf_regvit.data.bad_images import TooManyBadImagesError
from hf_regvit.evaluation.intervals import wilson_interval
from hf_regvit.evaluation.metrics import ClassScores, TopKAccuracy
from hf_regvit.figures import curves
from hf_regvit.figures.curves import draw_finetuning_curves
from hf_regvit.figures.maps import save_figure
from hf_regvit.figures.masks import mask_figure
from hf_regvit.finetuning.classification import (
    ClassificationMetrics,
    ImageClassification,
    classification_loss,
    training_transform,
)
from hf_regvit.finetuning.data import IGNORED, LabelError, MixingCollator, bad_images, class_weights, draws, open_data
from hf_regvit.finetuning.model import choose_trained, open_for_task
from hf_regvit.finetuning.run import conclusion, finetune
from hf_regvit.finetuning.trainer import optimizer_groups
from hf_regvit.hub.card import card_header, check_card
from hf_regvit.training.checkpoints import list_checkpoints
from hf_regvit.training.finite import NonFiniteError
from hf_regvit.training.lora import merged_state
from hf_regvit.training.samplers import EpochSampler
from tiny_finetune import SIDE, arguments, backbone, picture, run, source
from tiny_run import same_state

pytestmark = pytest.mark.usefixtures("without_figures")
TESTS_OF_FIGURES = {
    "test_the_folder_of_a_run_says_what_it_is_in_words_and_images",
    "test_names_with_commas_and_dollars_in_tables_and_images",
}


# ---- Labels ------------------------------------------------------------------------------------------------------


def table_of(path, labels, names=None, column="label"):
    import datasets

    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    if isinstance(labels[0], str):
        feature = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), column: datasets.Value("int64") if names else feature})
    rows = {"image": [picture(i, 0) for i in range(len(labels))], column: labels}
    table = datasets.Dataset.from_dict(rows, features=features)
    if names:  # a ClassLabel with fewer names than its ids need
        table = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=datasets.Features(
            {"image": datasets.Image(), column: feature})))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))
    return path


def test_f27_a_single_class_is_refused_with_its_name(tmp_path):
    root = class_folder(tmp_path / "one", cat=6)
    with pytest.raises(LabelError, match=r"single class, 'cat'; a classifier needs at least two"):
        open_data(arguments(tmp_path / "run", data=str(root)))


def test_f27_a_single_class_that_is_left_of_several(tmp_path):
    class_folder(tmp_path / "data", cat=6, dog=6)
    args = arguments(tmp_path / "run", data=str(tmp_path / "data"), max_train_samples=1)
    with pytest.raises(LabelError, match=r"all 1 training images are of one class"):
        open_data(args)


def test_f28_classes_of_validation_that_training_lacks_are_listed(tmp_path):
    train, validation = class_folder(tmp_path / "a", cat=3, dog=3), class_folder(tmp_path / "b", cat=2, horse=2)
    args = arguments(tmp_path / "run", train_dir=str(train), validation_dir=str(validation))
    with pytest.raises(
        LabelError,
        match=r"1 classes without training images: 'horse'.*1 training classes are missing from validation: 'dog'"
        r".*ignore_extra",
    ):
        open_data(args)
    args.ignore_extra_classes = True
    kept = open_data(args).heldout
    assert (kept.labels, kept.label_names) == ([0, 0], ("cat", "dog"))


def test_f28_extra_classes_of_a_folder_with_both_parts_are_left_out_too(tmp_path, caplog):
    class_folder(tmp_path / "train", cat=3, dog=3)
    class_folder(tmp_path / "validation", ant=1, dog=2)
    args = arguments(tmp_path / "run", data=str(tmp_path))
    with pytest.raises(ValueError, match=r"1 classes without training images: 'ant'.*--ignore_extra_classes"):
        open_data(args)
    args.ignore_extra_classes = True
    kept = open_data(args).heldout
    assert (kept.labels, kept.label_names, len(kept)) == ([1, 1], ("cat", "dog"), 2)
    assert "1 validation images of 1 classes without training images are ignored: 'ant'" in caplog.text
    (tmp_path / "validation" / "dog").rename(tmp_path / "validation" / "bee")
    with pytest.raises(LabelError, match="no validation images of the 2 training classes"):
        open_data(args)


def test_f28_class_numbers_follow_the_names_of_training(tmp_path):
    train, validation = class_folder(tmp_path / "a", ant=2, bee=2, cow=2), class_folder(tmp_path / "b", bee=1, cow=2)
    args = arguments(tmp_path / "run", train_dir=str(train), validation_dir=str(validation))
    validation = open_data(args).heldout
    assert validation.labels == [1, 2, 2]


def test_f29_class_numbers_out_of_range_are_named_with_their_rows(tmp_path):
    path = table_of(tmp_path / "data" / "train.parquet", [0, 1, 2, 1, 7], names=["a", "b"])
    with pytest.raises(LabelError, match=r"2 training images have a class id outside of 0 to 1.*row/2 has 2; row/4"):
        open_data(arguments(tmp_path / "run", train_dir=str(path)))


def test_f29_rows_without_a_label_are_named(tmp_path):
    path = table_of(tmp_path / "data" / "train.parquet", [0, -1, 1, 1])
    with pytest.raises(LabelError, match=r"1 of 4 rows of column 'label' are empty or negative, for example row/1"):
        open_data(arguments(tmp_path / "run", train_dir=str(path)))


def test_labels_as_text_and_without_a_column(tmp_path):
    path = table_of(tmp_path / "text" / "train.parquet", ["cat", "dog"])
    with pytest.raises(LabelError, match=r"column 'label' holds.*string.*class_encode_column"):
        open_data(arguments(tmp_path / "run", train_dir=str(path)))
    path = table_of(tmp_path / "other" / "train.parquet", [0, 1], column="kind")
    with pytest.raises(LabelError, match=r"there is no column 'label'.*Columns: kind.*--label_column"):
        open_data(arguments(tmp_path / "run", train_dir=str(path)))


def test_images_outside_of_class_folders_are_named(tmp_path):
    root = class_folder(tmp_path / "data", cat=2, dog=2)
    picture(0, 0).save(root / "loose.png")
    with pytest.raises(LabelError, match=r"1 images are not in a subfolder, for example 'loose.png'"):
        open_data(arguments(tmp_path / "run", data=str(root)))


def test_a_class_that_is_called_as_a_part_is_told_so(tmp_path):
    root = class_folder(tmp_path / "vehicles", bus=2, train=2)
    with pytest.raises(
        LabelError, match=r"there are no class folders in 'train', whose name is that of a split and not of a class"
    ):
        open_data(arguments(tmp_path / "run", data=str(root)))


def test_a_share_of_every_class_is_held_out_whatever_the_seed(tmp_path):
    root = class_folder(tmp_path / "data", cat=20, dog=10)
    args = arguments(tmp_path / "run", data=str(root), train_val_split=0.2)
    parts = open_data(args)
    train, validation = parts.train, parts.heldout
    assert not set(train.ids) & set(validation.ids)
    assert (validation.labels.count(0), validation.labels.count(1), len(train)) == (4, 2, 24)
    args.seed = 6
    assert open_data(args).heldout.ids == validation.ids
    args.train_val_split = 0.3
    assert open_data(args).heldout.ids != validation.ids


def test_data_without_a_training_part_names_the_option_that_takes_all(tmp_path):
    path = table_of(tmp_path / "validation.parquet", [0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"has no train split. .*Use --train_dir instead of --data to train on all images"
    ):
        open_data(arguments(tmp_path / "run", data=str(tmp_path)))
    parts = open_data(arguments(tmp_path / "run", train_dir=str(path), train_val_split=0.5))
    train, validation = parts.train, parts.heldout
    assert (len(train), len(validation)) == (2, 2)


def test_nothing_to_train_on_says_which_options(tmp_path):
    with pytest.raises(ValueError, match=r"--data .* or --train_dir"):
        open_data(arguments(tmp_path))


def test_balanced_weights_are_inverse_to_the_counts_with_mean_one():
    labels = [0] * 6 + [1] * 3 + [2]
    counts = np.bincount(labels)
    weights = class_weights(["balanced"], counts, "abc")
    loop = [10 / (3 * labels.count(label)) for label in range(3)]
    torch.testing.assert_close(weights, torch.tensor(loop, dtype=torch.float32))
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1.0)
    torch.testing.assert_close(class_weights(["1", "2", "3"], counts, "abc"), torch.tensor([1.0, 2, 3]) / 1.5)
    with pytest.raises(LabelError, match=r"2 numbers, but 3 are needed"):
        class_weights(["1", "2"], counts, "abc")


# ---- Loss and metrics --------------------------------------------------------------------------------------------


def loss_loop(logits, shares, kind, smoothing, weights):
    """Compute the loss one number at a time, in double precision."""
    total, classes = 0.0, logits.shape[1]
    for row, target in zip(logits.double().tolist(), shares.double().tolist(), strict=True):
        asked = [float(t > 0) for t in target] if kind == "bce" else target
        asked = [t * (1 - smoothing) + smoothing / classes for t in asked]
        if kind == "bce":
            probabilities = [1 / (1 + math.exp(-x)) for x in row]
            terms = [-t * math.log(p) - (1 - t) * math.log(1 - p) for t, p in zip(asked, probabilities, strict=True)]
            loss = sum(terms) / classes
        else:
            normalizer = math.log(sum(math.exp(x) for x in row))
            loss = sum(-t * (x - normalizer) for t, x in zip(asked, row, strict=True))
        total += loss * (1.0 if weights is None else sum(t * w for t, w in zip(target, weights.tolist(), strict=True)))
    return total / len(logits)


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_equals_a_loop(kind, mixed, smoothing, weighted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    classes = torch.tensor([0, 3, 1, 1, 2, 0])
    shares = F.one_hot(classes, 4).float()
    if mixed:
        shares = 0.3 * shares + 0.7 * shares.roll(1, 0)
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5]) if weighted else None
    options = {"kind": kind, "smoothing": smoothing, "weights": weights}
    loss = classification_loss(logits, shares if mixed else classes, **options)
    assert loss.item() == pytest.approx(loss_loop(logits, shares, kind, smoothing, weights), rel=1e-5)
    halves = [
        classification_loss(logits[s], (shares if mixed else classes)[s], **options) for s in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(loss, torch.stack(halves).mean())


def test_smoothed_cross_entropy_is_that_of_torch():
    logits, classes = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    ours = classification_loss(logits, classes, smoothing=0.2)
    torch.testing.assert_close(ours, F.cross_entropy(logits, classes, label_smoothing=0.2))


def test_metrics_equal_those_of_scikit_learn():
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(60, 8)), rng.integers(0, 8, 60)
    metrics = ClassificationMetrics(8)
    for start in range(0, 60, 16):
        metrics.update(scores[start : start + 16], truth[start : start + 16])
    metrics.update(rng.normal(size=(2, 8)), np.array([IGNORED, IGNORED]))
    said, result = scores.argmax(1), metrics.compute()
    assert result["accuracy"] == pytest.approx(accuracy_score(truth, said))
    assert result["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert result["f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert result["top5_accuracy"] == pytest.approx(top_k_accuracy_score(truth, scores, k=5))
    assert result["skipped_images"] == 2
    interval = binomtest(int((said == truth).sum()), 60).proportion_ci(method="wilson")
    assert (result["accuracy_low"], result["accuracy_high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)


@pytest.mark.parametrize(
    ("measured", "intervals", "text"),
    [
        ({"accuracy": 33 / 36, "skipped_images": 4.0}, {"accuracy": (0.78, 0.97)},
         "Accuracy 91.7 % (33 of 36; 95 % interval 78 to 97)"),
        ({"mean_iou": 0.5, "mean_accuracy": 0.6}, {"mean_iou": (0.4, 0.62), "mean_accuracy": (0.5, 0.7)},
         "Mean iou 50 % (95 % interval 40 to 62)"),
        ({"rmse": 0.5123, "delta1": 0.9}, {"rmse": (0.4, 0.6), "delta1": (0.8, 1)},
         "Rmse 0.512 (95 % interval 0.4 to 0.6)"),
        ({"loss": 1.0}, {}, ""),
    ],
)  # fmt: skip
def test_the_conclusion_is_the_main_metric(measured, intervals, text):
    assert conclusion({"eval": measured, "intervals": intervals, "images": {"validation": 40}}) == text


def test_intervals_of_shares_stay_between_0_and_1():
    for n in range(1, 60):
        (low, some), (more, high) = wilson_interval(0.0, n), wilson_interval(1.0, n)
        assert 0 <= low < some < 1
        assert 0 < more < high <= 1


def test_the_numbers_of_a_run_are_those_of_the_metrics_of_the_package():
    """The scores in `metrics.json` and on the card equal those of `hf_regvit.evaluation.metrics` on the logits."""
    rng = np.random.default_rng(1)
    scores, truth = rng.integers(0, 4, (50, 7)) / 2.0, rng.integers(0, 6, 50)  # many ties, and a class without samples
    metrics = ClassificationMetrics(7)
    for start in range(0, 50, 8):
        metrics.update(scores[start : start + 8], truth[start : start + 8])
    result = metrics.compute()
    top = TopKAccuracy(k=(1, 5)).compute(predictions=scores, references=truth)
    classes = ClassScores(num_classes=7).compute(predictions=scores, references=truth)
    assert (result["accuracy"], result["top5_accuracy"]) == (top["top1"], top["top5"])
    assert (result["f1"], result["mean_class_accuracy"]) == (classes["f1"], classes["mean_class_accuracy"])
    assert metrics.confusion.tolist() == classes["confusion_matrix"]
    assert metrics.confusion.diag().sum() == round(50 * result["accuracy"])
    with pytest.raises(ValueError, match="no data to compute from"):
        ClassificationMetrics(7).compute()


# ---- Order and draws ---------------------------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch_and_in_another_order_the_next():
    sampler = EpochSampler(20, seed=1, images_per_step=4, repeats=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(index for _, index, _ in first) == sorted(index for _, index, _ in second) == list(range(20))
    assert [index for _, index, _ in first] != [index for _, index, _ in second]
    assert {(epoch, repeat) for epoch, _, repeat in second} == {(1, 0)}


def test_repeated_augmentation_repeats_images_side_by_side():
    sampler = EpochSampler(20, seed=1, images_per_step=6, repeats=3)
    keys = list(sampler)
    assert len(keys) == 18
    for place in range(0, 18, 3):
        assert len({index for _, index, _ in keys[place : place + 3]}) == 1
        assert [repeat for *_, repeat in keys[place : place + 3]] == [0, 1, 2]
    assert len({index for _, index, _ in keys}) == 6


def test_f39_fewer_images_than_a_step_names_the_ways_out():
    with pytest.raises(ValueError, match=r"3 training images for steps of 8.*per_device_train_batch_size"):
        EpochSampler(3, seed=0, images_per_step=8)


AUGMENTED = {"augmentation": "three_augment", "color_jitter": 0.3, "random_erasing": 0.5}


@pytest.mark.parametrize("options", [AUGMENTED, {"augmentation": "randaugment"}, {"augmentation": "crop"}])
def test_augmentation_is_a_function_of_seed_epoch_image_and_repeat(tmp_path, options):
    args = arguments(tmp_path, **options)
    processor = open_for_task(args, task := ImageClassification(args, source(6), source(3)), backbone()).processor
    data, _ = task.datasets(processor)
    torch.manual_seed(1)
    first = data[3, 4, 1]
    before = torch.get_rng_state()
    again = data[3, 4, 1]
    assert torch.equal(before, torch.get_rng_state())  # the global generator is unchanged
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert first["pixel_values"].shape == (3, SIDE, SIDE)
    assert type(first["pixel_values"]) is torch.Tensor
    for other in ((3, 4, 0), (2, 4, 1)):
        assert not torch.equal(first["pixel_values"], data[other]["pixel_values"])


def test_no_augmentation_is_the_processor_itself(tmp_path):
    args = arguments(tmp_path, augmentation="none")
    task = ImageClassification(args, source(6), source(6))
    processor = open_for_task(args, task, backbone()).processor
    train, validation = task.datasets(processor)
    for index in range(6):
        wanted = processor(images=picture(index, index % 3), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(train[0, index, 0]["pixel_values"], wanted)
        assert torch.equal(validation[index]["pixel_values"], wanted)


def test_without_normalization_augmented_images_have_the_values_of_evaluated_ones(tmp_path):
    task = ImageClassification(arguments(tmp_path, augmentation="crop"), source(6), source(6))
    processor = open_for_task(task.args, task, backbone()).processor
    processor.do_normalize, processor.image_mean, processor.image_std = False, None, None
    train, validation = task.datasets(processor)
    for pixels in (train[0, 0, 0]["pixel_values"], validation[0]["pixel_values"]):
        assert 0 <= pixels.min() < pixels.max() <= 1


def test_every_option_of_the_augmentation_reaches_it(tmp_path):
    mean, std = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)

    def steps(**options):
        args = arguments(tmp_path, crop_scale=[0.2, 0.9], flip_probability=0.3, **options)
        made = training_transform(args, image_size=24, mean=mean, std=std).transforms
        return {type(step).__name__: step for step in made}

    found = steps(augmentation="randaugment", randaugment_num_ops=3, randaugment_magnitude=7, random_erasing=0.4)
    assert list(found) == [
        "RandomResizedCrop", "RandomHorizontalFlip", "RandAugment", "ToImage", "ToDtype", "Normalize", "RandomErasing"
    ]  # fmt: skip
    crop, mixed = found["RandomResizedCrop"], found["RandAugment"]
    assert (tuple(crop.size), crop.scale, crop.interpolation.value) == ((24, 24), (0.2, 0.9), "bicubic")
    assert (found["RandomHorizontalFlip"].p, found["RandomErasing"].p) == (0.3, 0.4)
    assert (mixed.num_ops, mixed.magnitude, mixed.interpolation.value) == (3, 7, "bilinear")
    assert mixed.fill == [128, 64, 32]
    assert (found["Normalize"].mean, found["Normalize"].std) == (list(mean), list(std))
    assert found["ToDtype"].scale
    found = steps(augmentation="three_augment", color_jitter=0.3)
    assert "RandAugment" not in found
    grayscale, solarize, blur = found["RandomChoice"].transforms
    assert (grayscale.p, solarize.p, solarize.threshold) == (1.0, 1.0, 128)
    assert (list(blur.kernel_size), list(blur.sigma)) == ([9, 9], [0.1, 2.0])
    jitter = found["ColorJitter"]
    for change in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert tuple(change) == pytest.approx((0.7, 1.3))
    assert jitter.hue is None
    assert list(found).index("RandomChoice") < list(found).index("ColorJitter")


def test_mixing_has_the_alphas_that_were_asked_for():
    mix = MixingCollator(3, mixup_alpha=0.8, cutmix_alpha=0.3, probability=1.0, seed=0)
    assert [(type(mixer).__name__, mixer.alpha) for mixer in mix.mixers] == [("MixUp", 0.8), ("CutMix", 0.3)]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_say_how_much_of_each_image_is_there(kind):
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0} | {f"{kind}_alpha": 1.0}
    mix = MixingCollator(4, probability=1.0, seed=0, **alphas)
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)  # image i is i everywhere
    items = [{"pixel_values": pixels[i].clone(), "labels": i, "sample_ids": i, "epochs": 2} for i in range(4)]
    batch = mix(items)
    own = batch["labels"].diagonal()
    assert torch.allclose(own, own[0].expand(4))
    assert 0 < own[0] < 1
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(4))
    # The mean pixel of every image is the mean of the two images, weighted as the target says.
    expected = batch["labels"] @ torch.arange(4.0)
    torch.testing.assert_close(batch["pixel_values"].mean((1, 2, 3)), expected)
    assert torch.equal(batch["pixel_values"], mix(items)["pixel_values"])


def test_a_mixing_probability_leaves_batches_as_they_are():
    mix = MixingCollator(3, mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.25, seed=0)
    unmixed = 0
    for epoch in range(200):
        items = [
            {"pixel_values": torch.rand(3, 4, 4), "labels": i, "sample_ids": i, "epochs": epoch} for i in range(3)
        ]
        unmixed += torch.equal(mix(items)["labels"], torch.eye(3))
    assert 130 <= unmixed <= 170  # 150 expected, standard deviation 6


def test_draws_depend_on_every_number():
    values = []
    for entropy in ((0, 1), (0, 2), (1, 1), (0, 1, 0)):
        with draws(*entropy):
            values.append(torch.rand(()).item())
    assert len(set(values)) == 4


def test_a_bad_training_image_is_recorded_and_replaced_with_the_label_of_its_replacement(tmp_path):
    args = arguments(tmp_path, augmentation="none", max_bad_share=0.5)
    train = source(6, broken=[2])
    task = ImageClassification(args, train, source(3))
    processor = open_for_task(args, task, backbone()).processor
    data, _ = task.datasets(processor)
    item = data[0, 2, 0]
    used = item["sample_ids"]
    assert used != 2
    assert item["labels"] == train.labels[used]
    wanted = processor(images=picture(used, used % 3), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(item["pixel_values"], wanted)
    (line,) = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "picture/2"


def test_bad_validation_images_are_left_out_of_the_metrics(tmp_path):
    args = arguments(tmp_path, max_bad_share=0.5)
    task = ImageClassification(args, source(6), source(6, broken=[1]))
    processor = open_for_task(args, task, backbone()).processor
    _, data = task.datasets(processor)
    assert data[1]["labels"] == IGNORED
    assert data[0]["labels"] == 0


def test_too_many_bad_images_stop_the_run(tmp_path):
    args = arguments(tmp_path, max_bad_share=0.0)
    guard = bad_images(args, train := source(6, broken=[0]))
    task = ImageClassification(args, train, source(3))
    processor = open_for_task(args, task, backbone()).processor
    data, _ = task.datasets(processor)
    assert guard.max_bad_share == 0.0
    with pytest.raises(TooManyBadImagesError, match=r"max_bad_share=0 allows"):
        data[0, 0, 0]


def test_bad_images_of_an_earlier_run_are_not_those_of_this_one(tmp_path, caplog):
    run(tmp_path, train=source(24, broken=[3]), max_bad_share=0.5, num_train_epochs=1)
    assert "1 images could not be used" in caplog.text
    caplog.clear()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run(tmp_path, num_train_epochs=1)
    assert "could not be used" not in caplog.text
    assert not (tmp_path / "bad_images.jsonl").exists()


# ---- What is trained ---------------------------------------------------------------------------------------------


def opened(tmp_path, *, model=None, **options):
    args = arguments(tmp_path, **options)
    task = ImageClassification(args, source(6), source(3))
    start = open_for_task(args, task, model or backbone())
    return start.network, args, start.changes


def test_layer_decay_and_weight_decay_of_every_parameter(tmp_path):
    network, args, _ = opened(tmp_path, layer_decay=0.5, head_learning_rate_multiplier=4.0, learning_rate=1.0)
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer_groups(network, args) for p in g["params"]}
    for name, parameter in network.named_parameters():
        depth = 3  # final norm and head: two blocks, then this
        if name.startswith("regvit.embeddings"):
            depth = 0
        elif name.startswith("regvit.layers."):
            depth = int(name.split(".")[2]) + 1
        rate = 0.5 ** (3 - depth) * (4.0 if name.startswith("classifier") else 1.0)
        decays = parameter.ndim > 1 and "token" not in name and "position" not in name
        assert found[parameter] == pytest.approx((rate, 0.05 if decays else 0.0)), name
    assert len(found) == len(list(network.parameters()))


@pytest.mark.parametrize("mode", ["linear", "lora", "full"])
def test_the_mode_says_what_moves(tmp_path, mode):
    before = backbone()
    result, _ = run(tmp_path, model=before, mode=mode, eval_strategy="no", save_strategy="no", num_train_epochs=1)
    moved = {
        name for name, value in result.regvit.state_dict().items() if not torch.equal(value, before.state_dict()[name])
    }
    attention = {f"layers.{i}.attention.{part}.weight" for i in (0, 1) for part in ("qkv", "o_proj")}
    expected = {"linear": set(), "lora": attention, "full": set(before.state_dict())}[mode]
    assert moved == expected
    assert result.classifier.bias.abs().max() > 0


def test_merged_updates_give_the_numbers_of_the_trained_model(tmp_path):
    network, args, _ = opened(tmp_path, mode="lora", lora_target_modules=["qkv", "fc1"])
    plain = copy.deepcopy(network)
    choose_trained(network, args, new_registers=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    network.eval()
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=generator)
    with torch.no_grad():
        before = network(pixels).logits
        assert (plain.eval()(pixels).logits - before).abs().max() > 1e-2
        plain.load_state_dict(merged_state(network.state_dict(), scale=args.lora_alpha / args.lora_r))
        torch.testing.assert_close(plain(pixels).logits, before)


def test_unknown_layers_for_updates_are_named(tmp_path):
    network, args, _ = opened(tmp_path, mode="lora", lora_target_modules=["query"])
    with pytest.raises(ValueError, match=r"names \['query'\], which the blocks do not have\. Choose from .*'qkv'"):
        choose_trained(network, args, new_registers=False)


@pytest.mark.parametrize("mode", ["linear", "lora"])
def test_registers_that_are_added_are_trained_and_said(tmp_path, caplog, mode):
    with caplog.at_level("INFO", logger="hf_regvit"):
        result, _ = run(
            tmp_path, model=backbone(num_register_tokens=0), mode=mode, num_register_tokens=3, eval_strategy="no",
            save_strategy="no", num_train_epochs=1,
        )  # fmt: skip
    assert "The model had no registers; 3 trainable registers were added" in caplog.text
    assert "3 trainable registers were added" in (tmp_path / "README.md").read_text()
    assert result.config.num_register_tokens == 3
    start = backbone(num_register_tokens=0).resize_register_tokens(3, seed=5).embeddings.register_tokens
    assert not torch.equal(result.regvit.embeddings.register_tokens, start)


def test_registers_that_are_there_are_not_changed(tmp_path):
    with pytest.raises(ValueError, match=r"num_register_tokens is 3, but the model was trained with 2 registers"):
        opened(tmp_path, num_register_tokens=3)


def test_a_head_for_the_same_classes_is_kept_and_another_is_not(tmp_path):
    first, _ = run(tmp_path / "a", eval_strategy="no", save_strategy="no", num_train_epochs=1)
    network, _, changes = opened(tmp_path, model=first)
    assert torch.equal(network.classifier.weight, first.classifier.weight)
    assert "kept" in " ".join(changes)
    args = arguments(tmp_path)
    task = ImageClassification(args, source(6, names=("red", "green", "blue")), None)
    start = open_for_task(args, task, first)
    network, changes = start.network, start.changes
    assert not torch.equal(network.classifier.weight, first.classifier.weight)
    assert "The head is newly initialized." in changes


def test_another_image_size_changes_positions_and_processor(tmp_path):
    network, args, changes = opened(tmp_path, image_size=32)
    assert network.config.image_size == 32
    assert network.regvit.embeddings.position_embeddings.shape[1] == 1 + 16
    assert any("resampled from 2 x 2 to 4 x 4" in change for change in changes)
    task = ImageClassification(args, source(6), source(3))
    processor = open_for_task(args, task, backbone()).processor
    assert processor(images=picture(0, 0), return_tensors="pt")["pixel_values"].shape[-2:] == (32, 32)


def test_the_model_of_the_caller_stays_as_it_is(tmp_path):
    model = backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(tmp_path, model=model, eval_strategy="no", save_strategy="no", num_train_epochs=1)
    assert same_state(before, model.state_dict())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- Runs --------------------------------------------------------------------------------------------------------


HARD = {
    "drop_path_rate": 0.3, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mixup_probability": 0.7, "num_train_epochs": 3,
    "repeated_augmentation": 2, "augmentation": "three_augment", "save_strategy": "steps", "save_steps": 2,
    "eval_strategy": "no",
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "stop"),
    [("full", 2), pytest.param("full", 6, marks=pytest.mark.slow), pytest.param("lora", 4, marks=pytest.mark.slow)],
)  # 6 ends an epoch, 2 and 4 do not
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, mode, stop):
    options = {**HARD, "mode": mode, "lora_dropout": 0.2, "save_total_limit": None}
    unbroken, _ = run(tmp_path / "a", **options)
    run(tmp_path / "b", callbacks=[StopAt(stop)], **options)
    resumed, _ = run(tmp_path / "b", resume_from_checkpoint="last", **options)
    assert same_state(unbroken.state_dict(), resumed.state_dict())
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "ab"
    ]
    losses = [[(line["step"], line["loss"]) for line in each if "loss" in line] for each in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9


def test_accumulation_equals_one_large_batch(tmp_path):
    options = {"eval_strategy": "no", "save_strategy": "no", "adam_epsilon": 1e-3, "label_smoothing_factor": 0.1}
    options |= {"class_weights": ["balanced"]}
    train = source(24, labels=[0] * 12 + [1] * 8 + [2] * 4)
    large, _ = run(tmp_path / "a", train=train, **options)
    small, _ = run(
        tmp_path / "b", train=train, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    for name, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)
    assert not torch.equal(large.classifier.weight, opened(tmp_path)[0].classifier.weight)


@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_result_is_the_best_checkpoint_in_every_tensor(tmp_path, mode):
    """Simulate divergence: the learning rate explodes after the first epoch."""

    result, args = run(
        tmp_path,
        mode=mode,
        num_train_epochs=4,
        learning_rate=1e-2,
        callbacks=[WreckFrom(6)],
        max_grad_norm=1e9,
        save_only_model=mode == "full",
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    best = metrics["step_of_the_result"]
    assert best < metrics["steps"] == 12
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    assert metrics["eval"]["accuracy"] == scores[best] == max(scores.values())
    if mode == "full":
        assert same_state(saved, dict(result.state_dict()))
    else:
        scale = args.lora_alpha / args.lora_r
        for name, value in result.state_dict().items():
            stem = name.removesuffix(".weight")
            expected = saved.get(name, saved.get(f"{stem.removesuffix('.bias')}.base_layer.{name.rpartition('.')[2]}"))
            if f"{stem}.lora_A.default.weight" in saved:
                down, up = (saved[f"{stem}.lora_{part}.default.weight"] for part in "AB")
                expected = expected + scale * (up @ down)
            torch.testing.assert_close(value, expected, msg=name)
    assert [folder.name for folder in list_checkpoints(tmp_path)].count(f"checkpoint-{best}") == 1


@pytest.mark.slow
def test_early_stopping_counts_over_a_resumed_run(tmp_path):
    options = {"early_stopping_patience": 2, "num_train_epochs": 8, "learning_rate": 1e-12, "save_total_limit": None}
    run(tmp_path / "a", **options)
    steps = json.loads((tmp_path / "a" / "metrics.json").read_text())["steps"]
    assert steps == 9  # the first evaluation is the best, followed by a patience of two
    run(tmp_path / "b", callbacks=[StopAt(6)], **options)
    run(tmp_path / "b", resume_from_checkpoint="last", **options)
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["steps"] == 9


def test_f54_a_loss_that_is_not_finite_stops_before_its_step(tmp_path):

    with pytest.raises(NonFiniteError, match=r"step 1"):
        run(tmp_path, callbacks=[PoisonAt(1, "classifier.weight")], eval_strategy="no", save_strategy="no")
    record = json.loads((tmp_path / "nan_batch.json").read_text())
    assert record["step"] == 1
    assert len(record["processes"][0]["micro_batches"][0]["sample_ids"]) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 4}, "images_per_step is 4.*--allow_batch_change"),
        ({"mode": "linear"}, "mode is linear, but the checkpoint was written with full"),
    ],
)
def test_f63_resuming_with_other_images_or_tensors_is_refused(tmp_path, change, message):
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, callbacks=[StopAt(2)], **options)
    recipe = (tmp_path / "resolved_recipe.yaml").read_text()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume_from_checkpoint="last", **options | change)
    assert (tmp_path / "resolved_recipe.yaml").read_text() == recipe  # still that of the run in the folder


def test_f63_resuming_with_other_images_is_refused(tmp_path):
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, callbacks=[StopAt(2)], **options)
    with pytest.raises(ValueError, match=r"data is .*--allow_data_change"):
        run(tmp_path, train=source(24, start=1), resume_from_checkpoint="last", **options)


def test_f63_resuming_with_other_labels_of_the_same_images_is_refused(tmp_path):
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, callbacks=[StopAt(2)], **options)
    other = source(24, labels=[2 - i % 3 for i in range(24)])
    with pytest.raises(ValueError, match=r"data is .*labels_sha256.*--allow_data_change"):
        run(tmp_path, train=other, resume_from_checkpoint="last", **options)
    with pytest.raises(ValueError, match=r"data is .*--allow_data_change"):
        run(tmp_path, train=source(24, names=("a", "b", "c")), resume_from_checkpoint="last", **options)


@pytest.mark.slow
def test_the_folder_of_a_run_says_what_it_is_in_words_and_images(tmp_path):
    run(tmp_path, learning_rate=1e-2, num_train_epochs=4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "modeling_regvit.py", "configuration_regvit.py",
        "preprocessor_config.json", "README.md", "metrics.json", "metrics.jsonl", "curves.png",
        "confusion_matrix.png", "confusion_matrix.csv", "resolved_recipe.yaml", "environment.json",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval"]["accuracy"] == 1.0  # three hues are easy to distinguish
    assert metrics["images"] == {"train": 24, "validation": 9, "seen": 96}
    rows = (tmp_path / "confusion_matrix.csv").read_text().splitlines()
    assert rows[1] == "blue,3,0,0"
    card = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in card
    check_card(card.replace("---\n", "---\nlicense: mit\n", 1), folder=tmp_path)  # only the author can choose one
    assert "| Top-1 accuracy | images, validation | 100.0 % [70.1, 100.0] | 24 / 9 |" in card
    (indexed,) = card_header(card)["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in indexed["metrics"]} == {
        name: round(metrics["eval"][key], 4)
        for name, key in (("accuracy", "accuracy"), ("balanced_accuracy", "mean_class_accuracy"), ("f1", "f1"))
    }
    for shown in ("![Learning curves](curves.png)", "![Confusion matrix](confusion_matrix.png)", "pipeline("):
        assert shown in card
    assert metrics["eval"]["accuracy_low"] == pytest.approx(0.70085495, abs=1e-6)  # 9 of 9
    assert conclusion(metrics) == "Accuracy 100 % (9 of 9; 95 % interval 70.1 to 100)"
    recipe = yaml.safe_load((tmp_path / "resolved_recipe.yaml").read_text())
    assert (recipe["mode"], recipe["learning_rate"]) == ("full", 1e-2)
    for name in ("curves.png", "confusion_matrix.png"):
        Image.open(tmp_path / name).verify()


def test_curves_do_not_draw_the_best_checkpoint_at_the_last_step(tmp_path, monkeypatch):
    """The final evaluation is logged at the same step, which ended the validation curves in a vertical line."""
    lines = [{"step": 3, "eval_loss": 0.2}, {"step": 6, "eval_loss": 0.9}, {"step": 6, "eval_loss": 0.2}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: drawn.append(figure))
    draw_finetuning_curves(tmp_path, shown=("accuracy",))
    (axis,) = drawn[0].axes
    assert axis.lines[0].get_xydata().tolist() == [[3, 0.2], [6, 0.9]]


def test_names_with_commas_and_dollars_in_tables_and_images(tmp_path):
    names = ("tench, Tinca tinca", "$_US", "$^$")
    task = ImageClassification(arguments(tmp_path), source(6, names=names), source(6, names=names))
    task.start_metrics()
    said = [1, 2, 0, 1, 1, 0]
    task.update_metrics(F.one_hot(torch.tensor(said), 3).float(), torch.tensor([0, 1, 2, 0, 1, 2]))
    task.compute_metrics()
    task.write_panels(tmp_path, None, None)
    with (tmp_path / "confusion_matrix.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["true\\predicted", *names],
            ["tench, Tinca tinca", "0", "2", "0"],
            ["$_US", "0", "1", "1"],
            ["$^$", "2", "0", "0"],
        ]
    Image.open(tmp_path / "confusion_matrix.png").verify()
    truth = np.array([[0, 1], [2, 2]])
    save_figure(mask_figure([(Image.new("RGB", (2, 2)), truth, truth)], names), tmp_path / "masks.png")


def test_from_scratch_and_nothing_to_start_from(tmp_path):
    args = arguments(tmp_path, eval_strategy="no", save_strategy="no", num_train_epochs=1)
    task = ImageClassification(args, source(24), source(9))
    result = finetune(args, model=backbone().config, task=task)
    assert result.config.num_register_tokens == 2
    with pytest.raises(ValueError, match=r"There is no model to start from.*--preset"):
        finetune(args, task=task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, r"mode is 'all'\. Choose from full, lora, linear"),
        ({"task": "detection"}, "task is 'detection'"),
        ({"crop_scale": [0.5]}, "crop_scale"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "early_stopping_patience requires evaluations"),
        ({"preset": "tiny", "model_name_or_path": "x"}, "a preset is only for a model from scratch"),
        ({"data": "a", "train_dir": "b"}, "Give only one of them"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    ("task", "metric", "greater"),
    [
        ("depth-estimation", None, False),
        ("depth-estimation", "abs_rel", False),
        ("depth-estimation", "eval_rmse", False),
        ("depth-estimation", "delta1", True),
        ("semantic-segmentation", "overall_accuracy", True),
        ("image-classification", "loss", False),
        ("image-classification", "f1", True),
    ],
)
def test_errors_are_better_the_lower_they_are(tmp_path, task, metric, greater):
    assert arguments(tmp_path, task=task, metric_for_best_model=metric).greater_is_better is greater


def test_an_unknown_metric_for_the_best_model_is_refused_before_anything_is_read(tmp_path):
    args = arguments(tmp_path / "run", data=str(tmp_path / "nothing"), metric_for_best_model="top1")
    with pytest.raises(
        ValueError, match=r"metric_for_best_model is 'top1', which task image-classification .* Choose from accuracy"
    ):
        finetune(args, model=backbone())


def test_options_have_the_names_of_the_example_scripts(tmp_path):
    from hf_regvit.app.recipes import RecipeParser
    from hf_regvit.finetuning.arguments import FinetuningArguments

    flags = (
        "--model_name_or_path m --dataset_name d --validation_dir v --train_val_split 0.2 --max_train_samples 5 "
        "--max_eval_samples 6 --image_column_name i --label_column_name l --remove_unused_columns False --do_train "
        f"--do_eval --output_dir {tmp_path} --num_train_epochs 3 --report_to none --use_cpu True"
    )
    (args,) = RecipeParser(FinetuningArguments).parse(flags.split())
    assert (args.data, args.image_column, args.label_column, args.max_eval_samples) == ("d", "i", "l", 6)
    assert Path(args.output_dir) == tmp_path
