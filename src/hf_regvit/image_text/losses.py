"""Contrastive losses of images and texts over all processes.

Shape letters: b pairs of this process, B pairs of all processes, D width of the embeddings.

Each process compares its own rows with the gathered rows of all processes. The mean over the processes is the loss of
the whole batch, and so is the mean of the gradients, which DDP takes. Several processes therefore equal one process
with the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.distributed import gather_rows


def softmax_loss(images: Tensor, texts: Tensor, *, scale: Tensor) -> Tensor:
    """Return the mean cross-entropy of finding the text of an image and the image of a text among all pairs.

    Args:
        images: (b, D) embeddings of the images, of length 1.
        texts: (b, D) embeddings of their texts, of length 1.
        scale: Factor of the cosines, the inverse of the temperature.

    Returns:
        Scalar, nats.

    Source: CLIP (arXiv 2103.00020, figure 3). Slow twin: tests/oracles.py.
    """
    all_texts, first = gather_rows(texts)
    all_images, _ = gather_rows(images)
    own = first + torch.arange(len(images), device=images.device)
    image_to_text = F.cross_entropy(scale * images @ all_texts.T, own)  # of (b, B) logits
    text_to_image = F.cross_entropy(scale * texts @ all_images.T, own)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(images: Tensor, texts: Tensor, *, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the binary cross-entropy of all B * B pairs of an image and a text, summed and divided by B.

    Args:
        images: (b, D) embeddings of the images, of length 1.
        texts: (b, D) embeddings of their texts, of length 1.
        scale: Factor of the cosines.
        bias: Summand of the logits; negative, because few pairs belong together.

    Returns:
        Scalar, nats.

    Source: SigLIP (arXiv 2303.15343, equation 1 and algorithm 1). Slow twin: tests/oracles.py.
    """
    all_texts, first = gather_rows(texts)
    logits = scale * images @ all_texts.T + bias  # (b, B)
    signs = -torch.ones_like(logits)
    own = torch.arange(len(images), device=images.device)
    signs[own, first + own] = 1
    return -F.logsigmoid(signs * logits).sum() / len(images)
