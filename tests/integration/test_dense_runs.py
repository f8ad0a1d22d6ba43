"""Fine-tuning for segmentation and depth through the command line, and loading the result with stock code."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    pipeline,
)

from builders import StopAt, save_model, tiny_model
from hf_regvit import RegViTModel
from hf_regvit.app.cli import main
from hf_regvit.data.joint_transform import resize_map
from hf_regvit.data.maps import DenseDataError, load_depth, load_masks
from hf_regvit.evaluation.metrics import DepthErrors, MeanIoU
from hf_regvit.figures.masks import class_colors
from hf_regvit.finetuning.data import class_weights
from hf_regvit.finetuning.dense import DepthEstimation, SemanticSegmentation, typical_size
from hf_regvit.models.processing import default_image_processor, dense_processor
from tiny_dense import TINY, dense_run, scene, write_parquet
from tiny_finetune import arguments
from tiny_run import same_state


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> str:
    return write_parquet(tmp_path_factory.mktemp("data") / "masks", "mask")


@pytest.fixture(scope="module")
def depths(tmp_path_factory) -> str:
    return write_parquet(tmp_path_factory.mktemp("data") / "depths", "depth")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return str(save_model(tiny_model(**TINY), tmp_path_factory.mktemp("backbone")))


def options(backbone: str, data: str, output, **others) -> list[str]:
    fixed = {
        "model_name_or_path": backbone, "data": data, "output_dir": output, "num_train_epochs": 10,
        "per_device_train_batch_size": 4, "learning_rate": 3e-3, "disable_tqdm": True, "report_to": "none",
        "use_cpu": True, "save_strategy": "epoch",
    }  # fmt: skip
    words = []
    for name, value in {**fixed, **others}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


# --- Segmentation


@pytest.mark.slow
def test_segmentation_through_the_command_line(masks, backbone, tmp_path):
    run = tmp_path / "run"
    given = options(backbone, masks, run, task="semantic-segmentation", class_names=["ground", "shape"])
    assert main(["finetune", *given, "--do_reduce_labels"]) == 0
    report = json.loads((run / "metrics.json").read_text())["eval"]
    assert report["mean_iou"] > 0.6
    assert {"iou_ground", "iou_shape", "overall_accuracy"} <= set(report)
    assert Image.open(run / "masks.png").size[0] > 300
    model = AutoModelForSemanticSegmentation.from_pretrained(run)
    assert model.config.id2label == {0: "ground", 1: "shape"}
    processor = AutoImageProcessor.from_pretrained(run)
    assert (processor.size["height"], processor.size["width"]) == (32, 40)  # the median is 64 x 48
    # The predictions of the stock pipeline reach the scores of the report.
    validation = load_masks(masks, split="validation", class_names=["ground", "shape"], reduce_labels=True)
    segment = pipeline("image-segmentation", model=str(run), device="cpu")
    metric = MeanIoU(num_classes=2)
    for index in range(len(validation)):
        picture = validation[index].image
        found = segment(picture, subtask="semantic")
        ids = np.zeros((picture.height, picture.width), dtype=np.int64)
        for entry in found:
            assert entry["mask"].size == picture.size
            ids[np.array(entry["mask"]) == 255] = model.config.label2id[entry["label"]]
        metric.add(prediction=ids, reference=validation.target(index).astype(np.int64))
    assert metric.compute()["mean_iou"] == pytest.approx(report["mean_iou"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["linear", "lora"])
def test_segmentation_trains_the_head_alone_or_updates(masks, backbone, tmp_path, mode):
    given = options(
        backbone, masks, tmp_path, task="semantic-segmentation", mode=mode, num_train_epochs=2, do_reduce_labels=True,
        class_weights=["balanced"],
    )  # fmt: skip
    assert main(["finetune", *given]) == 0
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    before = RegViTModel.from_pretrained(backbone).state_dict()
    after = {name.removeprefix("regvit."): value for name, value in model.state_dict().items()}
    changed = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    assert changed == set() if mode == "linear" else changed
    if mode == "lora":
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"qkv", "o_proj"}
    assert model.config.id2label == {0: "1", 1: "2"}
    assert not any("lora" in name for name in model.state_dict())


@pytest.fixture
def segmentation(masks, tmp_path) -> SemanticSegmentation:
    return SemanticSegmentation(
        arguments(
            tmp_path, task="semantic-segmentation", data=masks, do_reduce_labels=True, ignore_extra_classes=False
        )
    )


def test_training_loss_is_the_mean_of_its_parts(segmentation):
    """So steps of 8, 4 + 4 or two processes of 4 take the same gradient, whatever the number of ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 8, 8, generator=generator)
    labels = torch.randint(0, 2, (4, 8, 8), generator=generator).to(torch.uint8)
    labels[0, :6] = 255

    def loss(part: slice) -> torch.Tensor:
        model = Mock(return_value=SimpleNamespace(logits=logits[part]))
        batch = {"pixel_values": logits[part], "labels": labels[part]}
        return segmentation.loss(model, batch, training=True)[0]

    torch.testing.assert_close(loss(slice(0, 4)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2)
    slow = sum(
        -logits[b].log_softmax(0)[int(labels[b, i, j]), i, j]
        for b in range(4) for i in range(8) for j in range(8) if labels[b, i, j] != 255
    ) / (4 * 64)  # fmt: skip
    torch.testing.assert_close(loss(slice(0, 4)), slow, atol=1e-6, rtol=1e-5)


def test_evaluation_scores_at_the_size_of_each_mask(segmentation):
    processor = dense_processor(default_image_processor(32), (32, 40))
    _, validation = segmentation.datasets(processor)
    items = [validation[i] for i in range(len(validation))]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    assert batch["labels"].shape == (5, 48, 80)
    assert batch["pixel_values"].shape == (5, 3, 32, 40)

    # The ground truth itself, as logits at the model's size.
    maps = [
        torch.from_numpy(resize_map(segmentation.validation.target(i), (32, 40))).long() for i in range(len(items))
    ]
    logits = torch.stack([torch.stack([m == 0, m == 1]).float() for m in maps])
    model = Mock(return_value=SimpleNamespace(logits=logits))
    segmentation.start_metrics()
    _, outputs = segmentation.loss(model, batch, training=False)
    segmentation.update_metrics(outputs["logits"].numpy(), batch["labels"].numpy())
    scores = segmentation.compute_metrics()
    assert 0.85 < scores["mean_iou"] < 1  # only the borders of shapes are lost at 32 x 40
    counted = sum((segmentation.validation.target(i) != 255).sum() for i in range(5))
    assert counted == int((batch["labels"] != 255).sum())


def test_maps_of_an_accelerator_are_scored(segmentation):
    class OnAccelerator(torch.Tensor):
        def __array__(self, *args, **kwargs):
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    mask = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    segmentation.start_metrics()
    segmentation.update_metrics(mask.clamp(max=1).as_subclass(OnAccelerator), mask.as_subclass(OnAccelerator))
    assert segmentation.compute_metrics()["mean_iou"] == 1


def test_training_items_depend_on_epoch_and_image_alone(segmentation):
    processor = dense_processor(default_image_processor(32), (32, 40))
    train, _ = segmentation.datasets(processor)
    one, again, other = train[(0, 3, 0)], train[(0, 3, 0)], train[(1, 3, 0)]
    assert one["pixel_values"].shape == (3, 32, 40)
    assert one["labels"].shape == (32, 40)
    torch.testing.assert_close(one["pixel_values"], again["pixel_values"], atol=0, rtol=0)
    assert torch.equal(one["labels"], again["labels"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_size_has_the_median_proportions_in_whole_patches(masks):
    source = load_masks(masks)
    assert typical_size(source, 32, (8, 8)) == (32, 40)
    assert typical_size(source.subset([1, 4]), 56, (14, 14)) == (56, 56)
    assert typical_size(source.subset([2]), 32, (16, 16)) == (32, 48)


def test_balanced_weights_have_mean_one_over_the_pixels(segmentation):
    counts = torch.tensor([float(segmentation.report.class_pixels[name]) for name in segmentation.names])
    weights = class_weights(["balanced"], counts.numpy(), segmentation.names)
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(weights[0] * counts[0], weights[1] * counts[1])
    with pytest.raises(ValueError, match="class_weights holds 3 numbers, but 2 are needed"):
        class_weights(["1", "2", "3"], counts.numpy(), segmentation.names)


def test_f28_classes_that_only_validation_has(tmp_path):
    for part, values in (("train", (1, 2)), ("validation", (1, 2, 3))):
        for name in ("images", "masks"):
            (tmp_path / part / name).mkdir(parents=True)
        for i in range(4):
            picture, mask = scene(i)
            mask = np.where(mask == 0, values[-1], mask)
            picture.save(tmp_path / part / "images" / f"{i}.png")
            Image.fromarray(mask.astype(np.uint8)).save(tmp_path / part / "masks" / f"{i}.png")
    given = {"task": "semantic-segmentation", "data": str(tmp_path), "class_names": ["zero", "one", "two", "three"]}
    with pytest.raises(DenseDataError, match="1 classes without a training pixel: three"):
        SemanticSegmentation(arguments(tmp_path / "run", **given))
    task = SemanticSegmentation(arguments(tmp_path / "run", **given, ignore_extra_classes=True))
    _, validation = task.datasets(dense_processor(default_image_processor(32), (32, 32)))
    assert set(validation[0]["labels"].unique().tolist()) == {1, 2, 255}


def test_f29_bad_masks_stop_the_command_before_step_0(masks, backbone, tmp_path, capsys):
    given = options(backbone, masks, tmp_path / "run", task="semantic-segmentation", class_names=["only", "two"])
    assert main(["finetune", *given]) != 0
    text = capsys.readouterr().err
    assert "hold values that are not classes" in text
    assert "row 0" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_options_of_other_tasks_are_refused(masks, tmp_path):
    for wrong, message in (
        ({"mixup_alpha": 0.2}, "mixup_alpha cannot be used"),
        ({"augmentation": "randaugment"}, "supports 'crop' or 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            SemanticSegmentation(arguments(tmp_path, task="semantic-segmentation", data=masks, **wrong))
    with pytest.raises(ValueError, match="class_weights apply only to tasks with classes"):
        DepthEstimation(arguments(tmp_path, task="depth-estimation", data=masks, class_weights=["balanced"]))


def test_colours_are_all_unlike():
    colors = class_colors(40)
    assert len({tuple(c) for c in colors.tolist()}) == 40


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semantic-segmentation", "depth-estimation"])
@pytest.mark.usefixtures("without_figures")
def test_a_resumed_dense_run_equals_the_unbroken_one_bit_for_bit(masks, depths, tmp_path, task):
    """Includes batch norm statistics and the seeds of augmentation and drop path; step 2 is within an epoch."""
    data = masks if task == "semantic-segmentation" else depths
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "drop_path_rate": 0.3}
    options |= {"load_best_model_at_end": False}
    unbroken = dense_run(tmp_path / "a", data, task, **options)
    dense_run(tmp_path / "b", data, task, callbacks=[StopAt(2)], **options)
    resumed = dense_run(tmp_path / "b", data, task, resume_from_checkpoint="last", **options)
    assert same_state(unbroken.state_dict(), resumed.state_dict())
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab"]
    for key in ("eval", "intervals"):
        one, two = ({k: v for k, v in r[key].items() if "second" not in k and k != "runtime"} for r in reports)
        assert one == two
    low, high = reports[0]["intervals"]["mean_iou" if task == "semantic-segmentation" else "rmse"]
    assert low < reports[0]["eval"]["mean_iou" if task == "semantic-segmentation" else "rmse"] < high


def test_accumulation_says_what_it_does_to_the_batch_norm(masks, tmp_path, caplog):
    given = {"task": "semantic-segmentation", "data": masks, "do_reduce_labels": True}
    SemanticSegmentation(arguments(tmp_path, **given))
    assert not caplog.records
    SemanticSegmentation(arguments(tmp_path, **given, gradient_accumulation_steps=4, per_device_train_batch_size=2))
    assert "4 micro-batches of 2 images are not equivalent to one batch of 8" in caplog.text


# --- Depth


@pytest.mark.slow
def test_depth_through_the_command_line(depths, backbone, tmp_path):
    run = tmp_path / "run"
    given = options(backbone, depths, run, task="depth-estimation", max_depth=5, num_train_epochs=12)
    assert main(["finetune", *given]) == 0
    report = json.loads((run / "metrics.json").read_text())["eval"]
    validation = load_depth(depths, split="validation", max_depth=5)
    constant = DepthErrors(max_depth=5).compute(
        predictions=[np.full(t.shape, 3.0) for t in validation.targets], references=list(validation.targets)
    )
    assert report["abs_rel"] < constant["abs_rel"]
    assert Image.open(run / "depth.png").size[0] > 300
    model = AutoModelForDepthEstimation.from_pretrained(run)
    assert model.config.max_depth == 5
    measure = pipeline("depth-estimation", model=str(run), device="cpu")
    metric = DepthErrors(max_depth=5)
    for index in range(len(validation)):
        picture = validation[index].image
        found = measure(picture)
        assert found["depth"].size == picture.size
        metric.add(prediction=found["predicted_depth"], reference=validation.target(index))
    # tolerance: the pipeline upsamples bicubically, the report bilinearly
    assert metric.compute()["abs_rel"] == pytest.approx(report["abs_rel"], rel=0.05)


def test_depth_loss_is_the_mean_over_images(depths, tmp_path):
    task = DepthEstimation(arguments(tmp_path, task="depth-estimation", data=depths, max_depth=5))
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(3, 8, 8, generator=generator) + 1
    truth = torch.rand(3, 8, 8, generator=generator) + 1
    truth[1, :4] = 0

    def loss(part: slice) -> float:
        model = Mock(return_value=SimpleNamespace(predicted_depth=predicted[part]))
        return float(task.loss(model, {"pixel_values": predicted[part], "labels": truth[part]}, training=True)[0])

    slow = []
    for one, true in zip(predicted, truth):
        g = [
            float(torch.log(p + 1e-3) - torch.log(t + 1e-3))
            for p, t in zip(one.flatten(), true.flatten()) if t > 0
        ]  # fmt: skip
        mean = sum(g) / len(g)
        variance = sum((value - mean) ** 2 for value in g) / (len(g) - 1)
        slow.append((variance + 0.15 * mean**2) ** 0.5)
    assert loss(slice(0, 3)) == pytest.approx(sum(slow) / 3, rel=1e-4)
    assert loss(slice(0, 3)) == pytest.approx(sum(loss(slice(i, i + 1)) for i in range(3)) / 3, rel=1e-5)


def test_depth_faults_stop_before_a_model_is_loaded(depths, backbone, tmp_path, capsys):
    given = options(backbone, depths, tmp_path / "run", task="depth-estimation", depth_scale=1.0)
    assert main(["finetune", *given]) != 0
    assert "depth maps have no depth up to 10 m" in capsys.readouterr().err
