"""Small models fitted on frozen tokens, to measure what a backbone has learnt. So far: weighted k nearest neighbours.

Shape letters: n training images, m test images, D width, C classes, K = max(k) neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk_size: int = 1024,
) -> dict[int, Tensor]:
    """Class scores by a vote of the nearest training images, weighted by similarity.

    Features are L2-normalised here. The votes are softmax(cosine / temperature) over all max(k) neighbours; for each k
    the first k of them are summed per class, so only the scores of the largest k sum to one.

    Args:
        train_features: (n, D).
        train_labels: (n,) integers in [0, C).
        test_features: (m, D).
        k: Numbers of neighbours.
        temperature: Of the softmax, in units of cosine similarity.
        num_classes: C; default the largest label plus one.
        chunk_size: Test images handled at once. Memory is chunk_size * n similarities, whatever m is.

    Returns:
        For each k the class scores, (m, C) float32.

    Raises:
        ValueError: Shapes that do not fit, labels out of range, features that are not finite, or k beyond n.

    Source: arXiv 1805.01978; dinov2 `eval/knn.py` for the weights. Slow twin: tests/unit/test_probes.py.
    """
    _check_knn(train_features, train_labels, test_features, k)
    labels = train_labels.long()
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"train_labels span [{int(labels.min())}, {int(labels.max())}], expected [0, {num_classes}). "
            "Check num_classes."
        )
    bank = F.normalize(train_features.float(), dim=1)  # (n, D)
    chunks: dict[int, list[Tensor]] = {neighbours: [] for neighbours in k}
    for queries in test_features.split(chunk_size):
        similarity = F.normalize(queries.float(), dim=1) @ bank.T  # (chunk, n)
        nearest, index = similarity.topk(max(k), dim=1)  # (chunk, K), best first
        votes = (nearest / temperature).softmax(dim=1)
        voted = labels.to(index.device)[index]
        for neighbours in k:
            scores = votes.new_zeros(len(queries), num_classes)
            chunks[neighbours].append(scores.scatter_add_(1, voted[:, :neighbours], votes[:, :neighbours]))
    return {neighbours: torch.cat(scores) for neighbours, scores in chunks.items()}


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> dict[int, float]:
    """Share of test images whose best class is right, in [0, 1], for each k; arguments as in `knn_classify`.

    Raises:
        ValueError: As `knn_classify`, or `test_labels` do not match `test_features`.
    """
    if len(test_labels) != len(test_features):
        raise ValueError(f"{len(test_labels)} test labels for {len(test_features)} test features; expected one each.")
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores = knn_classify(
        train_features,
        train_labels,
        test_features,
        k=k,
        temperature=temperature,
        num_classes=num_classes,
        chunk_size=chunk_size,
    )
    truth = test_labels.to(test_features.device)
    return {neighbours: (score.argmax(1) == truth).float().mean().item() for neighbours, score in scores.items()}


def _check_knn(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: Sequence[int]) -> None:
    shapes = f"train {tuple(train_features.shape)}, test {tuple(test_features.shape)}"
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(f"Features must be (images, width) with one width; got {shapes}.")
    if len(test_features) == 0:
        raise ValueError(f"There are no test features; got {shapes}.")
    if train_labels.shape != train_features.shape[:1]:
        raise ValueError(f"train_labels {tuple(train_labels.shape)} must be one per training image; got {shapes}.")
    if not k or min(k) < 1 or max(k) > len(train_features):
        raise ValueError(f"k={tuple(k)} must lie in [1, {len(train_features)}], the number of training images.")
    for name, features in (("train", train_features), ("test", test_features)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}_features hold NaN or infinity; kNN would rank them at random.")
