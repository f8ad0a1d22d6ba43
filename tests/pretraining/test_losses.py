"""Losses and targets: comparison with loop implementations, limits, and invalid input."""

import math

import pytest
import torch
import torch.nn.functional as F

import oracles
from builders import normal
from hf_regvit.pretraining.losses import (
    SoftmaxCenter,
    gram_loss,
    koleo_loss,
    paka_loss,
    prototype_cross_entropy,
    sinkhorn_knopp,
)
from losses_on_logits import dino_loss, ibot_loss


def probabilities(*shape, seed=1, temperature=0.5):
    return (normal(*shape, seed=seed) / temperature).softmax(-1)


# ---- DINO and iBOT ----


@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (3, 2), (5, 1)])
def test_dino_loss_equals_its_loop(students, teachers):
    student, teacher = normal(students, 4, 7), probabilities(teachers, 4, 7)
    assert dino_loss(student, teacher).item() == pytest.approx(oracles.dino_loss(student, teacher), rel=1e-5)


def test_dino_gradient_is_that_of_the_library_cross_entropy():
    student, teacher = normal(3, 4, 7, dtype=torch.float64).requires_grad_(), probabilities(2, 4, 7).double()
    (ours,) = torch.autograd.grad(dino_loss(student, teacher), student)
    reference = sum(F.cross_entropy(s / 0.1, t) for s in student for t in teacher)
    (expected,) = torch.autograd.grad(reference, student)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)  # targets sum to 1 up to float32 rounding


def test_dino_loss_of_uniform_logits_is_ln_k():
    loss = dino_loss(torch.zeros(1, 3, 50), probabilities(1, 3, 50))
    assert loss.item() == pytest.approx(math.log(50), rel=1e-6)


def test_dino_targets_are_constants():
    teacher = probabilities(1, 2, 5).requires_grad_()
    dino_loss(normal(1, 2, 5).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_ibot_loss_equals_its_loop():
    masks = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    student, teacher = normal(4, 4, 6), probabilities(4, 4, 6)
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    loss = ibot_loss(student[masks], teacher[masks], weights, num_crops=4)
    assert loss.item() == pytest.approx(oracles.ibot_loss(student, teacher, masks), rel=1e-5)


def test_ibot_loss_without_masked_patches_is_zero_and_differentiable():
    student = normal(0, 6).requires_grad_()
    loss = ibot_loss(student, probabilities(0, 6), torch.zeros(0), num_crops=4)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 6)


def test_ibot_targets_are_constants():
    teacher = probabilities(3, 5).requires_grad_()
    ibot_loss(normal(3, 5).requires_grad_(), teacher, torch.ones(3), num_crops=2).backward()
    assert teacher.grad is None


def test_half_precision_logits_are_taken_to_float32():
    student, teacher = normal(2, 3, 9).bfloat16(), probabilities(1, 3, 9)
    loss = dino_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracles.dino_loss(student.float(), teacher), rel=1e-5)


# ---- Cross-entropy without logits ----


def prototype_case(rows=7, prototypes=9, *, dtype=torch.float64):
    return {
        "features": F.normalize(normal(rows, 4, dtype=dtype), dim=1).requires_grad_(),
        "prototypes": normal(prototypes, 4, seed=2, dtype=dtype).requires_grad_(),
        "targets": (normal(rows, prototypes, seed=1, dtype=dtype) / 0.5).softmax(-1),
        "weights": normal(rows, seed=3, dtype=dtype),
    }


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
def test_prototype_cross_entropy_equals_its_loop_in_any_chunks(chunk_rows):
    case = prototype_case()
    loss, per_row = prototype_cross_entropy(**case, temperature=0.1, chunk_rows=chunk_rows)
    arguments = {name: tensor.detach() for name, tensor in case.items()}
    assert loss.item() == pytest.approx(oracles.prototype_cross_entropy(**arguments, temperature=0.1), rel=1e-10)
    assert not per_row.requires_grad
    assert (per_row * case["weights"]).sum().item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_prototype_cross_entropy_has_the_gradient_of_the_plain_form(chunk_rows):
    case = prototype_case()
    rows = torch.tensor([1, 1, 0, 6, 2, 3, 5])
    loss, _ = prototype_cross_entropy(**case, target_rows=rows, chunk_rows=chunk_rows)
    plain = F.cross_entropy(case["features"] @ case["prototypes"].T / 0.1, case["targets"][rows], reduction="none")
    plain = (plain * case["weights"]).sum()
    inputs = [case["features"], case["prototypes"]]
    # An outer factor, as the division by the accumulated micro-batches is, and a second pass through the same graph.
    ours = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    for actual, expected in zip(ours, torch.autograd.grad(3 * plain, inputs), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)
    for actual, again in zip(ours, torch.autograd.grad(3 * loss, inputs), strict=True):
        assert torch.equal(actual, again)


def test_prototypes_learn_from_features_that_are_constants():
    whole, frozen = prototype_case(), prototype_case()
    prototype_cross_entropy(**whole)[0].backward()
    prototype_cross_entropy(**{**frozen, "features": frozen["features"].detach()})[0].backward()
    torch.testing.assert_close(frozen["prototypes"].grad, whole["prototypes"].grad)
    assert whole["prototypes"].grad.any()


def test_more_prototypes_than_a_chunk_of_logits_holds(monkeypatch):
    case = prototype_case()
    expected, _ = prototype_cross_entropy(**case)
    monkeypatch.setattr("hf_regvit.pretraining.losses._CHUNK_LOGITS", {"cpu": 4, "other": 4})  # of 9 prototypes
    assert prototype_cross_entropy(**case)[0].item() == pytest.approx(expected.item(), rel=1e-12)


def test_prototype_cross_entropy_survives_large_logits():
    case = prototype_case(dtype=torch.float32)
    loss, _ = prototype_cross_entropy(**{**case, "prototypes": 1e3 * case["prototypes"]}, temperature=0.04)
    (gradient,) = torch.autograd.grad(loss, case["features"])
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_prototype_cross_entropy_of_no_rows_keeps_the_head_in_the_graph():
    case = prototype_case(rows=0)
    loss, per_row = prototype_cross_entropy(**case)
    loss.backward()
    assert loss.item() == 0
    assert per_row.shape == (0,)
    assert not case["prototypes"].grad.any()


def test_prototype_cross_entropy_takes_half_precision_to_float32():
    case = {name: tensor.detach() for name, tensor in prototype_case().items()}
    halves = {**case, "features": case["features"].bfloat16(), "prototypes": case["prototypes"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = prototype_cross_entropy(**halves)
    exact = {**halves, "features": halves["features"].double(), "prototypes": halves["prototypes"].double()}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracles.prototype_cross_entropy(**exact, temperature=0.1), rel=1e-5)


# ---- Gram anchoring ----


def test_gram_loss_equals_its_loop():
    student, teacher = normal(3, 5, 4), normal(3, 5, 6, seed=1)
    assert gram_loss(student, teacher).item() == pytest.approx(oracles.gram_loss(student, teacher), rel=1e-5)


def test_gram_loss_sees_neither_scale_nor_rotation_of_the_features():
    student = normal(2, 6, 4)
    rotation, _ = torch.linalg.qr(normal(4, 4, seed=1))
    assert gram_loss(student, 7 * student @ rotation).item() == pytest.approx(0, abs=1e-10)
    assert gram_loss(student, normal(2, 6, 4, seed=2)).item() > 0.01


def test_gram_targets_are_constants_and_half_precision_is_taken_to_float32():
    student, teacher = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gram_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracles.gram_loss(student.detach(), teacher.detach()), rel=1e-5)
    assert teacher.grad is None
    assert student.grad.any()


# ---- Patch kernel alignment ----


def test_paka_loss_equals_its_loop():
    student, teacher = normal(3, 5, 4, dtype=torch.float64), normal(3, 5, 6, seed=1, dtype=torch.float64)
    assert paka_loss(student, teacher).item() == pytest.approx(oracles.paka_loss(student, teacher), rel=1e-10)


def test_paka_loss_sees_neither_offset_nor_scale_nor_rotation_of_the_features():
    student = normal(2, 6, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(normal(4, 4, seed=1, dtype=torch.float64))
    assert paka_loss(student, 7 * student @ rotation + 3).item() == pytest.approx(0, abs=1e-12)
    assert paka_loss(student, normal(2, 6, 4, seed=2, dtype=torch.float64)).item() > 0.01


def test_paka_targets_are_constants_and_half_precision_is_taken_to_float32():
    student, teacher = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = paka_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracles.paka_loss(student.detach(), teacher.detach()), rel=1e-5)
    assert teacher.grad is None
    assert student.grad.any()


def test_paka_of_identical_patches_is_finite():
    student = normal(2, 1, 4).expand(-1, 3, -1).clone().requires_grad_()
    loss = paka_loss(student, normal(2, 3, 4, seed=1))
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert torch.isfinite(student.grad).all()


# ---- KoLeo ----


def test_koleo_equals_its_loop():
    features = normal(9, 5)
    assert koleo_loss(features).item() == pytest.approx(oracles.koleo_loss(features), rel=1e-5)


@pytest.mark.parametrize("neighbors", [1, 3, 8])
def test_koleo_of_several_neighbours_equals_its_loop(neighbors):
    features = normal(9, 5)
    expected = oracles.koleo_loss(features, neighbors=neighbors)
    # Without a process group there is nothing to gather.
    for gathered in (False, True):
        actual = koleo_loss(features, neighbors=neighbors, gathered=gathered)
        assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_koleo_of_an_orthonormal_batch():
    assert koleo_loss(3 * torch.eye(6)).item() == pytest.approx(-0.5 * math.log(2), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_koleo_of_identical_rows_is_finite_under_autocast(dtype):
    features = normal(1, 8).expand(4, 8).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = koleo_loss(features)
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(8) + 1e-8), rel=1e-3)


def test_koleo_sees_no_length_down_to_its_epsilon():
    features = normal(9, 5)
    assert koleo_loss(features * 1e-7).item() == pytest.approx(koleo_loss(features).item(), rel=1e-4)
    shrunk = F.normalize(features, dim=1) * 1e-9  # below 1e-8 the norm is taken for 1e-8: a tenth of the length
    assert koleo_loss(shrunk).item() == pytest.approx(koleo_loss(features).item() + math.log(10), rel=1e-3)


def test_koleo_finds_its_neighbours_in_full_precision():
    angles = torch.tensor([0.0, 0.030, -0.028, 3.0, 3.020, 2.985])  # cosines that bfloat16 cannot tell apart
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(features)
    assert loss.item() == pytest.approx(oracles.koleo_loss(features), rel=1e-4)


def test_koleo_gradient_pushes_neighbours_apart():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]).requires_grad_()
    koleo_loss(features).backward()
    moved = (features - 0.01 * features.grad).detach()
    before, after = (F.normalize(x, dim=-1) for x in (features.detach(), moved))
    assert (after[0] - after[1]).norm() > (before[0] - before[1]).norm()


# ---- Sinkhorn-Knopp ----


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("samples", "prototypes"), [(6, 4), (3, 11)])
def test_sinkhorn_equals_its_loop(samples, prototypes, iterations):
    logits = normal(samples, prototypes) * 0.1
    expected = torch.tensor(oracles.sinkhorn_knopp(logits, 0.07, iterations))
    actual = sinkhorn_knopp(logits, temperature=0.07, num_iterations=iterations)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_sinkhorn_balances_prototypes():
    targets = sinkhorn_knopp(normal(64, 8) * 0.1, temperature=0.07, num_iterations=50)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    torch.testing.assert_close(targets.sum(0), torch.full((8,), 8.0), atol=1e-3, rtol=0)


def test_sinkhorn_ignores_an_added_constant():
    logits = normal(5, 7)
    torch.testing.assert_close(
        sinkhorn_knopp(logits + 3, temperature=0.05), sinkhorn_knopp(logits, temperature=0.05), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("scale", [20.0, 1e4])
def test_sinkhorn_neither_overflows_nor_vanishes(scale):
    logits = scale * normal(6, 9)
    logits[0] -= 5 * scale  # a sample far below all others
    logits[:, 1] -= 5 * scale  # a prototype that no sample is near
    targets = sinkhorn_knopp(logits, temperature=0.04)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_sinkhorn_of_a_collapsed_teacher_is_uniform():
    targets = sinkhorn_knopp(normal(1, 16).expand(8, 16), temperature=0.04)
    torch.testing.assert_close(targets, torch.full((8, 16), 1 / 16))


def test_sinkhorn_of_no_rows():
    assert sinkhorn_knopp(normal(0, 5), temperature=0.04).shape == (0, 5)


def test_sinkhorn_leaves_its_argument_alone():
    logits = normal(4, 5)
    before = logits.clone()
    sinkhorn_knopp(logits, temperature=0.04)
    assert torch.equal(logits, before)


# ---- Centering ----


def test_center_equals_its_loop_and_lags_by_one_step():
    batches = [normal(5, 4, seed=seed) for seed in range(4)]
    expected = oracles.softmax_centers(batches, 0.8)
    center = SoftmaxCenter(4, momentum=0.8)
    for step, batch in enumerate(batches):
        center.commit()
        torch.testing.assert_close(center.center, torch.tensor(expected[step]))
        probs = center(batch, temperature=0.1)
        row = oracles.softmax([(z - c) / 0.1 for z, c in zip(batch[2].tolist(), expected[step], strict=True)])
        torch.testing.assert_close(probs[2], torch.tensor(row))
        center.accumulate(batch)
    center.commit()
    torch.testing.assert_close(center.center, torch.tensor(expected[-1]))


def test_micro_batches_move_the_center_once():
    rows = normal(6, 4)
    whole, halves = SoftmaxCenter(4), SoftmaxCenter(4)
    whole.accumulate(rows)
    halves.accumulate(rows[:2])
    halves.accumulate(rows[2:])
    for center in (whole, halves):
        center.commit()
    torch.testing.assert_close(whole.center, halves.center)


def test_no_rows_leave_the_center_as_it_is():
    center = SoftmaxCenter(4)
    center.accumulate(normal(3, 4))
    center.commit()
    before = center.center.clone()
    center.accumulate(normal(0, 4))
    center.commit()
    assert torch.equal(center.center, before)
    center.commit()
    assert torch.equal(center.center, before)


def test_a_checkpoint_keeps_what_is_pending():
    first, second = SoftmaxCenter(4), SoftmaxCenter(4)
    first.accumulate(normal(3, 4))
    second.load_state_dict(first.state_dict())
    for center in (first, second):
        center.commit()
    assert first.center.any()
    assert torch.equal(first.center, second.center)
