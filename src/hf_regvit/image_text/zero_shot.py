"""Zero-shot classification: compare images with sentences on the classes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from ..data.source import ImageSource
from ..evaluation.cache import read_features
from ..evaluation.intervals import bootstrap_interval
from ..models.results import Record
from ..models.tokens import TokenReader
from .captions import class_prompts


@torch.no_grad()
def class_embeddings(
    encoder: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Return one vector of length 1 per class, (C, D): the normalized mean of the embeddings of its sentences.

    Args:
        encoder: `VisionTextDualEncoderModel` in eval mode.
        tokenizer: Its tokenizer.
        class_names: Names of the C classes; underscores become spaces.
        templates: Sentences with {} for the name.

    Source: CLIP (arXiv 2103.00020, section 3.1.4), which averages in the space of the embeddings.
    """
    means = []
    for name in class_names:
        tokens = tokenizer(class_prompts(name, templates), padding=True, truncation=True, return_tensors="pt")
        pooled = encoder.text_model(**tokens.to(encoder.device))[1]
        means.append(F.normalize(encoder.text_projection(pooled), dim=-1).mean(dim=0))
    return F.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def zero_shot(
    encoder: VisionTextDualEncoderModel,
    processor: VisionTextDualEncoderProcessor,
    images: ImageSource,
    *,
    templates: Sequence[str] = ("a photo of a {}.",),
    seed: int = 0,
) -> Record:
    """Classify labeled images by the most similar class.

    Args:
        encoder: `VisionTextDualEncoderModel` with a RegViT. It is put into eval mode.
        processor: Its `VisionTextDualEncoderProcessor`.
        images: Labeled images with class names. Those that cannot be read are left out.
        templates: Sentences with {} for the class name.
        seed: Random seed of the interval.

    Returns:
        `top1`, its 95 % bootstrap `interval` over the images, `chance` (1 / number of classes), and `images`, their
        number.

    Raises:
        ValueError: The images have no class names, or none of them can be read.
    """
    if images.labels is None or images.label_names is None:
        raise ValueError(f"'{images.name}' has no class names. Zero-shot classification needs labeled images.")
    reader = TokenReader(encoder.eval().vision_model, processor.image_processor)
    features = read_features(reader, images, transform=reader.transform, label="zero-shot")
    vectors = encoder.visual_projection(features.last.to(encoder.device))  # (n, D); their lengths change no order
    classes = class_embeddings(encoder, processor.tokenizer, images.label_names, templates)  # (C, D)
    labels = dict(zip(images.ids, images.labels))
    found = (vectors @ classes.T).argmax(dim=-1).tolist()
    correct = np.array([labels[id] == label for id, label in zip(features.ids, found)], dtype=np.float64)
    interval, count = bootstrap_interval(correct, seed=seed), len(correct)
    return {"top1": correct.mean(), "interval": interval, "chance": 1 / len(images.label_names), "images": count}
