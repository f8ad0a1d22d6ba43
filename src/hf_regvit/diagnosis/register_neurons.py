"""Find the neurons that write artifacts, and move their output into registers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.preparation import PreparedImages, prepare_images
from ..models.loading import open_model
from ..models.modeling_regvit import RegViTPreTrainedModel
from ..models.processing import ImageProcessor
from ..models.tokens import TokenReader, TokenReading
from .outliers import Cutoff, emergence_layer, find_cutoff, reported_layer
from .readings import blocks_of, check_grid, token_norms

Model = TypeVar("Model", bound=RegViTPreTrainedModel)


class RetrofitError(ValueError):
    """Model, images or settings for which test-time registers do not work; the message states the reason."""


# --- Search for the neurons that write the outliers ---


@dataclass(frozen=True, eq=False)
class RegisterNeurons:
    """Activation of each neuron at the outliers.

    Attributes:
        scores: (L, H) mean magnitude of the activation at outliers; 0 for neurons that are active at most tokens.
        layer: Layer whose norms define the outliers, 1 to L.
        cutoff: Norm above which a patch is an outlier.
        emergence: First layer with outliers.
        outlier_share: Share of all patches that are outliers, in [0, 1].
        num_images: Number of images read.
    """

    scores: Tensor
    layer: int
    cutoff: float
    emergence: int
    outlier_share: float
    num_images: int

    def best(self, top_k: int, *, highest_block: int | None = None) -> list[list[int]]:
        """Return the `[block, neuron]` pairs of highest score, best first, as in `RegViTConfig.register_neurons`.

        Args:
            top_k: Maximum number of pairs; fewer are returned if fewer have a nonzero score.
            highest_block: Last block to take neurons from, counted from 0. Default the block whose output has the
                first outliers, because later neurons only react to them.
        """
        last = self.emergence - 1 if highest_block is None else highest_block
        flat, width = self.scores[: last + 1].flatten(), self.scores.shape[1]
        order = flat.argsort(descending=True, stable=True)[:top_k].tolist()
        return [[i // width, i % width] for i in order if flat[i] > 0]


def find_register_neurons(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    cutoff: float | str = "auto",
    max_images: int = 500,
    processor: ImageProcessor | None = None,
    device: str | torch.device = "auto",
    batch_size: int = 32,
    seed: int = 0,
) -> RegisterNeurons:
    """Search a model for the neurons that write its artifacts, in two passes over the images.

    Args:
        model: Model, its name, or a reader; see `open_model`. It is not modified.
        images: Images as for `diagnose`; published searches used 100 to 500.
        cutoff: "auto" for the layer and cut-off of the diagnosis, or a norm to use at the layer that the diagnosis
            reports (the last one if no layer has two modes).
        max_images: Maximum number of images, drawn at random; the first ones of a stream.
        processor: Image processor, which must return images of one size; default the model's own.
        device: Device to compute on; see `open_model`.
        batch_size: Number of images per forward pass.
        seed: Random seed of the draw.

    Raises:
        RetrofitError: No distinct outlier population, or one that exists before the first block.
        UnknownProcessorError: No image processor is given, and the model has none.
        ValueError: Images on different grids, or no usable image.

    Source: arXiv 2506.08010, section 3.
    """
    reader = open_model(model, device=device, processor=processor)
    prepared = prepare_images(images, reader.transform, batch_size=batch_size, max_images=max_images, seed=seed)
    norms = read_all_norms(reader, prepared)
    return search_neurons(reader, prepared, norms, cutoff, np.ones(len(norms[0]), dtype=bool))


def search_neurons(
    reader: TokenReader,
    images: PreparedImages,
    norms: dict[int, np.ndarray],
    cutoff: float | str,
    part: np.ndarray,
) -> RegisterNeurons:
    """Search in a part of the images, a mask (n,); `norms` are those of all images, `{layer: (n, N)}`."""
    found, layer, emergence = _find_outliers({i: values[part] for i, values in norms.items()}, cutoff)
    scores = score_neurons(reader, images, (norms[layer] > found.cutoff) & part[:, None])
    return RegisterNeurons(scores, layer, found.cutoff, emergence, found.share, int(part.sum()))


def score_neurons(
    reader: TokenReader,
    images: PreparedImages,
    is_outlier: NDArray[np.bool_],
    *,
    quiet_share: float = 0.5,
    quiet_below: float = 0.5,
) -> Tensor:
    """Return the mean |activation| of each neuron at the outliers of an image, averaged over images with outliers.

    Args:
        reader: Reader of the model.
        images: The n prepared images.
        is_outlier: (n, N) mask; images without outliers are skipped.
        quiet_share: Share of all tokens at which the (signed) activation of a neuron must stay below `quiet_below`.
            Otherwise the neuron scores 0 in this image, because it is active everywhere.
        quiet_below: Activation below which a neuron counts as quiet. Both defaults are those of the published code.

    Returns:
        (L, H) float64.

    Raises:
        RetrofitError: No image has an outlier.

    Source: arXiv 2506.08010, section 3, and its code; slow twin in tests/diagnosis/test_retrofit.py.
    """
    total: Tensor | float = 0.0
    num_counted = position = 0
    for ids, pixel_values in images:
        mask = torch.from_numpy(is_outlier[position : position + len(ids)])
        position += len(ids)
        pixel_values, mask = pixel_values[mask.any(dim=1)], mask[mask.any(dim=1)]
        if not len(mask):
            continue

        def score(activations: Tensor, layer: int, mask: Tensor = mask) -> Tensor:
            where = mask.to(activations.device, torch.float32)
            patches = activations[:, -where.shape[1] :].float()
            mean = torch.einsum("bnh,bn->bh", patches.abs(), where) / where.sum(dim=1, keepdim=True)
            quiet = (activations < quiet_below).float().mean(dim=1) >= quiet_share  # (B, H)
            return (mean * quiet).double().sum(dim=0).cpu()  # (H,)

        total = total + torch.stack(reader.read(pixel_values, layers="all", site="mlp", reduce=score).values)
        num_counted += len(mask)
    if isinstance(total, float):
        raise RetrofitError("No image has an outlier, so no neuron can be scored. Use more images or a lower cut-off.")
    return total / num_counted


def read_all_norms(reader: TokenReader, images: PreparedImages, *, progress: bool = False) -> dict[int, np.ndarray]:
    """Return the norms of the patches at every layer, `{layer: (n, N)}`; layer 0 is the embedding."""
    readings: list[TokenReading] = []
    with tqdm(total=images.total, desc="norms", unit="img", disable=not progress) as bar:
        for ids, pixels in images:
            readings.append(reader.read(pixels, layers="all", reduce=token_norms))
            check_grid(ids[0], readings[-1].grid, readings[0].grid)
            bar.update(len(ids))
    return {i: torch.cat([reading.patches(i) for reading in readings]).numpy() for i in readings[0].layers}


def _find_outliers(norms: dict[int, NDArray[np.float32]], cutoff: float | str) -> tuple[Cutoff, int, int]:
    """Return the cut-off, its layer, and the first layer with outliers."""
    cutoffs = {layer: find_cutoff(values, cutoff=cutoff) for layer, values in norms.items()}
    layer = reported_layer(cutoffs)
    found, emergence = cutoffs[layer], emergence_layer(cutoffs, layer)
    if emergence is None:
        if cutoff == "auto":
            raise RetrofitError(
                f"No distinct outlier population ({found.reason} at block {layer}), so test-time registers have "
                "nothing to move. Run `regvit diagnose` to see the norms, or set your own cut-off with --cutoff."
            )
        if not found.share:
            raise RetrofitError(f"No patch has a norm above cutoff={cutoff} at block {layer}. Use a lower cut-off.")
        emergence = next(i for i in norms if all(cutoffs[j].share for j in range(i, layer + 1)))
    if emergence == 0:
        raise RetrofitError(
            "The outliers exist before the first block, in the patch or position embeddings, so no neuron writes them "
            "and test-time registers cannot move them."
        )
    return found, layer, emergence


# --- Models with test-time registers ---


def mlp_output(reader: TokenReader, block: int) -> nn.Linear:
    """Return the last linear layer of the MLP of a block."""
    owner = blocks_of(reader)[block]
    found = [dict(owner.named_modules()).get(path) for path in reader.family.mlp_output]
    layer = next((layer for layer in found if isinstance(layer, nn.Linear)), None)
    if layer is None:
        raise RetrofitError(
            f"Block {block} of this {reader.family_name} model, a {type(owner).__name__}, has no MLP with one "
            f"ordinary last layer ({' or '.join(reader.family.mlp_output)}), so its neurons cannot be moved."
        )
    return layer


def add_test_time_registers(model: Model, neurons: Sequence[Sequence[int]], *, num_register_tokens: int = 1) -> Model:
    """Return a copy of a RegViT with more registers, which are zero and into which the given neurons write.

    Args:
        model: RegViT, with or without a head; not modified. Registers that it has come first and are not written into.
        neurons: `[block, neuron]` pairs, counted from 0. If empty, registers are added and no output is moved.
        num_register_tokens: Number of registers R to add, at least 1.

    Returns:
        Model of the same class, in eval mode.

    Raises:
        RetrofitError: The model already has test-time registers.
        ConfigError: A neuron that the model does not have.
        TypeError: `model` is not a RegViT.
    """
    if not isinstance(model, RegViTPreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, but a RegViT is required. Convert it with convert().")
    check_no_neurons(model)
    return copy.deepcopy(with_shared_weights(model, neurons, num_register_tokens))


def silence_neurons(model: Model, neurons: Sequence[Sequence[int]]) -> Model:
    """Return a model in which these neurons have no output: the control that shows why they need a register.

    All other weights are shared with `model`, not copied.
    """
    made = with_shared_weights(model, [], 0)
    reader = TokenReader(made)
    with torch.no_grad():
        for block, neuron in neurons:
            linear = mlp_output(reader, block)
            linear.weight = nn.Parameter(linear.weight.clone())
            linear.weight[:, neuron] = 0
    return made


def check_no_neurons(model: RegViTPreTrainedModel) -> None:
    """Raise a RetrofitError if a model already has test-time registers."""
    if model.config.register_neurons:
        raise RetrofitError(
            f"The model already has test-time registers, which {len(model.config.register_neurons)} neurons write "
            "into. Apply the retrofit to the model that it was made from; it finds several groups of neurons."
        )


def with_shared_weights(model: Model, neurons: Sequence[Sequence[int]], num_register_tokens: int) -> Model:
    """Build the model of `add_test_time_registers` without copying weights, for short-lived models."""
    config = copy.deepcopy(model.config)
    config.num_register_tokens += num_register_tokens
    config.register_neurons = [list(pair) for pair in neurons] or None
    config.num_test_time_registers = num_register_tokens if neurons and model.config.num_register_tokens else None
    with torch.device("meta"):
        made = type(model)(config)
    state = model.state_dict()
    if num_register_tokens:
        projection = "patch_embeddings.projection.bias"
        name = next(name for name in state if name.endswith(f"embeddings.{projection}"))
        added = state[name].new_zeros(1, num_register_tokens, config.hidden_size)
        name = name.replace(projection, "register_tokens")
        state = state | {name: torch.cat([state[name], added], dim=1) if name in state else added}
    made.load_state_dict(state, assign=True)
    made.image_processor = getattr(model, "image_processor", None)
    return made.eval()
