"""DINO and iBOT losses of given logits, computed by the cross-entropy of the package with one prototype per logit."""

import torch

from hf_regvit.pretraining.losses import prototype_cross_entropy


def dino_loss(student_logits, teacher_probs, *, student_temperature=0.1):
    """Sum over all pairs of a student crop (S, B, K) and a teacher crop (T, B, K) of the mean over the B images."""
    (crops, images, _), teachers = student_logits.shape, teacher_probs.shape[0]
    rows = student_logits[:, None].expand(-1, teachers, -1, -1).flatten(0, 2)
    return prototype_cross_entropy(
        rows,
        torch.eye(rows.shape[1]).to(rows),
        teacher_probs.flatten(0, 1),
        weights=torch.full((len(rows),), 1 / images, dtype=torch.float64),
        temperature=student_temperature,
        target_rows=torch.arange(teachers * images).repeat(crops),
    )[0]


def ibot_loss(student_logits, teacher_probs, mask_weights, *, num_crops, student_temperature=0.1):
    """Weighted sum over the masked patches (M, K), divided by the number of crops."""
    prototypes = torch.eye(student_logits.shape[1]).to(student_logits)
    options = {"weights": mask_weights / num_crops, "temperature": student_temperature}
    return prototype_cross_entropy(student_logits, prototypes, teacher_probs, **options)[0]
