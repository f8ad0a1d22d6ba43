"""Arguments of training on images with texts."""

from dataclasses import dataclass

from ..evaluation.image_tasks import option
from ..training.arguments import RunArguments


@dataclass
class ImageTextArguments(RunArguments):
    """Arguments of a run, in addition to those of `RunArguments` and `transformers.TrainingArguments`."""

    # Data
    data: str = option("", "Images with texts, or with labels and --templates; see the how-to page.", "--dataset_name")
    text_column: str | None = option(None, "Column with a text or a list of texts. Default: text or caption.")
    templates: list[str] | None = option(None, "Sentences with {} for the class. Default: 'a photo of a {}.'")
    eval_data: str | None = option(None, "Labeled images for the evaluation. Default: --data, if it has no texts.")
    train_val_split: float = option(0.15, "Share of labeled images to hold out if there is no validation split.")
    crop_scale: list[float] = option([0.9, 1.0], "Range of the area share of a training crop. OpenCLIP: 0.9 1.0.")
    flip_probability: float = option(0.0, "Probability of a horizontal flip; 0 if texts may name left and right.")

    # Models
    init_from: str | None = option(None, "Vision model to start from: any ViT that `regvit convert` reads, or a run.")
    preset: str = option("tiny", "Size of a vision model from scratch: tiny, small, base, large, giant.")
    patch_size: int = option(16, "Side of a patch in pixels, only for a vision model from scratch.")
    layerscale_value: float | None = option(None, "Initial LayerScale gain, only from scratch. Default: none.")
    num_register_tokens: int = option(4, "Registers of a vision model from scratch, or to add where there are none.")
    image_size: int = option(224, "Side of the square images in pixels, a multiple of the patch size.")
    text_model: str | None = option(
        None, "Pretrained text encoder such as BERT: folder or Hub id. Default: a new one."
    )
    text_hidden_size: int = option(256, "Width of a new text encoder, a multiple of 64. OpenCLIP B/16: 512.")
    text_layers: int = option(4, "Number of blocks of a new text encoder. OpenCLIP B/16: 12.")
    vocab_size: int = option(8192, "Largest vocabulary of a tokenizer trained on the texts. CLIP: 49408.")
    max_text_tokens: int = option(77, "Number of tokens at which a text is cut. CLIP: 77.")
    projection_dim: int = option(256, "Width of the common space of images and texts. OpenCLIP B/16: 512.")

    # Loss and result
    loss: str = option("softmax", "Contrastive loss over all processes: softmax (CLIP) or sigmoid (SigLIP).")
    diagnosis_images: int = option(200, "Images for the diagnosis of artifacts before and after; 0 disables it.")
    max_probe_images: int = option(10_000, "Maximum number of labeled images of a split for the linear probe.")

    # Arguments of Trainer with other defaults
    learning_rate: float = option(5e-4, "Peak learning rate. OpenCLIP: 5e-4.")
    weight_decay: float = option(0.2, "Weight decay of matrices; biases, norms, tokens and the scale have none.")
    adam_beta2: float = option(0.98, "Second beta of Adam. CLIP with a ViT: 0.98.")
    adam_epsilon: float = option(1e-6, "Epsilon of Adam. CLIP with a ViT: 1e-6.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule, as in transformers.")
    warmup_steps: float = option(0.1, "Number of linear warm-up steps; a value below 1 is a share of the run.")
    per_device_train_batch_size: int = option(64, "Pairs per process and micro-batch, which are compared.")
    num_train_epochs: float = option(30.0, "Number of passes over the training images.")
    save_strategy: str = option("epoch", "Times of checkpoints: epoch, steps or no.")
    save_total_limit: int | None = option(2, "Maximum number of checkpoints to keep.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("data", bool(self.data), "images with texts, or labeled images and templates")
        self._expect("loss", self.loss in ("softmax", "sigmoid"), "softmax or sigmoid")
        self._expect_range("crop_scale", "two shares in (0, 1], the smaller one first", above=0, at_most=1)
        self._expect("train_val_split", 0 < self.train_val_split < 1, "a share between 0 and 1, such as 0.15")
        self._expect("text_hidden_size", self.text_hidden_size % 64 == 0, "a multiple of 64, the width of a head")
        self._expect("templates", all("{}" in one for one in self.templates or ()), "sentences that contain {}")
        self._expect("fsdp", not self.fsdp, "no sharding, which the losses do not support; processes use DDP")
        self._expect("push_to_hub", not self.push_to_hub, "false; `regvit publish` uploads the folder backbone/")
