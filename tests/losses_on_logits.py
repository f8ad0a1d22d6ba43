"""DINO and iBOT losses of given logits, and all logits of a student, which the package never stores at once."""

from types import SimpleNamespace

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


def student_outputs(network, batch):
    """CLS tokens (G, B, D) and logits of the student: global (G, B, K), local (L, B, K), masked (M, K')."""
    heads, backbone, crops = network.student, network.student_backbone, batch["global_crops"]
    whole = backbone(crops.flatten(0, 1), bool_masked_pos=batch["masks"].flatten(0, 1))
    cls, masked = whole.pooler_output, whole.patch_tokens.flatten(0, 1)[batch["mask_indices"]]
    local = batch["local_crops"].flatten(0, 1)
    local_cls = backbone(local).pooler_output if len(local) else cls[:0]
    ibot_head = heads["ibot_head"] if "ibot_head" in heads else heads["dino_head"]
    images = crops.shape[1]
    return SimpleNamespace(
        cls_features=cls.unflatten(0, (-1, images)),
        global_logits=heads["dino_head"](cls).unflatten(0, (-1, images)),
        local_logits=heads["dino_head"](local_cls).unflatten(0, (-1, images)) if len(local) else None,
        masked_logits=ibot_head(masked),
    )
