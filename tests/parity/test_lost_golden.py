"""LOST against the published code, every stage of it."""

import pytest
import torch

from helpers import golden_files, load_golden, requires_shared
from hf_regvit.evaluation.lost import LostSettings, lost_box

pytestmark = requires_shared


@pytest.mark.parametrize("name", golden_files("lost"))
def test_every_stage(name):
    golden, config = load_golden(name)
    features = golden["in.feats"][0]
    grid, side = tuple(config["dims"]), config["scales"][0]
    height, width = config["init_image_size"][1:]
    result = lost_box(features, grid, LostSettings(k=config["k_patches"]))

    similarity = golden["out.similarity"][result.seed]
    torch.testing.assert_close(result.seed_similarity.flatten(), similarity, atol=1e-4, rtol=0)
    assert torch.equal(result.degrees.flatten(), golden["out.degree"])
    acceptable = golden.get("out.acceptable_seeds", golden["out.seed"])
    assert result.seed == min(acceptable.tolist())  # of equals the first; upstream takes any
    assert result.tied_seeds == len(acceptable)
    # Which seed, and with it which rows, are free where several tie; the component and the box are not.
    if len(acceptable) == 1:
        assert torch.equal(result.expansion, golden["out.similar_patches"])
        torch.testing.assert_close(result.scores.flatten(), golden["out.M"], atol=1e-4, rtol=0)
        assert torch.equal(result.scores > 0, golden["out.positive_map"].bool())
    assert torch.equal(result.mask, golden["out.component"].bool())
    upstream = (1, 0, 3, 2)  # y before x
    assert [result.cells[i] for i in upstream] == golden["out.box_grid"].tolist()
    assert [result.seed_cells[i] for i in upstream] == golden["out.seed_box_grid"].tolist()
    assert list(result.box((side, side), (height, width))) == golden["out.box"].tolist()
    assert not result.degenerate


def test_all_seven_cases_are_there():
    assert len(golden_files("lost")) == 7
