"""Classify by the nearest training images of frozen features: k-NN votes, its accuracy, few-shot draws."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# --- Few-shot ---


def few_shot_indices(labels: Tensor, per_class: int, *, seed: int) -> Tensor:
    """Sample `per_class` images of each of the C' classes present; returns (C' * per_class,) ascending indices.

    Raises:
        ValueError: A class has fewer images.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0].numpy()
        if len(members) < per_class:
            raise ValueError(
                f"Class {label} has {len(members)} training images, but {per_class} per class were requested. Request "
                "fewer images per class."
            )
        chosen += rng.permutation(members)[:per_class].tolist()
    return torch.tensor(sorted(chosen))


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk_size: int = 1024,
    bank_chunk_size: int = 16384,
) -> dict[int, Tensor]:
    """Compute class scores by a vote of the nearest training images, weighted by similarity.

    Features are L2-normalized here. The votes are softmax(cosine / temperature) over all max(k) neighbors. For each k,
    the first k votes are summed per class, so only the scores of the largest k sum to one.

    Args:
        train_features: (n, D) features of the training images.
        train_labels: (n,) class ids in [0, C).
        test_features: (m, D) features of the test images.
        k: Numbers of neighbors.
        temperature: Temperature of the softmax, in units of cosine similarity.
        num_classes: Number C of classes; by default, the largest label plus one.
        chunk_size: Number of test images processed at once.
        bank_chunk_size: Number of training images processed at once. Besides features and result, memory use is
            chunk_size * bank_chunk_size similarities and one chunk of each, independent of n and m.

    Returns:
        Class scores (m, C), float32, for each k.

    Raises:
        ValueError: Shapes do not match, labels are out of range, features are not finite, or k exceeds n.

    Source: arXiv 1805.01978; dinov2 `eval/knn.py` for the weights. Slow twin: tests/evaluation/test_probes.py.
    """
    _check_knn(train_features, test_features, k)
    labels = train_labels.long()
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    check_labels(labels, len(train_features), num_classes)
    chunks: dict[int, list[Tensor]] = {neighbours: [] for neighbours in k}
    for queries in test_features.split(chunk_size):
        nearest, index = _nearest(queries, train_features, max(k), bank_chunk_size)  # (chunk, K), best first
        votes = (nearest / temperature).softmax(dim=1)
        voted = labels.to(index.device)[index]
        for neighbours in k:
            scores = votes.new_zeros(len(queries), num_classes)
            chunks[neighbours].append(scores.scatter_add_(1, voted[:, :neighbours], votes[:, :neighbours]))
    return {neighbours: torch.cat(scores) for neighbours, scores in chunks.items()}


def _nearest(queries: Tensor, bank: Tensor, count: int, bank_chunk_size: int) -> tuple[Tensor, Tensor]:
    """Find the nearest images of the bank; return cosines and indices, best first, (queries, count) each.

    The best of every chunk of the bank are merged with the best so far; ties keep the earlier image.
    """
    queries = F.normalize(queries.float(), dim=1)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), bank_chunk_size):
        part = F.normalize(bank[start : start + bank_chunk_size].float(), dim=1)
        similarity, index = (queries @ part.T).topk(min(count, len(part)), dim=1)
        if best is None:
            best = similarity, index
            continue
        similarity, index = torch.cat([best[0], similarity], dim=1), torch.cat([best[1], index + start], dim=1)
        similarity, order = similarity.topk(min(count, similarity.shape[1]), dim=1)
        best = similarity, index.gather(1, order)
    assert best is not None  # the bank is not empty, because k is at least 1 and at most its size
    return best


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Compute the top-1 accuracy of the test images, in [0, 1], for each k; see `knn_classify` for the arguments.

    Raises:
        ValueError: `knn_classify` raises, or `test_labels` do not match `test_features`.
    """
    if len(test_labels) != len(test_features):
        raise ValueError(
            f"There are {len(test_labels)} test labels for {len(test_features)} test features, expected one each."
        )
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores = knn_classify(
        train_features, train_labels, test_features, k=k, temperature=temperature, num_classes=num_classes
    )
    truth = test_labels.to(test_features.device)
    return {neighbours: (score.argmax(1) == truth).float().mean().item() for neighbours, score in scores.items()}


def check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    """Raise an error if there is not one label in [0, num_classes) for each of `count` images."""
    if labels.shape != (count,) or not count:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {count} images. Pass one label per image and at least one "
            "image."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"Labels span [{int(labels.min())}, {int(labels.max())}], but must lie in [0, {num_classes}). Check "
            "num_classes."
        )


def _check_knn(train_features: Tensor, test_features: Tensor, k: Sequence[int]) -> None:
    shapes = f"train {tuple(train_features.shape)}, test {tuple(test_features.shape)}"
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(f"Features have shapes {shapes}, expected (images, width) with the same width.")
    if len(test_features) == 0:
        raise ValueError(f"There are no test features (shapes: {shapes}). Pass at least one test image.")
    if not k or min(k) < 1 or max(k) > len(train_features):
        raise ValueError(
            f"k={tuple(k)} is out of range: values must be in [1, {len(train_features)}], up to the number of "
            "training images."
        )
    for name, features in (("train", train_features), ("test", test_features)):
        if not torch.isfinite(features).all():
            raise ValueError(
                f"{name}_features contain NaN or infinity, so kNN would rank them at random. Check the model weights."
            )
