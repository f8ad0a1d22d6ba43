"""The Trainer of images with texts: the optimizer groups and the step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, VisionTextDualEncoderProcessor

from ..data.augmentation import normalize_pixels
from ..models.processing import statistics_of
from ..training.finite import without_ids
from ..training.run_folder import names_digest
from ..training.samplers import EpochSampler
from ..training.trainer import RunTrainer
from .arguments import ImageTextArguments
from .captions import CaptionedImages, ImageTextDataset
from .losses import sigmoid_loss, softmax_loss
from .network import ImageTextNetwork

_TOKENS = ("position_embeddings", "cls_token", "register_tokens")


def collate_pairs(tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return `pixel_values` (b, 3, S, S) uint8, the tokens padded to the longest text, and ids."""
    tokens = tokenizer([item["text"] for item in items], padding=True, truncation=True, return_tensors="pt")
    ids = {name: torch.tensor([item[name] for item in items]) for name in ("sample_ids", "epochs")}
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), **tokens, **ids}


class ImageTextTrainer(RunTrainer):
    """`RunTrainer` with a contrastive loss of images and texts.

    Args:
        network: Network to train.
        args: Options of the run.
        images: Images with texts.
        processor: `VisionTextDualEncoderProcessor` of the network.
        callbacks: Additional trainer callbacks.
    """

    args: ImageTextArguments
    model: ImageTextNetwork
    fixed_options = ("loss",)

    def __init__(
        self,
        network: ImageTextNetwork,
        args: ImageTextArguments,
        images: CaptionedImages,
        *,
        processor: VisionTextDualEncoderProcessor,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.images, self._statistics = images, statistics_of(processor.image_processor)
        sampler = EpochSampler(len(images.source), seed=args.seed, images_per_step=args.images_per_step)
        data, collator = ImageTextDataset(images, args), partial(collate_pairs, processor.tokenizer)
        options: dict[str, Any] = {"names": images.source.ids, "callbacks": callbacks}
        super().__init__(network, args, train_dataset=data, train_collator=collator, sampler=sampler, **options)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters with and without weight decay; only matrices decay.

        Source: OpenCLIP, which excludes gains, biases and the scale.
        """
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            groups[parameter.ndim > 1 and not name.endswith(_TOKENS)].append(parameter)
        return [{"params": group, "weight_decay": self.args.weight_decay * has} for has, group in groups.items()]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of this process, whose mean over all processes is that of the whole batch."""
        batch = without_ids(inputs)
        pixels = normalize_pixels(batch.pop("pixel_values"), *self._statistics)
        images, texts, scale, bias = model(pixel_values=pixels, **batch)
        pairs = images.float(), texts.float()
        loss = softmax_loss(*pairs, scale=scale) if bias is None else sigmoid_loss(*pairs, scale=scale, bias=bias)
        self.guard.see_batch(inputs.get("sample_ids"), inputs.get("epochs"), {"loss": loss})
        return loss

    def step_values(self) -> Mapping[str, float]:
        """Return the factor of the cosines."""
        return {"logit_scale": self.model.encoder.logit_scale.exp().item()}

    def data_facts(self) -> dict[str, Any]:
        """Return the number of images and hashes of their names and texts."""
        names, texts = names_digest(self.images.source.ids), names_digest(self.images.corpus())
        return {"images": len(self.images.source), "names_sha256": names, "texts_sha256": texts}
