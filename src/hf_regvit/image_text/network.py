"""The trained network: a RegViT and a text encoder in `VisionTextDualEncoderModel`, with the bias of SigLIP beside it.

The dual encoder of transformers has no bias of the logits, which the sigmoid loss needs. `ImageTextNetwork` holds it
beside the encoder, so every checkpoint has it and a run resumes with it. The result is the encoder alone: a bias
changes no order of cosines, so neither ranking nor zero-shot classification needs it. Its final value is in
`result.json`, for the probability that a single pair belongs together: sigmoid(scale * cosine + bias).
"""

import math
from collections.abc import Iterable

import torch
import transformers
from torch import Tensor, nn
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor
from transformers.image_processing_utils import BaseImageProcessor

from ..models.configuration_regvit import RegViTConfig
from ..models.loading import fit_positions, open_backbone
from ..models.modeling_regvit import RegViTModel
from ..models.processing import default_image_processor, resized_processor, unknown_processor
from ..training.distributed import from_first
from .arguments import ImageTextArguments

# The ids are 0 to 3. CLIPTextModel takes an end token with the id 2 for that of an old checkpoint.
_PAD, _START, _UNKNOWN, _END = _SPECIAL = ["<|pad|>", "<|start|>", "<|unknown|>", "<|end|>"]

TextModel = tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]


class ImageTextNetwork(nn.Module):
    """Dual encoder with the parameters of the loss.

    Args:
        encoder: Encoder of images and texts; its `logit_scale` is the logarithm of the factor of the cosines.
        loss: "softmax" or "sigmoid", which sets the initial factor (1 / 0.07 or 10) and, for sigmoid, bias (-10).

    Source: CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343, section 3.2) for the initial values.
    """

    accepts_loss_kwargs = False  # otherwise Trainer would not divide the loss by the number of micro-batches

    def __init__(self, encoder: VisionTextDualEncoderModel, loss: str) -> None:
        super().__init__()
        self.encoder, is_sigmoid = encoder, loss == "sigmoid"
        nn.init.constant_(encoder.logit_scale, math.log(10 if is_sigmoid else 1 / 0.07))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if is_sigmoid else None

    def forward(self, pixel_values: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the embeddings (b, D) of images and texts, of length 1, and factor and bias of the logits."""
        if self.training:
            self.encoder.logit_scale.data.clamp_(0, math.log(100))  # as OpenCLIP does after every step
        outputs = self.encoder(pixel_values=pixel_values, **tokens)
        return outputs.image_embeds, outputs.text_embeds, self.encoder.logit_scale.exp(), self.logit_bias


def build_network(
    args: ImageTextArguments, texts: Iterable[str]
) -> tuple[ImageTextNetwork, VisionTextDualEncoderProcessor]:
    """Open or create both encoders, and return the network with the processor of images and texts.

    Args:
        args: Options of the run.
        texts: Texts to train a tokenizer on, if the text encoder is new.

    Raises:
        ValueError: A model cannot be used, or the image size is not a multiple of the patch size.
        OSError: A model cannot be read.
    """
    transformers.set_seed(args.seed)
    tower, image_processor = _vision_model(args)
    text_model, tokenizer = _new_text_model(args, texts) if args.text_model is None else _open_text_model(args)
    configs, joined = (tower.config, text_model.config), transformers.VisionTextDualEncoderConfig
    config = joined.from_vision_text_configs(*configs, projection_dim=args.projection_dim)
    encoder = VisionTextDualEncoderModel(config, vision_model=tower, text_model=text_model).train()
    return ImageTextNetwork(encoder, args.loss), VisionTextDualEncoderProcessor(image_processor, tokenizer)


def _vision_model(args: ImageTextArguments) -> tuple[RegViTModel, BaseImageProcessor]:
    """Return the vision model and its image processor."""
    if args.init_from is None:
        fields = args.subset("image_size", "patch_size", "num_register_tokens", "layerscale_value")
        return RegViTModel(RegViTConfig.from_preset(args.preset, **fields)), default_image_processor(args.image_size)
    tower = open_backbone(args.init_from, use_mask_token=False)
    if tower.image_processor is None:
        raise unknown_processor(tower)
    if not tower.config.use_cls_token:
        raise ValueError(f"'{args.init_from}' has no CLS token, which stands for the image. Use a model that has one.")
    if not tower.config.num_register_tokens:
        tower.resize_register_tokens(args.num_register_tokens, seed=args.seed)
    fit_positions(tower, args.image_size, option="image_size")
    return tower, resized_processor(tower.image_processor, args.image_size)


def _new_text_model(args: ImageTextArguments, texts: Iterable[str]) -> TextModel:
    """Return CLIP's text transformer with random weights, and a byte-level BPE tokenizer trained on the texts."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors

    model = ByteLevelBPETokenizer(add_prefix_space=True, lowercase=True, unicode_normalizer="nfc")
    if args.process_index == 0:
        model.train_from_iterator(texts, vocab_size=args.vocab_size, special_tokens=_SPECIAL, show_progress=False)
    model = Tokenizer.from_str(from_first(model.to_str()))
    form, ids = f"{_START} $A {_END}", [(_START, 1), (_END, 3)]
    model.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    names = {"pad_token": _PAD, "bos_token": _START, "unk_token": _UNKNOWN, "eos_token": _END}
    width, length = args.text_hidden_size, args.max_text_tokens
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=length, **names)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=args.text_layers,
        num_attention_heads=width // 64, max_position_embeddings=length, hidden_act="gelu",
        projection_dim=args.projection_dim, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    return transformers.CLIPTextModel(config), tokenizer


def _open_text_model(args: ImageTextArguments) -> TextModel:
    """Return a pretrained text encoder and its tokenizer.

    Raises:
        ValueError: It has no pooled output.
    """
    name = str(args.text_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer.model_max_length = min(tokenizer.model_max_length, args.max_text_tokens)
    model = transformers.AutoModel.from_pretrained(name, use_safetensors=True)
    is_text = model.main_input_name == "input_ids" and hasattr(model.config, "hidden_size")
    if not is_text or getattr(model(**tokenizer(["a"], return_tensors="pt")), "pooler_output", None) is None:
        raise ValueError(
            f"text_model '{name}' ({type(model).__name__}) is not a text encoder with a pooled output. Use "
            "one such as BERT, RoBERTa or CLIPTextModel."
        )
    return model, tokenizer
