"""Tokens that repeat in other images: slow twin, control at the input, defects of low norm in three families."""

import numpy as np
import pytest
import torch

from helpers import slow_except
from hf_regvit import diagnose
from hf_regvit.diagnosis.spurious import find_fixed_patterns, global_proxy_share, pattern_scores
from hf_regvit.models.tokens import TokenReader
from planted_defects import MODELS, PROCESSOR, QUIET, plant_neuron, sample


def test_scores_equal_their_slow_twin():
    tokens = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    centered = tokens - tokens.reshape(-1, 5).mean(dim=0)
    expected = np.zeros((4, 6))
    for image in range(4):
        for token in range(6):
            largest = [
                max(
                    torch.cosine_similarity(centered[image, token], vector, dim=0).item() for vector in centered[other]
                )
                for other in range(4)
                if other != image
            ]
            expected[image, token] = sorted(largest)[1]  # with four images, each is compared with the three others
    assert pattern_scores(tokens) == pytest.approx(expected, abs=1e-6)


def test_no_image_is_compared_with_itself():
    tokens = torch.eye(12)[:, None] + 0 * torch.ones(12, 3, 12)  # one direction per image: its own cosine is 1
    assert pattern_scores(tokens).max() < 0.05


def fixed_and_random(share, *, count=24, seed=0):
    """Random tokens, and a share of tokens that are the same in every image; random patch embeddings."""
    generator = torch.Generator().manual_seed(seed)
    tokens, embeddings = (torch.randn(count, 100, 32, generator=generator) for _ in range(2))
    fixed = round(100 * share)
    tokens[:, :fixed] = 3 * torch.randn(32, generator=generator) + 0.05 * tokens[:, :fixed]
    return tokens, embeddings


def test_the_gate_needs_a_population_and_refuses_large_ones():
    found = find_fixed_patterns(*fixed_and_random(0.05))
    assert found.judged
    assert np.array_equal(found.flagged, np.arange(100)[None].repeat(24, axis=0) < 5)
    for share, judged in ((0.0, True), (0.4, False)):
        found = find_fixed_patterns(*fixed_and_random(share))
        assert (found.judged, found.flagged.any()) == (judged, False)


def test_tokens_whose_patches_repeat_are_left_out():
    tokens, embeddings = fixed_and_random(0.05)
    embeddings[:, :2] = torch.ones(32)
    found = find_fixed_patterns(tokens, embeddings)
    assert np.array_equal(found.repeated_input.sum(axis=0).nonzero()[0], [0, 1])
    assert np.array_equal(found.flagged.sum(axis=0).nonzero()[0], [2, 3, 4])


def test_images_all_alike_are_no_finding():
    tokens = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(0)).expand(12, -1, -1)
    found = find_fixed_patterns(tokens, tokens)
    assert not found.flagged.any()


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov3"])
def test_identical_patches_are_no_defect(family):
    """The trap: the flat cells of these images repeat in the images themselves, and the model is random."""
    report = diagnose(MODELS[family](), sample(32, seed=0).images, **QUIET)
    assert report.spurious["flagged"] == 0
    assert report.spurious["repeated_input"] > 50  # without the control, they would be a finding
    assert not report.bimodal


@pytest.mark.parametrize("family", slow_except(["clip", "siglip", "dinov3"], "siglip"))
def test_defects_of_low_norm_are_found_without_norms(family):
    model, other = MODELS[family](), sample(32, seed=1, pattern=11.0)
    clean = diagnose(model, other.images, **QUIET)
    assert clean.spurious["flagged"] == 0
    plant_neuron(model, sample(64, seed=0, pattern=11.0), block=4, ratio=2.0)
    report = diagnose(model, other.images, **QUIET)
    assert not report.bimodal  # the norms have one mode
    assert report.spurious["share"] * other.cells[0].size >= 0.8 * other.cells[0].sum()
    assert 1.5 < report.spurious["norm_ratio"] < 3
    reader = TokenReader(model, PROCESSOR)
    tokens = torch.from_numpy(reader.patch_maps(other.images)).flatten(1, 2)
    found = find_fixed_patterns(tokens, reader.read(other.pixels, site="patch_embedding").at())
    assert not (found.flagged & ~other.cells[0]).any()


def test_a_token_of_the_whole_image_is_one_that_both_halves_share():
    """Compare with loops over the composites."""
    reader, pixels = TokenReader(MODELS["vit"]()), sample(5, seed=3).pixels
    found = global_proxy_share(reader, pixels, batch_size=2)
    tokens = []
    for image in range(5):
        mixed = torch.cat([pixels[image, ..., :48], pixels[(image + 1) % 5, ..., 48:]], dim=2)
        reading = reader.read(mixed[None])
        tokens.append(reader.final_norm(reading.patches())[0].detach())
    mean = torch.cat(tokens).mean(dim=0)
    shared = total = 0
    for image in tokens:
        unit = torch.nn.functional.normalize(image - mean, dim=-1).reshape(12, 12, -1)
        left, right = unit[:, :6].reshape(72, -1), unit[:, 6:].reshape(72, -1)
        for one, other in ((left, right), (right, left)):
            shared += sum((other @ vector).max().item() >= 0.95 for vector in one)
            total += 72
    assert found == pytest.approx(shared / total, abs=2 / total)
    assert global_proxy_share(reader, pixels[..., :8], batch_size=2) is None
