"""Defects with a known origin in random models of nine kinds: are they found, named and repaired?"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from helpers import slow_except
from hf_regvit import diagnose
from hf_regvit.diagnosis.register_neurons import find_register_neurons
from hf_regvit.diagnosis.retrofit import RetrofitError, retrofit
from hf_regvit.diagnosis.sinks import SinkReader, counted, sink_events
from hf_regvit.models import configuration_regvit
from hf_regvit.models.processing import EvaluationTransform
from hf_regvit.models.tokens import TokenReader
from planted_defects import MODELS, PROCESSOR, QUIET, Sample, plant_neuron, plant_sink, sample


@pytest.mark.parametrize("family", slow_except(MODELS, "clip", "dinov3"))
def test_a_planted_neuron_is_the_first_of_the_search(family):
    seen, other = sample(64, seed=0), sample(32, seed=1)
    model = MODELS[family]()
    plant_neuron(model, seen)
    reader = TokenReader(model)
    norms = reader.read(other.pixels, layers=(3,), reduce=lambda tokens, _: tokens.norm(dim=-1)).patches().numpy()
    found = find_register_neurons(model, seen.images, processor=PROCESSOR)
    assert (found.emergence, found.layer) == (3, 3)
    assert np.array_equal(norms > found.cutoff, other.cells[0])
    assert found.best(1) == [[2, 37]]
    first, second = found.scores.flatten().topk(2).values.tolist()
    assert first == pytest.approx(6, abs=0.1)
    assert second < 3


# DINOv3 has rotary positions and no bias of the keys; it gets no planted attention.
@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("family", slow_except([name for name in MODELS if name != "dinov3"], "regvit", "clip"))
def test_planted_sinks_have_their_class_and_their_block(family, parks):
    seen, other = sample(64, seed=0), sample(32, seed=1)
    model = MODELS[family]()
    direction = plant_neuron(model, seen, ratio=20.0)
    plant_sink(model, direction, blocks=(3, 4), head=1, parks=parks)
    reader = TokenReader(model)
    sinks = SinkReader(reader, [str(i) for i in range(32)], 144, other.cells[0])
    reader.read_many(other.pixels, {"v": "all", "attention": "all"}, reduce=sinks.reductions(0))
    events = sink_events(sinks.numbers, "outliers")
    kind = "nop" if parks else "broadcast"
    where = torch.zeros(6, 3, dtype=torch.bool)
    where[3:5, 1] = True
    for name in ("events", kind):
        assert torch.equal(events[name].all(dim=0), where), name
        assert torch.equal(events[name].any(dim=0), where), name
    assert counted(events["events"]).tolist() == [2] * 32
    assert counted(sink_events(sinks.numbers, "column")["events"]).sum() == 0  # 2 to 4 tokens share the sink


def test_a_broadcast_sink_in_a_report():
    seen, other = sample(64, seed=0), sample(32, seed=1)
    model = MODELS["clip"]()
    plant_sink(model, plant_neuron(model, seen), blocks=(3, 4), head=1, parks=False)
    report = diagnose(model, other.images, **QUIET)
    found = report.sinks["sets"]["outliers"]
    assert [[i, j] for i, row in enumerate(found["class"]) for j, kind in enumerate(row) if kind] == [[3, 1], [4, 1]]
    assert found["class"][3][1] == "B"
    assert found["per_image"]["broadcast"] == 2
    assert report.spurious["hijackers"]["largest"] > 3  # one head of three, in one of the last two blocks


# --- Repair ---


def two_populations(family, seen, *, second=True):
    """Model with a strong population from block 2 on and, by default, a weaker one from block 4 on."""
    model = MODELS[family]()
    plant_neuron(model, seen, kind=0, block=1, neuron=37, ratio=20.0)
    if second:
        plant_neuron(model, seen, kind=1, block=3, neuron=11, ratio=8.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["regvit", "dinov2", "gated", "clip", "siglip", "dinov3", "vit"])
def test_two_populations_take_two_passes(family):
    both_kinds = sample(96, seed=0, kinds=2)
    model = two_populations(family, both_kinds)
    result = retrofit(model, both_kinds.images, num_register_tokens=4, **QUIET)
    report = result.report
    assert report.neurons == [[1, 37], [3, 11]]
    assert [found["layer"] for found in report.passes] == [2, 4]
    assert [found["share_after"] for found in report.passes] == [0, 0]
    assert report.stopped.startswith("clean: No distinct outlier population")
    assert report.judged["after"]["layers_with_outliers"] == []
    assert "group 2" in report.summary()
    assert result.model.config.register_sizes == [96]


@pytest.mark.parametrize("family", slow_except(MODELS, "regvit"))
def test_one_register_repairs_a_planted_neuron(family):
    seen = sample(64, seed=0)
    model = MODELS[family]()
    plant_neuron(model, seen)
    result = retrofit(model, seen.images, num_register_tokens=1, top_k=1, **QUIET)
    assert result.report.neurons == [[2, 37]]
    after = result.report.judged["after"]
    assert after["outlier_share"] == 0
    assert after["patch_cosine"] >= (0.998 if family == "siglip" else 0.999)
    pixels, model = seen.pixels[:8], result.model.base_model
    whole, alone = model(pixels), torch.cat([model(x[None]).last_hidden_state for x in pixels])
    torch.testing.assert_close(whole.last_hidden_state, alone, atol=1e-4, rtol=0)


def test_one_population_takes_one_pass_and_none_is_refused():
    both_kinds = sample(96, seed=0, kinds=2)
    model = two_populations("regvit", both_kinds, second=False)
    report = retrofit(model, both_kinds.images, num_register_tokens=2, **QUIET).report
    assert report.neurons == [[1, 37]]
    assert len(report.passes) == 1
    assert report.stopped.startswith("clean")
    with pytest.raises(RetrofitError, match="No distinct outlier population"):
        retrofit(MODELS["regvit"](), both_kinds.images, **QUIET)


@pytest.mark.slow
def test_the_number_of_passes_can_be_limited():
    both_kinds = sample(96, seed=0, kinds=2)
    model = two_populations("regvit", both_kinds)
    report = retrofit(model, both_kinds.images, num_register_tokens=2, max_passes=1, **QUIET).report
    assert report.neurons == [[1, 37]]
    assert report.stopped == "max_passes=1 reached"
    assert report.judged["after"]["layers_with_outliers"] == [4, 5, 6]


@pytest.mark.slow
def test_a_pass_that_does_not_remove_its_outliers_is_dropped():
    both_kinds = sample(96, seed=0, kinds=2)
    model = two_populations("regvit", both_kinds)  # the neuron of the second population is in block 3
    report = retrofit(model, both_kinds.images, num_register_tokens=2, highest_block=1, **QUIET).report
    assert report.stopped.startswith("no progress: the neurons [[")
    assert report.neurons == [[1, 37]]
    assert len(report.passes) == 1
    assert report.judged["after"]["layers_with_outliers"] == [4, 5, 6]


@pytest.mark.slow
def test_a_pass_that_changes_the_model_too_much_is_dropped(monkeypatch):
    both_kinds = sample(96, seed=0, kinds=2)
    model = two_populations("regvit", both_kinds)
    monkeypatch.setattr("hf_regvit.diagnosis.retrofit.MAX_COSINE_LOSS", -1.0)  # no pass raises the cosines by 1
    report = retrofit(model, both_kinds.images, num_register_tokens=2, **QUIET).report
    assert report.stopped == "worse: the neurons [[3, 11]] change CLS or normal patches too much"
    assert report.neurons == [[1, 37]]
    assert len(report.passes) == 1


@pytest.mark.slow
def test_a_neuron_that_is_active_everywhere_is_never_chosen():
    both_kinds = sample(96, seed=0, kinds=2)
    model = two_populations("regvit", both_kinds, second=False)
    with torch.no_grad():
        model.layers[1].mlp.fc1.bias[5] = 50.0
    report = retrofit(model, both_kinds.images, num_register_tokens=2, **QUIET).report
    assert report.neurons == [[1, 37]]


@pytest.mark.slow
def test_a_model_with_registers_keeps_them_and_gets_others():
    both_kinds = sample(96, seed=0, kinds=2)
    model = MODELS["regvit"]()
    model.resize_register_tokens(2)
    plant_neuron(model, both_kinds)
    result = retrofit(model, both_kinds.images, num_register_tokens=3, **QUIET)
    config = result.model.config
    assert (config.num_register_tokens, config.num_test_time_registers) == (5, 3)
    assert result.report.num_register_tokens == 3
    assert torch.equal(result.model.embeddings.register_tokens[:, :2], model.embeddings.register_tokens)
    assert not result.model.embeddings.register_tokens[:, 2:].any()
    assert result.report.judged["before"]["layers_with_outliers"] == [3, 4, 5, 6]
    assert result.report.judged["after"]["layers_with_outliers"] == []
    norms = TokenReader(result.model).read(both_kinds.pixels[:4], layers=(3,)).registers().norm(dim=-1)
    assert norms[:, :2].max() < 0.3 * norms[:, 2:].min()  # the neuron writes into the new ones only
    assert result.model.config.to_dict()["register_sizes"] == [96]
    with pytest.raises(RetrofitError, match="already has test-time registers"):
        retrofit(result.model, both_kinds.images, **QUIET)


def framed(inner, seed):
    """The images in the middle of larger ones of noise, whose border has 3 flat cells at -1: a second kind."""
    rng = np.random.default_rng(seed)
    count, border = len(inner.images), np.ones((18, 18), dtype=bool)
    border[3:15, 3:15] = False
    cells = [np.zeros((count, 18, 18), dtype=bool) for _ in range(2)]
    cells[0][:, 3:15, 3:15] = inner.cells[0].reshape(count, 12, 12)
    images = []
    for image, middle in enumerate(inner.images):
        values = rng.normal(0, 0.6, (144, 144, 3))
        for row, column in rng.permutation(np.argwhere(border))[:3]:
            values[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = -1.0
            cells[1][image, row, column] = True
        images.append(Image.fromarray(np.clip((values * 0.25 + 0.5) * 255, 0, 255).astype(np.uint8)))
        images[-1].paste(middle, (24, 24))
    return Sample(images, PROCESSOR(images, return_tensors="pt").pixel_values, [m.reshape(count, -1) for m in cells])


def cropping(size):
    sizes = {"crop_size": {"height": size, "width": size}}
    return BitImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.25] * 3, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("second", [True, False])
def test_sizes_are_tested_stored_and_warned_about(second, monkeypatch, tmp_path):
    """At 144 px, the crop shows cells of a second population that the search at 96 px cannot see."""
    seen = sample(64, seed=0)
    model, large = MODELS["regvit"](), framed(seen, 5)
    plant_neuron(model, seen, block=1, ratio=20.0)
    if second:
        plant_neuron(model, large, kind=1, block=3, neuron=11, ratio=20.0)

    def transform_for(reader, *, image_size=None):
        return EvaluationTransform.for_model(reader.model, cropping(image_size or 96))

    monkeypatch.setattr(TokenReader, "transform_for", transform_for)
    settings = {"processor": cropping(96), "progress": False, "num_register_tokens": 1}
    result = retrofit(model, large.images, image_sizes=[144], **settings)
    assert result.report.neurons == [[1, 37]]
    (size,) = result.report.sizes
    assert size["image_size"] == 144
    assert size["proved"] == (not second)
    assert size["suggested_registers"] in (1, math.ceil(size["outliers_per_image"]))
    assert ("at 144" in result.summary(), size["layers_with_outliers"] == []) == (True, not second)
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.register_sizes == ([96] if second else [96, 144])
    said = []
    monkeypatch.setattr(configuration_regvit.logger, "warning_once", said.append)
    loaded(seen.pixels[:1])
    assert said == []
    loaded(large.pixels[:1])
    assert len(said) == second
    if second:
        assert "tested on images of [96] pixels, not on (144, 144)" in said[0]
        assert "regvit retrofit --image_sizes 144" in said[0]
