"""Options in the manner of DINOv3, from the arguments into a run: Gram anchoring, gathered KoLeo, shared jitter."""

import pytest
from transformers import TrainerCallback

from hf_regvit.pretraining.run import _build_multi_crop, _build_network
from tiny_run import arguments, tiny_config, trained


class Teachers(TrainerCallback):
    """After every step: how far the Gram teacher is from the present one, and whether it has moved."""

    def __init__(self):
        self.distances = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        pairs = zip(model.gram_teacher.parameters(), model.teacher_backbone.parameters())
        self.distances.append(max((a - b).abs().max().item() for a, b in pairs))


def test_gram_teacher_is_refreshed_every_n_steps(tmp_path):
    seen = Teachers()
    options = {"gram_loss_weight": 2.0}
    trainer = trained(tmp_path, callbacks=[seen], options=options, gram_refresh_steps=3, **options)
    # Equal right after the third and the sixth step, behind in between; the first step has a learning rate of 0.
    assert [distance == 0 for distance in seen.distances] == [True, False, True, False, False, True]
    assert all("gram_loss" in line for line in trainer.state.log_history if "loss" in line)


def test_arguments_reach_the_network(tmp_path):
    others = {"paka_loss_weight": 0.3, "ibot_visible_patches": True, "average_heads_only": True}
    args = arguments(tmp_path, gram_loss_weight=1.5, koleo_gathered=True, koleo_neighbours=2, **others)
    network = _build_network(args, tiny_config())
    assert {name: getattr(network, name) for name in others} == others
    assert (network.gram_loss_weight, network.koleo_gathered, network.koleo_neighbours) == (1.5, True, 2)
    assert network.gram_teacher is not None
    assert _build_network(arguments(tmp_path), tiny_config()).gram_teacher is None


def test_arguments_reach_the_crops(tmp_path):
    args = arguments(tmp_path, share_jitter=True, locals_from_globals=True, flip_probability=0.0)
    multi_crop = _build_multi_crop(args, tiny_config(), 16, 8)
    assert (multi_crop.share_jitter, multi_crop.locals_from_globals, multi_crop.flip_probability) == (True, True, 0.0)


def test_gram_refresh_needs_a_step(tmp_path):
    assert arguments(tmp_path, gram_refresh_steps=0).gram_refresh_steps == 0  # never
    with pytest.raises(ValueError, match="gram_refresh_steps is -1; expected at least 1"):
        arguments(tmp_path, gram_refresh_steps=-1)


def test_a_gram_teacher_needs_no_gradient(tmp_path):
    network = _build_network(arguments(tmp_path, gram_loss_weight=1.0), tiny_config())
    assert not any(parameter.requires_grad for parameter in network.gram_teacher.parameters())
