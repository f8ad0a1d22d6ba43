"""Reference implementations of the vectorized formulas: plain Python loops over float64 numbers."""

import math
from collections.abc import Sequence

import torch
import torchvision.transforms.functional as TF
from PIL import Image

from hf_regvit.data.augmentation import ViewParameters


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    return [value / sum(exps) for value in exps]


def cross_entropy(target: Sequence[float], logits: Sequence[float], temperature: float) -> float:
    """Compute `-sum_k t_k log softmax(s / temperature)_k`, entry by entry."""
    probs = softmax([value / temperature for value in logits])
    return -sum(t * math.log(p) for t, p in zip(target, probs, strict=True))


def dino_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1) -> float:
    """Compute the loss of every student crop with every teacher crop: mean over images, sum over pairs."""
    total = 0.0
    for student_crop in student.tolist():
        for teacher_crop in teacher.tolist():
            rows = [cross_entropy(t, s, temperature) for t, s in zip(teacher_crop, student_crop, strict=True)]
            total += sum(rows) / len(rows)
    return total


def feature_loss(predictions: torch.Tensor, targets: torch.Tensor) -> float:
    """Compute the mean over the rows of 0.9 (1 - cosine) + 0.1 smooth L1, where smooth L1 is a mean over channels."""
    total = 0.0
    for row, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(row, target, strict=True))
        norms = math.sqrt(sum(x * x for x in row)) * math.sqrt(sum(y * y for y in target))
        gaps = [abs(x - y) for x, y in zip(row, target, strict=True)]
        smooth = sum(gap * gap / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)
        total += 0.9 * (1 - dot / norms) + 0.1 * smooth
    return total / len(predictions)


def layer_norm(row: Sequence[float]) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in row]


def ibot_loss(student: torch.Tensor, teacher: torch.Tensor, masks: torch.Tensor, temperature: float = 0.1) -> float:
    """Compute the mean over the masked patches of each crop, then the mean over crops; crops without masks count as 0.

    `student` and `teacher` are `(crops, patches, K)`, `masks` is `(crops, patches)`.
    """
    total = 0.0
    for crop in range(masks.shape[0]):
        rows = [
            cross_entropy(teacher[crop, patch].tolist(), student[crop, patch].tolist(), temperature)
            for patch in range(masks.shape[1])
            if masks[crop, patch]
        ]
        total += sum(rows) / max(len(rows), 1)
    return total / masks.shape[0]


def koleo_loss(features: torch.Tensor, eps: float = 1e-8, neighbors: int = 1) -> float:
    rows = []
    for row in features.tolist():
        norm = max(math.sqrt(sum(value * value for value in row)), eps)
        rows.append([value / norm for value in row])
    total = 0.0
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        others.sort(key=lambda j: -sum(a * b for a, b in zip(row, rows[j], strict=True)))
        for nearest in others[:neighbors]:
            distance = math.sqrt(sum((a - b + eps) ** 2 for a, b in zip(row, rows[nearest], strict=True)))
            total -= math.log(distance + eps)
    return total / len(rows) / neighbors


def gram_loss(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Compute the mean squared difference between student and teacher cosines over all patch pairs of each crop."""

    def cosine(a: Sequence[float], b: Sequence[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    total, count = 0.0, 0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        for i in range(len(ours)):
            for j in range(len(ours)):
                total += (cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2
                count += 1
    return total / count


def paka_loss(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Compute one minus the centered kernel alignment of student and teacher patches, averaged over the crops."""

    def centered_kernel(patches: list[list[float]]) -> list[list[float]]:
        kernel = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in patches] for a in patches]
        count, indices = len(patches), range(len(patches))
        rows = [sum(kernel[i]) / count for i in indices]
        mean = sum(rows) / count
        return [[kernel[i][j] - rows[i] - rows[j] + mean for j in indices] for i in indices]

    total = 0.0
    for pair in zip(student.tolist(), teacher.tolist(), strict=True):
        ours, theirs = ([value for row in centered_kernel(patches) for value in row] for patches in pair)
        dot = sum(x * y for x, y in zip(ours, theirs, strict=True))
        total += 1 - dot / math.sqrt(sum(x * x for x in ours)) / math.sqrt(sum(y * y for y in theirs))
    return total / len(student)


def prototype_cross_entropy(
    features: torch.Tensor, prototypes: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, temperature: float
) -> float:
    """Compute the weighted sum of the cross-entropy over rows, with one dot product per prototype."""
    total = 0.0
    for row, target, weight in zip(features.tolist(), targets.tolist(), weights.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(row, prototype, strict=True)) for prototype in prototypes.tolist()]
        total += weight * cross_entropy(target, logits, temperature)
    return total


def sinkhorn_knopp(logits: torch.Tensor, temperature: float, num_iterations: int = 3) -> list[list[float]]:
    """Scale prototypes, then samples, to equal mass on the whole matrix."""
    top = float(logits.max())
    matrix = [[math.exp((value - top) / temperature) for value in row] for row in logits.tolist()]
    samples, prototypes = len(matrix), len(matrix[0])
    for _ in range(num_iterations):
        for k in range(prototypes):
            mass = sum(matrix[i][k] for i in range(samples)) * prototypes
            for i in range(samples):
                matrix[i][k] /= mass
        for i in range(samples):
            mass = sum(matrix[i]) * samples
            matrix[i] = [value / mass for value in matrix[i]]
    return [[value * samples for value in row] for row in matrix]


def softmax_centers(batches: Sequence[torch.Tensor], momentum: float) -> list[list[float]]:
    """Compute the center of each step and the final center: a running mean that lags by one step."""
    center = [0.0] * batches[0].shape[-1]
    used = [center]
    for batch in batches:
        rows = batch.reshape(-1, batch.shape[-1]).tolist()
        mean = [sum(row[k] for row in rows) / len(rows) for k in range(len(center))]
        center = [momentum * c + (1 - momentum) * m for c, m in zip(center, mean, strict=True)]
        used.append(center)
    return used


def prototype_logits(x: torch.Tensor, layers: Sequence[tuple], g: torch.Tensor, v: torch.Tensor) -> list[list[float]]:
    """Apply the head to `(n, D)`: linear layers with exact GELU, unit length, `g * cosine` to each prototype."""
    rows = []
    for value in x.tolist():
        for index, (weight, bias) in enumerate(layers):
            value = [
                sum(w * a for w, a in zip(row, value, strict=True)) + b
                for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
            ]
            if index < len(layers) - 1:
                value = [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in value]
        norm = math.sqrt(sum(a * a for a in value))
        row = []
        for gain, prototype in zip(g.flatten().tolist(), v.tolist(), strict=True):
            length = math.sqrt(sum(p * p for p in prototype))
            row.append(sum(gain * p / length * a / norm for p, a in zip(prototype, value, strict=True)))
        rows.append(row)
    return rows


def cosine_table(
    *, base: float, final: float, total: int, warmup: int = 0, warmup_start: float = 0.0, frozen: int = 0
) -> list[float]:
    """Compute the schedule as a list: zeros, then a line including both ends, then half a cosine period."""
    table = [0.0] * frozen
    for i in range(warmup):
        table.append(warmup_start if warmup == 1 else warmup_start + (base - warmup_start) * i / (warmup - 1))
    steps = total - warmup - frozen
    for i in range(steps):
        table.append(final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / steps)))
    return table


def ema(teacher: Sequence[float], students: Sequence[Sequence[float]], momenta: Sequence[float]) -> list[float]:
    """Compute the teacher after one update per student state, number by number."""
    values = list(teacher)
    for student, momentum in zip(students, momenta, strict=True):
        values = [momentum * t + (1 - momentum) * s for t, s in zip(values, student, strict=True)]
    return values


def torchvision_view(image: Image.Image, parameters: ViewParameters, size: int, kernel_size: int = 9) -> Image.Image:
    """One view in the order of the specification, composed from torchvision's functions on Pillow images."""
    left, top, right, bottom = parameters.box
    mode = TF.InterpolationMode.BICUBIC
    view = TF.resized_crop(image, top, left, bottom - top, right - left, [size, size], mode)
    if parameters.flip:
        view = TF.hflip(view)
    for name, amount in parameters.jitter:
        view = getattr(TF, f"adjust_{name}")(view, amount)
    if parameters.grayscale:
        view = TF.rgb_to_grayscale(view, 3)
    if parameters.sigma is not None:
        view = TF.gaussian_blur(view, [kernel_size, kernel_size], [parameters.sigma, parameters.sigma])
    return TF.solarize(view, 128) if parameters.solarize else view


def contrastive_logits(
    images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float = 0.0
) -> list[list[float]]:
    """Compute scale times the dot product plus bias of each image (row) with each text (column)."""
    return [
        [scale * sum(x * y for x, y in zip(image, text, strict=True)) + bias for text in texts.tolist()]
        for image in images.tolist()
    ]


def image_text_softmax_loss(images: torch.Tensor, texts: torch.Tensor, scale: float) -> float:
    """Compute the cross-entropy of the own text of each image and of the own image of each text, averaged."""
    rows = contrastive_logits(images, texts, scale)
    columns = [list(column) for column in zip(*rows, strict=True)]
    losses = [-math.log(softmax(line)[own]) for lines in (rows, columns) for own, line in enumerate(lines)]
    return sum(losses) / len(losses)


def image_text_sigmoid_loss(images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float) -> float:
    """Compute the binary cross-entropy of every pair, summed over all pairs and divided by the number of images."""
    total = 0.0
    for i, row in enumerate(contrastive_logits(images, texts, scale, bias)):
        for j, logit in enumerate(row):
            total += math.log(1 + math.exp(-logit if i == j else logit))
    return total / len(images)
