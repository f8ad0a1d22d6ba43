"""Defects with a known origin in random models of eight families: are they found, named and repaired?"""

import numpy as np
import pytest
import torch

from planted_defects import MODELS, QUIET, plant_neuron, plant_sink, sample
from hf_regvit import diagnose
from hf_regvit.diagnosis.register_neurons import find_register_neurons
from hf_regvit.diagnosis.retrofit import retrofit

SEARCH, OTHER = 64, 48


@pytest.mark.parametrize("family", MODELS)
def test_dbg(family):
    model = MODELS[family]()
    seen, other = sample(SEARCH, seed=0), sample(OTHER, seed=1)
    plant_neuron(model, seen)
    report = diagnose(model, other.images, **QUIET)
    print(family, report.bimodal, report.layer, report.emergence_layer, report.outlier_share, other.cells[0].mean(), report.norm_ratio)
    found = find_register_neurons(model, seen.images, processor=QUIET["processor"])
    flat = found.scores.flatten().topk(2).values
    print("   ", found.best(1), flat.tolist(), found.emergence)
    result = retrofit(model, other.images + seen.images, **QUIET)
    print("   ", result.report.neurons, result.report.num_register_tokens, {k: (v["outlier_share"], v["patch_cosine"]) for k, v in result.report.judged.items()}, result.report.seconds)
