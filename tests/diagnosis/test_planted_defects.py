"""Defects with a known origin in random models of eight families: are they found, named and repaired?"""

import numpy as np
import pytest
import torch

from hf_regvit import diagnose
from hf_regvit.diagnosis.register_neurons import find_register_neurons
from hf_regvit.diagnosis.sinks import SinkReader, counted, sink_events
from hf_regvit.models.tokens import TokenReader
from planted_defects import MODELS, PROCESSOR, QUIET, plant_neuron, plant_sink, sample


@pytest.mark.parametrize("family", MODELS)
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
@pytest.mark.parametrize("family", [name for name in MODELS if name != "dinov3"])
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
