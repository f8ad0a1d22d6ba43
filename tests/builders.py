"""Builders of test data, made from numbers, never from the network: images, folders, tar and parquet files, models."""

import io
import json
import math
import os
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import TrainerCallback

from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.models.processing import default_image_processor


def image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """RGB image of `size` (width, height) whose coarse random pattern survives JPEG compression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def encoded(content: Image.Image | np.ndarray | int = 0, kind: str = "PNG", **options: Any) -> bytes:
    """Bytes of an image, of an array of pixels or of `image(content)`, in a format of Pillow."""
    if not isinstance(content, Image.Image):
        content = image(content) if isinstance(content, int) else Image.fromarray(content)
    stream = io.BytesIO()
    content.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@dataclass
class MakesFolder:
    """Object whose pickle would make a folder when it is loaded."""

    folder: Path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def write(path: Path, content: bytes | str | Image.Image | int = 0) -> Path:
    """Write bytes, text, an image or `image(content)` to a file, in folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return path


def class_folder(root: Path, suffix: str = ".png", **classes: int) -> Path:
    """Folder with one sub-folder per class that holds the given number of images."""
    for place, (name, count) in enumerate(classes.items()):
        for number in range(count):
            write(root / name / f"{number}{suffix}", 1000 * place + number)
    return root


def tinted(channel: int, seed: int) -> Image.Image:
    """Noise of 32 x 32 pixels in which one channel is brighter."""
    values = np.random.default_rng(seed).integers(0, 140, (32, 32, 3)).astype(np.uint8)
    values[..., channel] += 60
    return Image.fromarray(values)


def tinted_folder(root: Path, names: Sequence[str] = ("red", "green", "blue"), **parts: int) -> Path:
    """Class folders of tinted noise in the given parts, such as `train=8, validation=4` images of each class."""
    for part, count in parts.items():
        for channel, name in enumerate(names):
            for i in range(count):
                write(root / part / name / f"{i}.png", tinted(channel, 100 * channel + 10 * (part == "train") + i))
    return root


def save_images(folder: Path, images: Sequence[Image.Image]) -> Path:
    """Folder with these images as `00.png`, `01.png` and so on."""
    for number, content in enumerate(images):
        write(folder / f"{number:02d}.png", content)
    return folder


def plain_images(root: Path, names: Sequence[str], size: tuple[int, int] = (20, 16)) -> Path:
    """Folder with an image of one color for each name, in the format of its suffix."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i * 20 % 256, 40, 90)).save(root / name)
    return root


def tar_file(path: Path, members: dict[str, bytes]) -> Path:
    """Tar file with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def parquet_file(path: Path, **columns: Any) -> Path:
    """Parquet file with these columns, types as pyarrow infers them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def image_table(path: Path, *, types: dict[str, Any] | None = None, **columns: Any) -> Path:
    """Parquet file as `datasets` writes it: columns hold images (bytes or None), unless `types` has their feature."""
    from datasets import Dataset, Features, Image

    features = Features({name: (types or {}).get(name) or Image() for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def mask_folder(
    root: Path, masks: Sequence[Any], *, kind: str = "masks", split: str = "", suffix: str = ".png"
) -> Path:
    """Folder with `images/` of random values, and their maps (arrays or bytes) in a folder called `kind`."""
    for i, target in enumerate(masks):
        write(root / split / "images" / f"{i:02d}.png", noise(i, (24, 20)))
        write(root / split / kind / f"{i:02d}{suffix}", target if isinstance(target, bytes) else encoded(target))
    return root


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Content of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Models ---

# 4 x 4 patches. The other sizes are the smallest with several heads, blocks and features a head.
TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_config(**fields: Any) -> RegViTConfig:
    """Configuration of a RegViT with the sizes of `TINY`, unless a field is given."""
    return RegViTConfig(**{**TINY, "num_depth_bins": 8, **fields})


def tiny_model(model_class: type = RegViTModel, *, seed: int = 0, **fields: Any) -> Any:
    """RegViT of a class with `tiny_config(**fields)`, from a seed, in eval mode."""
    torch.manual_seed(seed)
    return model_class(tiny_config(**fields)).eval()


def tiny_source(class_name: str, *, seed: int = 0, **fields: Any) -> Any:
    """Model of another family by the name of its class in transformers, such as `ViTModel`, in eval mode."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    return model_class(model_class.config_class(**{**TINY, **fields})).eval()


def dinov2_state(registers: int = 2, depth: int = 2, width: int = 32, patches: int = 16) -> dict[str, torch.Tensor]:
    """Random state dict with the names of the official DINOv2, with patches of 8 x 8 pixels."""
    torch.manual_seed(1)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width), "mask_token": (1, width)}
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, 8, 8), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{n}.{p}": (width,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
        shapes |= {f"blocks.{i}.attn.qkv.weight": (3 * width, width), f"blocks.{i}.attn.qkv.bias": (3 * width,)}
        shapes |= {f"blocks.{i}.attn.proj.weight": (width, width), f"blocks.{i}.attn.proj.bias": (width,)}
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (64, width), f"blocks.{i}.mlp.fc1.bias": (64,)}
        shapes |= {f"blocks.{i}.mlp.fc2.weight": (width, 64), f"blocks.{i}.mlp.fc2.bias": (width,)}
        shapes |= {f"blocks.{i}.ls{n}.gamma": (width,) for n in (1, 2)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def wrapped(model: Any, how: str) -> Any:
    """Compile a model or parts of it, or put it into another one, in one of the ways that users do."""
    match how:
        case "compiled":
            return torch.compile(model, backend="eager")
        case "compiled_in_place":
            model.compile(backend="eager")
        case "compiled_blocks":
            for block in model.layers:
                block.compile(backend="eager")
        case "with_compiled_blocks":
            model.layers[0] = torch.compile(model.layers[0], backend="eager")
        case "compiled_forward":
            model.forward = torch.compile(model.forward, backend="eager")
        case "compiled_parts":
            model.layers[1].attention = torch.compile(model.layers[1].attention, backend="eager")
            model.layers[0] = torch.compile(model.layers[0], backend="eager")
        case "inside_a_compiled_head":
            return torch.compile(torch.nn.Sequential(model), backend="eager")
        case "DataParallel":
            return torch.nn.DataParallel(model)
        case "AveragedModel":
            return torch.optim.swa_utils.AveragedModel(model)
        case _:
            raise ValueError(how)
    return model


def two_towers(name: str, vision: dict[str, Any]) -> Any:
    """Model of transformers with a tiny text tower beside the vision tower, by its family, such as CLIP."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    # SigLIP's two towers must end in vectors of one width
    text |= {"vocab_size": 99, "projection_size": vision["hidden_size"]}
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(text_config=text, vision_config=vision, projection_dim=16)
    return getattr(transformers, f"{name}Model")(config)


def tiny_timm(kind: str = "VisionTransformer", *, seed: int = 0, noise: float = 0.0, **changes: Any) -> Any:
    """Model of timm, `VisionTransformer` or `Eva`, of width 24 with 5 classes and moved parameters, in eval mode."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(seed)
    model_class = {"VisionTransformer": VisionTransformer, "Eva": Eva}[kind]
    model = model_class(**{**sizes, "dynamic_img_size": True, **changes}).eval()
    for parameter in model.parameters() if noise else ():
        parameter.data += noise * torch.randn(parameter.shape)
    return model


def save_model(model: Any, folder: Path, processor: Any = None) -> Path:
    """Folder with the model and an image processor, by default the default one for its image size."""
    model.save_pretrained(folder)
    size = model.config.image_size
    (processor or default_image_processor(size)).save_pretrained(folder)
    return folder


def pixels(count: int = 2, height: int = 16, width: int = 16, *, seed: int = 1) -> torch.Tensor:
    """Random pixel values (count, 3, height, width)."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random normal values of this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padded(
    *sizes: tuple[int, int], seed: int = 1, dtype: torch.dtype = torch.long
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values of images of these sizes in the top left corner, with noise in the padding, and their mask."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    pixel_mask = torch.zeros(len(sizes), height, width, dtype=dtype)
    for row, (rows, columns) in zip(pixel_mask, sizes, strict=True):
        row[:rows, :columns] = 1
    return pixels(len(sizes), height, width, seed=seed), pixel_mask


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy of all parameters and buffers of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients_of(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a loss for all parameters of a model."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def noise(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """RGB image of `size` (width, height) of independent random values."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@torch.no_grad()
def randomized(model: Any, *, seed: int = 0, buffers: bool = False) -> Any:
    """Move every parameter away from its initial value, so that ignoring any of them changes the outputs.

    Weights shrink with the number of inputs: activations stay near 1, and float32 resolves them to 1e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and parameter.ndim > 1
        scale = 0.5 / math.sqrt(parameter[0].numel()) if is_matrix else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if name.endswith("lambda1") or ("norm" in name and name.endswith("weight")):
            parameter.add_(1.0)
    for buffer in model.buffers() if buffers else ():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def with_outliers(model: Any, *, block: int = 2, cells: Sequence[int] = (0, 9), factor: float = 40.0) -> Any:
    """Multiply the tokens of these patches of a RegViT at the output of a block, counted from 1, and return it."""
    places = [1 + model.config.num_register_tokens + cell for cell in cells]

    def hook(module: Any, args: Any, output: Any) -> Any:
        tokens = (output[0] if isinstance(output, tuple) else output).clone()
        tokens[:, places] *= factor
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    model.layers[block - 1].register_forward_hook(hook)
    return model


def planted_model() -> RegViTModel:
    """Plant a neuron that is active only in the first and last cell of the grid, and writes a huge vector there.

    The neuron recognizes these cells by a direction of their position embeddings, whose norm is ordinary.
    """
    sizes = {"image_size": 64, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
    model = tiny_model(num_register_tokens=0, layerscale_value=None, **sizes)
    direction = torch.randn(48, generator=torch.Generator().manual_seed(3))
    direction = (direction - direction.mean()) / (direction - direction.mean()).norm()
    block, neuron = 1, 9
    with torch.no_grad():
        model.embeddings.position_embeddings[0, [1, 64]] += 7 * direction
        mlp = model.layers[block].mlp
        mlp.fc1.weight[neuron] = 3 * direction
        mlp.fc1.bias[neuron] = -12
        mlp.fc2.weight[:, neuron] = 30 * torch.randn(48, generator=torch.Generator().manual_seed(4)) / 48**0.5
    return model


def in_fresh_memory(model: Any) -> Any:
    """Copy the weights to memory that torch allocates, and switch to eval mode.

    A loaded tensor may be at any offset of the mapped file, and the kernels for unaligned memory round differently.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


# --- Callbacks of Trainer, and calls that a test watches ---


@dataclass
class StopAt(TrainerCallback):
    """End a run after a step, as a crash after a checkpoint would."""

    step: int

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@dataclass
class SignalAt(TrainerCallback):
    """Signal one process in the middle of the step after `step`, as a scheduler does."""

    step: int
    number: int = signal.SIGTERM
    process: int = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.process and state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@dataclass
class PoisonAt(TrainerCallback):
    """Set the first value of a parameter to NaN at the beginning of the step after `step`."""

    step: int
    parameter: str

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.get_parameter(self.parameter).data.view(-1)[0] = math.nan


@dataclass
class WreckFrom(TrainerCallback):
    """Ruin the model with a learning rate of 3 from the step after `step`, so that the best checkpoint is older."""

    step: int

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups if state.global_step >= self.step else ():
            group["lr"] = 3.0


@dataclass
class WorkerFault:
    """Kill or block a worker of a DataLoader when it reads an image, `times` times in all, counted in a folder.

    It happens at the image `at` or, for keys (epoch, image), in the epoch `at`; with `worker`, in this worker alone.
    """

    folder: Path
    how: str
    times: int
    at: int
    worker: int | None = None

    def __call__(self, key: Any) -> None:
        info = torch.utils.data.get_worker_info()
        place = key[0] if isinstance(key, tuple) else key
        if info is None or self.worker not in (None, info.id) or place != self.at:
            return
        self.folder.mkdir(exist_ok=True)
        marks = len(list(self.folder.iterdir()))
        if marks < self.times:
            (self.folder / str(marks)).touch()
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)


@dataclass
class Recorder(TrainerCallback):
    """Keep the weights at the end of each step and the gradients before each step of the optimizer."""

    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(state_of(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def spy(monkeypatch: Any, owner: Any, name: str) -> mock.Mock:
    """Record the calls of a function or method, which works as before; the object of a method counts too."""
    watched = mock.create_autospec(getattr(owner, name), side_effect=getattr(owner, name))
    monkeypatch.setattr(owner, name, watched)
    return watched
