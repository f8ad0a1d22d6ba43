"""Observers of a run: their schedule, their values compared with slow implementations, and no side effects."""

import json
import math
import time
import weakref
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers.trainer_callback import TrainerState

from builders import normal, tinted_folder
from hf_regvit.data import loading as loading_module
from hf_regvit.data import source as source_module
from hf_regvit.data import tables as tables_module
from hf_regvit.data.augmentation import MultiCrop
from hf_regvit.data.loading import load_images
from hf_regvit.diagnosis.diagnose import artifact_snapshot
from hf_regvit.evaluation.linear import ridge_accuracy
from hf_regvit.figures.curves import read_metrics
from hf_regvit.models.processing import default_image_processor
from hf_regvit.pretraining.crops import MultiCropStream
from hf_regvit.pretraining.monitors import (
    Monitor,
    OnlineKNN,
    Panels,
    feature_statistics,
    network_statistics,
    observers,
)
from hf_regvit.training.callbacks import MetricsFile, Observer
from losses_on_logits import student_outputs
from tiny_run import Crops, arguments, same_state, tiny_batch, tiny_network, trained

# ---- Schedule ----


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        ({"every_steps": 7}, 10, 7),
        ({"every_steps": 1}, 10, 1),
        ({"every_steps": 0.25}, 10, 3),
        ({"every_steps": 0.25, "at_most": 50}, 1000, 50),
        ({"every_steps": 0.01, "at_least": 20, "at_most": 100}, 400, 20),
        ({"every_steps": 0.01, "at_least": 20, "at_most": 100}, 3000, 30),
        ({"every_steps": 0.01, "at_least": 20, "at_most": 100}, 125_000, 100),
        ({"every_steps": 500, "at_most": 100}, 125_000, 500),  # a number of steps is not limited
    ],
)
def test_intervals(options, total, expected):
    assert Observer(**options).interval(total) == expected


class Clock(Observer):
    """Slow observer that measures the step number."""

    def measure(self, model, step):
        time.sleep(0.05)
        return {"measured_at": float(step)}


def test_measurements_get_their_lines_and_their_time(tmp_path):
    clock = Clock(4)
    trainer = trained(tmp_path, callbacks=[clock, MetricsFile(tmp_path / "metrics.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["measured_at"]) for line in lines if "measured_at" in line] == [(0, 0), (4, 4), (6, 6)]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert clock.seconds >= 0.15
    measured = sum(line["eval_seconds"] for line in lines if "eval_seconds" in line)
    assert measured == pytest.approx(clock.seconds, abs=1e-6)
    assert trainer.state.global_step == 6


def test_speed_leaves_out_what_observers_took(tmp_path, monkeypatch):
    """Simulated time: every step takes 1 s, every measurement 10 s."""
    from hf_regvit.pretraining.trainer import DinoTrainer
    from hf_regvit.training import callbacks
    from hf_regvit.training import trainer as training

    now = [0.0]
    fake = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(training, "time", fake)
    monkeypatch.setattr(callbacks, "time", fake)

    class Slow(Observer):
        def measure(self, model, step):
            now[0] += 10
            return {"x": 1.0}

    class Crops1s(Crops):
        def __getitem__(self, key):
            now[0] += 0.25  # 3 images a step
            return super().__getitem__(key)

    step = DinoTrainer.compute_loss

    def slow_loss(*args, **kwargs):
        now[0] += 0.25
        return step(*args, **kwargs)

    monkeypatch.setattr(DinoTrainer, "compute_loss", slow_loss)
    trainer = trained(tmp_path, callbacks=[Slow(2)], dataset=Crops1s(30))
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    for line in lines[1:]:
        assert line["images_per_second"] == pytest.approx(3.0)
        assert line["eval_seconds"] == 10
        assert line["data_wait_share"] == pytest.approx(0.75)
    # The clock starts after the first batch: 0.25 + 1 + 10 seconds for the first two steps, which leaves four.
    assert lines[0]["eta_seconds"] == pytest.approx(4 * (0.25 + 1 + 10) / 2)
    assert lines[-1]["eta_seconds"] == 0
    assert lines[0]["memory_mib"] > 50


def test_clipped_shares_and_gradient_norms_are_logged(tmp_path):
    (first, *_) = [entry for entry in trained(tmp_path / "a", max_grad_norm=1e-6).state.log_history if "loss" in entry]
    (second, *_) = [entry for entry in trained(tmp_path / "b", max_grad_norm=1e6).state.log_history if "loss" in entry]
    assert (first["clipped_backbone"], first["clipped_dino_head"]) == (1, 1)
    assert (second["clipped_backbone"], second["clipped_dino_head"]) == (0, 0)
    assert first["grad_norm_backbone"] > 0


def test_own_lines_of_the_metrics_file(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 3, "alarm": "x"})
    metrics.append({"step": 4, "alarm": "y"})
    assert [json.loads(line)["alarm"] for line in metrics.path.read_text().splitlines()] == ["x", "y"]


# ---- Values ----


def test_targets_equal_their_loops():
    """KL(teacher || student) of the global crops, and the number of prototypes that are the maximum of a target."""
    network, batch = tiny_network(), tiny_batch()
    network.begin_step(0.05)
    targets = network.teacher_targets(batch["global_crops"], batch["mask_indices"]).cls
    student = student_outputs(network, batch).global_logits
    outputs = network(**batch)
    divergence, used = [], set()
    for crop in (0, 1):
        for image in range(3):
            target = targets[1 - crop, image].double()
            log_student = (student[crop, image].double() / 0.1).log_softmax(-1)
            divergence.append(sum(t * (math.log(t) - s) for t, s in zip(target.tolist(), log_student.tolist()) if t))
            used.add(int(target.argmax()))
    assert outputs["teacher_student_kl"].item() == pytest.approx(sum(divergence) / 6, rel=1e-4)
    assert outputs["used_prototypes"].item() == len(used)


def test_spread_of_features_equals_its_loop():
    backbone, pixels = tiny_network().teacher_backbone, normal(5, 3, 16, 16)
    with torch.no_grad():
        rows = [backbone(image[None]).pooler_output[0].double() for image in pixels]
    unit = [[value / math.sqrt(sum(v * v for v in row.tolist())) for value in row.tolist()] for row in rows]
    deviations = []
    for channel in zip(*unit, strict=True):
        mean = sum(channel) / 5
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in channel) / 5))
    measured = feature_statistics(backbone(pixels).pooler_output.detach())
    assert measured["feature_std"] == pytest.approx(sum(deviations) / 16 * math.sqrt(16), rel=1e-5)
    squares = torch.linalg.svdvals(torch.tensor(unit)).square()
    shares = (squares / squares.sum()).tolist()
    assert measured["effective_rank"] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-5)


def test_spread_is_zero_for_one_image_and_one_for_noise():
    backbone = tiny_network().teacher_backbone
    same = feature_statistics(backbone(normal(1, 3, 16, 16).expand(6, -1, -1, -1)).pooler_output.detach())
    assert same["feature_std"] == pytest.approx(0, abs=1e-6)
    assert same["effective_rank"] == pytest.approx(1, abs=1e-6)
    measured = feature_statistics(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)))
    assert measured["feature_std"] == pytest.approx(1, abs=0.02)
    assert measured["effective_rank"] > 60


def test_distance_of_teacher_and_student_equals_its_loop():
    network = tiny_network()
    assert network_statistics(network)["teacher_student_distance"] == 0
    with torch.no_grad():
        for parameter in network.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    above = below = 0.0
    for student, teacher in zip(network.student.parameters(), network.teacher.parameters(), strict=True):
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            above, below = above + (t - s) ** 2, below + s * s
    measured = network_statistics(network)
    assert measured["teacher_student_distance"] == pytest.approx(math.sqrt(above / below), rel=1e-5)
    assert measured["center_norm"] == 0
    assert "center_norm" not in network_statistics(tiny_network(centering="sinkhorn"))


def test_monitor_logs_everything_and_changes_nothing(tmp_path):
    pixels = normal(12, 3, 16, 16)
    watched = trained(tmp_path / "a", callbacks=[Monitor(pixels, every_steps=3)])
    plain = trained(tmp_path / "b")
    assert same_state(watched.model.state_dict(), plain.model.state_dict())
    lines = [entry for entry in watched.state.log_history if "feature_std" in entry]
    assert [entry["step"] for entry in lines] == [0, 3, 6]
    assert {
        "feature_std", "effective_rank", "outlier_share", "outlier_layer", "patch_norm", "register_norm",
        "register_cosine", "cls_to_register_attention", "teacher_student_distance", "center_norm",
    } <= lines[1].keys()  # fmt: skip
    snapshot = artifact_snapshot(watched.model.teacher_backbone, pixels)
    assert lines[-1]["register_cosine"] == pytest.approx(snapshot["register_cosine"], abs=1e-6)
    assert lines[-1]["cls_to_register_attention"] == pytest.approx(snapshot["attention_registers"], abs=1e-6)
    assert lines[0]["teacher_student_distance"] == 0 < lines[1]["teacher_student_distance"]
    assert all(math.isfinite(value) for entry in lines for value in entry.values())


def test_monitors_read_a_compiled_teacher(tmp_path):
    network, pixels = tiny_network(), normal(3, 3, 16, 16)
    shown = [Image.new("RGB", (16, 16), (40 * index, 0, 0)) for index in range(3)]
    labeled = list(zip(shown, range(3), strict=True))
    knn = {"image_processor": default_image_processor(16), "every_steps": 4, "k": 1}
    readings = (
        Monitor(pixels),
        Panels(shown, pixels, folder=tmp_path),
        OnlineKNN(labeled, labeled, **knn),
    )
    expected = [reading.measure(network, 1) for reading in readings]
    panel = (tmp_path / "step_000001.png").read_bytes()
    network.compile_blocks(backend="eager")
    with torch.no_grad():
        network.teacher_backbone(pixels)
    assert [reading.measure(network, 1) for reading in readings] == expected
    assert (tmp_path / "step_000001.png").read_bytes() == panel


def test_panels_are_written_through_the_run(tmp_path):
    shown = [Image.new("RGB", (16, 16), (40 * index, 0, 0)) for index in range(3)]
    trained(tmp_path, callbacks=[Panels(shown, normal(3, 3, 16, 16), folder=tmp_path / "panels", every_steps=4)])
    files = sorted((tmp_path / "panels").iterdir())
    assert [path.name for path in files] == ["step_000000.png", "step_000004.png", "step_000006.png"]
    first, last = (Image.open(path) for path in (files[0], files[-1]))
    assert first.size == last.size == (3 * 186 + 6, 3 * 204 + 6)
    assert first.tobytes() != last.tobytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_f58_a_full_disk_costs_metrics_and_panels_but_not_the_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "panels").write_text("no folder can be made here")
    shown = [Image.new("RGB", (16, 16))] * 2
    panels = Panels(shown, normal(2, 3, 16, 16), folder=tmp_path / "panels", every_steps=4)
    trainer = trained(tmp_path, callbacks=[MetricsFile(tmp_path / "metrics.jsonl"), panels])
    assert trainer.state.global_step == 6
    assert caplog.text.count("metrics.jsonl' cannot be written ([Errno 28] No space left on device)") == 1
    assert "The panel of step 4 cannot be written" in caplog.text


def test_f58_lines_that_were_cut_off_are_left_out(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')  # the disk was full here
    metrics._is_torn = True
    metrics.append({"step": 3, "loss": 3.0})
    assert read_metrics(metrics.path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]
    metrics.on_train_begin(None, TrainerState(global_step=2), None)
    assert read_metrics(metrics.path) == [{"step": 1, "loss": 1.0}]


# ---- Linear probe ----


def leave_one_out_error(features: torch.Tensor, targets: torch.Tensor, penalty: float) -> float:
    """Refit without each image in turn, on features standardized by all images, as in the closed form."""
    errors = []
    for left_out in range(len(features)):
        rows = [i for i in range(len(features)) if i != left_out]
        x = torch.cat([features[rows], torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        shrink = torch.eye(x.shape[1], dtype=torch.float64) * penalty * len(features)
        shrink[-1, -1] = 0  # the bias is not penalized
        weights = torch.linalg.solve(x.T @ x + shrink, x.T @ targets[rows])
        here = torch.cat([features[left_out], torch.ones(1, dtype=torch.float64)])
        errors.append((targets[left_out] - here @ weights).square().mean().item())
    return sum(errors) / len(errors)


def test_linear_probe_equals_its_slow_twin():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (40,), generator=generator)
    centers = torch.randn(3, 6, generator=generator)
    features = centers[labels] + 1.2 * torch.randn(40, 6, generator=generator)
    test_labels = torch.randint(0, 3, (200,), generator=generator)
    test = centers[test_labels] + 1.2 * torch.randn(200, 6, generator=generator)
    x = features.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    x, y = (x - mean) / deviation, torch.nn.functional.one_hot(labels, 3).double()
    penalties = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    best = min(penalties, key=lambda penalty: leave_one_out_error(x, y, penalty))
    assert best not in (penalties[0], penalties[-1])  # the choice matters
    weights = torch.linalg.solve(x.T @ x + best * 40 * torch.eye(6, dtype=torch.float64), x.T @ (y - y.mean(0)))
    guesses = ((test.double() - mean) / deviation @ weights + y.mean(0)).argmax(1)
    assert ridge_accuracy(features, labels, test, test_labels) == pytest.approx(
        (guesses == test_labels).double().mean().item(), abs=1e-6
    )


def test_linear_probe_does_not_need_more_images_than_channels():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 50, generator=generator)
    labels = torch.tensor([0, 1] * 10)
    features[:, 3] = 0.0  # a dead channel
    features[:, 0] += 6 * labels
    assert ridge_accuracy(features, labels, features, labels) == 1.0


def test_online_linear_probe_is_logged_beside_knn(tmp_path):
    images = [Image.new("RGB", (16, 16), (60 * index, 255 - 60 * index, 0)) for index in range(4)]
    labels = [0, 0, 1, 1]
    labeled = list(zip(images, labels, strict=True))
    options = {"image_processor": default_image_processor(16), "every_steps": 6, "k": 1}
    probe = OnlineKNN(labeled, labeled, linear_probe=True, **options)
    trainer = trained(tmp_path, callbacks=[probe])
    lines = [entry for entry in trainer.state.log_history if "eval_linear" in entry]
    assert [entry["step"] for entry in lines] == [0, 6]
    assert all(entry["eval_knn_1"] == 1 and 0 <= entry["eval_linear"] <= 1 for entry in lines)


# ---- Observers of a run ----


def found(tmp_path, data, **overrides):
    args = arguments(
        tmp_path / "run",
        data=data,
        **{"monitor_steps": 5, "panel_steps": 0.5, "knn_steps": 3, "panel_size": 32} | overrides,
    )
    dataset = SimpleNamespace(source=load_images(data, split="train"))
    return observers(args, dataset, image_processor=default_image_processor(16))


def test_a_labelled_folder_gets_monitor_panels_and_knn(tmp_path):
    data = str(tinted_folder(tmp_path / "data", ("red", "blue"), train=12, validation=4))
    (tmp_path / "data" / "train" / "blue" / "0.png").write_bytes(b"broken")
    monitor, panels, knn = found(tmp_path, data, linear_probe=True)
    assert isinstance(monitor, Monitor)
    assert monitor.pixel_values.shape == (23, 3, 16, 16)  # without the broken one
    assert isinstance(panels, Panels)
    assert panels.pixel_values.shape[1:] == (3, 32, 32)
    assert panels.images[0].size == (32, 32)
    assert len(knn.neighbors) == 23
    assert len(knn.heldout) == 8
    assert knn.linear_probe
    assert knn.is_held_out
    # Images that were cropped before give the same pixels as the full processor.
    record = load_images(data, split="validation")[0]
    expected = default_image_processor(16)(images=[record.image], return_tensors="pt")["pixel_values"]
    actual = knn.image_processor(images=[knn.heldout[0][0]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert knn.measure(tiny_network(), 0)["eval_knn_10"] == 1.0  # two tints


def test_limits_and_switches(tmp_path):
    data = str(tinted_folder(tmp_path / "data", ("red", "blue"), train=12, validation=4))
    (knn,) = found(tmp_path, data, monitor_steps=0, panel_steps=0, knn_max_images=16)
    assert (len(knn.neighbors), len(knn.heldout)) == (12, 4)
    assert sorted({label for _, label in knn.neighbors}) == [0, 1]  # evenly spread, so both classes are there
    assert found(tmp_path, data, monitor_steps=0, panel_steps=0, knn_steps=0) == []
    assert found(tmp_path, data, monitor_steps=0, panel_steps=0, knn_max_images=3) == []  # no held-out images


def test_without_a_validation_part_knn_is_judged_on_a_quarter_of_the_training_images(tmp_path, caplog):
    data = str(tinted_folder(tmp_path / "data", ("red", "blue"), train=12))
    with caplog.at_level("INFO", logger="hf_regvit"):
        *_, knn = found(tmp_path, data)
    assert "evaluated on a quarter of the training images, which the run sees without their labels" in caplog.text
    assert (len(knn.neighbors), len(knn.heldout)) == (18, 6)
    assert not knn.is_held_out
    assert sorted(label for _, label in knn.heldout) == [0, 0, 0, 1, 1, 1]
    seen = {image.tobytes() for image, _ in knn.neighbors}
    assert not any(image.tobytes() in seen for image, _ in knn.heldout)


def test_without_labels_or_with_single_images_there_is_no_knn(tmp_path):
    data = str(tinted_folder(tmp_path / "data", ("red", "blue"), train=12))
    for folder in (tmp_path / "data" / "train").iterdir():
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    assert [type(item) for item in found(tmp_path, data)] == [Monitor, Panels]


def test_crops_stand_in_for_images_and_what_has_neither_is_left_alone(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield Crops()[(0, 0)]

    args = arguments(tmp_path, monitor_steps=5, panel_steps=5)
    options = {"image_processor": default_image_processor(16)}
    monitor, panels = observers(args, Crops(), **options)
    assert monitor.pixel_values.shape == (10, 3, 16, 16)
    assert len(panels.images) == 8
    assert observers(args, Stream(), **options) == []


def test_f56_a_stream_is_monitored_on_the_first_images_of_its_shards(tmp_path):
    stream = tables_module.ImageStream("s", 20, shard_of_squares)
    dataset = MultiCropStream([stream], MultiCrop(global_size=16, local_size=8, patch_size=4), seed=0)
    args = arguments(tmp_path, monitor_steps=5, panel_steps=5)
    options = {"image_processor": default_image_processor(16)}
    monitor, panels = observers(args, dataset, **options)
    assert monitor.pixel_values.shape == (64, 3, 16, 16)
    assert len(panels.images) == 8
    # Eight of the twenty shards, eight images of each; the empty cell, the broken one and the broken shard are no
    # reason to stop.
    shown = {record.image.getpixel((0, 0))[:2] for record in dataset.first_records(64)}
    assert {shard for shard, _ in shown} == {0, 2, 5, 7, 10, 12, 15, 17}
    assert {row for shard, row in shown if shard == 0} == {0, *range(3, 10)}
    assert {row for shard, row in shown if shard == 7} == {0}
    again = [record.id for record in dataset.first_records(64)]
    assert again == [record.id for record in dataset.first_records(64)]


def labelled_tables(folder, parts, names=("dark", "light")):
    """Parquet files `train-0.parquet` and so on, sorted by class as such files often are."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    for part in parts:
        for label, name in enumerate(names):
            squares = [Image.new("RGB", (20, 20), (label * 200, row, 0)) for row in range(20)]
            table = datasets.Dataset.from_dict({"image": squares, "label": [label] * 20}, features=features)
            table.to_parquet(folder / f"{part}-{name}.parquet")
    return str(folder)


def knn_of_stream(tmp_path, *folders, **options):
    args = arguments(
        tmp_path / "run", data=list(folders), streaming=True, monitor_steps=0, panel_steps=0, knn_steps=3, **options
    )
    streams = [loading_module.stream_images(folder) for folder in folders]
    dataset = MultiCropStream(streams, MultiCrop(global_size=16, local_size=8, patch_size=4), seed=0)
    processor = default_image_processor(16)
    return observers(args, dataset, image_processor=processor)


def test_a_labelled_stream_gets_knn_on_its_validation_part(tmp_path):
    data = labelled_tables(tmp_path / "tables", ("train", "validation"))
    (knn,) = knn_of_stream(tmp_path, data, knn_max_images=32)
    assert sorted(label for _, label in knn.neighbors) == [0] * 12 + [1] * 12  # every shard gives its share
    assert sorted(label for _, label in knn.heldout) == [0] * 4 + [1] * 4
    assert knn.is_held_out
    for image, label in knn.neighbors:
        assert image.getpixel((0, 0))[0] == label * 200
    assert knn.measure(tiny_network(), 0)["eval_knn_10"] == 1.0


def test_a_labelled_stream_without_validation_part_is_judged_on_a_quarter(tmp_path, caplog):
    with caplog.at_level("INFO", logger="hf_regvit"):
        (knn,) = knn_of_stream(tmp_path, labelled_tables(tmp_path / "tables", ("train",)), knn_max_images=32)
    assert "evaluated on a quarter of the training images, which the run sees without their labels" in caplog.text
    assert not knn.is_held_out
    assert sorted(label for _, label in knn.heldout) == [0] * 4 + [1] * 4
    seen = {image.tobytes() for image, _ in knn.neighbors}
    assert len(seen) == len(knn.neighbors) == 24
    assert not any(image.tobytes() in seen for image, _ in knn.heldout)


def test_streams_without_labels_or_with_other_classes_have_no_knn(tmp_path, caplog):
    data = labelled_tables(tmp_path / "tables", ("train",))
    other = labelled_tables(tmp_path / "other", ("train",), names=("cat", "dog"))
    with caplog.at_level("INFO", logger="hf_regvit"):
        assert knn_of_stream(tmp_path, data, other) == []
    assert "so class ids are ambiguous" in caplog.text
    bare = tmp_path / "bare"
    bare.mkdir()
    datasets.load_dataset("parquet", data_files=f"{data}/train-dark.parquet", split="train").remove_columns(
        "label"
    ).to_parquet(bare / "train.parquet")
    assert knn_of_stream(tmp_path, str(bare)) == []


def test_one_image_of_the_monitors_is_decoded_at_a_time(tmp_path, monkeypatch):
    """1,000 images of 12 megapixels take 36 GB."""
    data = str(tinted_folder(tmp_path / "data", ("red", "blue"), train=12, validation=4))
    read, alive = [], []
    inner = source_module.ImageSource.__getitem__

    def noted(self, index):
        record = inner(self, index)
        read.append(weakref.ref(record.image))
        alive.append(sum(image() is not None for image in read))
        return record

    monkeypatch.setattr(source_module.ImageSource, "__getitem__", noted)
    assert [type(item) for item in found(tmp_path, data)] == [Monitor, Panels, OnlineKNN]
    assert len(read) == 24 + 24 + 8
    assert max(alive) <= 3


def shard_of_squares(shard):
    for row in range(30):
        if shard == 7 and row == 1:
            raise EOFError("truncated")
        buffer = BytesIO()
        Image.new("RGB", (20, 20), (shard, row, 0)).save(buffer, "PNG")
        data = {1: None, 2: b"broken"}.get(row, buffer.getvalue())
        yield tables_module.StreamRecord(f"{shard}/{row}", data)
