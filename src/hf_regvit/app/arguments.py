"""Arguments of the commands that do not train.

The first spelling of an option is the name of its field; further ones are aliases.
"""

from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.image_tasks import option

if TYPE_CHECKING:
    from ..data.source import ImageSource
    from ..data.tables import ImageStream
    from ..evaluation.extraction import ExtractionSettings

_IMAGES = "Images: a folder, a parquet or tar file, a folder of them, a Hub data set, photos or digits."
_DEVICE = "Device to compute on, such as cuda, cuda:1, mps, xpu or cpu; auto selects the first of these that exists."


def _model(help_text: str) -> Any:
    return option(MISSING, f"{help_text}: a folder, a run folder, a weights file, a Hub id or timm/NAME.",
                   "--model_name_or_path")  # fmt: skip


def _models(help_text: str) -> Any:
    return option(
        MISSING,
        f"One or more models: folders, run folders, weights files, Hub ids or timm/NAME. {help_text}",
        "--model_name_or_path",
        action="extend",
    )


@dataclass(kw_only=True)
class ConvertArguments:
    """Options of `regvit convert`. The overrides set fields of `RegViTConfig` that a raw state dict lacks."""

    model: str = _model("Model to convert")
    output_dir: str = option(MISSING, "Output folder for the RegViT; must not contain a checkpoint yet.")
    verify: bool = option(True, "Compare the outputs with those of the source model, if it can be run.")
    processor: str | None = option(None, "Folder or Hub id of the image processor. Default: that of the source.")
    architecture: str | None = option(None, "Name of the model in timm, for raw state dicts of timm.")
    hidden_act: str | None = option(None, "Activation of the MLP (gelu or quick_gelu), for raw state dicts of CLIP.")
    num_attention_heads: int | None = option(None, "Number of attention heads, for raw state dicts.")
    layer_norm_eps: float | None = option(None, "LayerNorm epsilon, for raw state dicts.")
    interpolate_antialias: bool | None = option(None, "Antialias resampled position embeddings, for raw state dicts.")
    interpolate_offset: float | None = option(
        None, "Offset added to the grid size when resampling position embeddings, for raw state dicts."
    )
    image_size: list[int] | None = option(
        None, "Image size of the stored position embeddings in pixels: one side, or height and width."
    )
    pooling: str | None = option(None, "Tokens that a classifier reads: cls, cls_mean_patch or mean_patch.")
    pooler_act: str | None = option(None, "Activation of the pooler (tanh in ViT), for raw state dicts that have one.")

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as arguments of `convert_to_folder`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        del given["model"], given["output_dir"]
        if len(given.get("image_size", [])) == 1:
            given["image_size"] = given["image_size"][0]
        return given


@dataclass(kw_only=True)
class _ImageArguments:
    """Options of the commands that read the tokens of images."""

    data: str = option(MISSING, _IMAGES, "--images")
    split: str | None = option(None, "Split to read: train or validation. Default: all images.")
    batch_size: int = option(32, "Number of images per forward pass and process.")
    device: str = option("auto", _DEVICE)


@dataclass(kw_only=True)
class ExtractArguments(_ImageArguments):
    """Options of `regvit extract`, with the defaults of `ExtractionSettings`."""

    model: str = _model("Model")
    output_dir: str = option(MISSING, "Output folder for shards and index.json; an interrupted run is continued.")
    streaming: bool = option(
        False, "Read parquet files or a Hub data set as a stream, without a local copy; the default split is train."
    )
    layer: int = option(-1, "Block whose output is saved: 1 to the depth, 0 for the embedding, -1 for the last block.")
    final_norm: bool = option(True, "Apply the model's final norm; otherwise save the raw residual stream.")
    patches: bool | None = option(None, "Save patch tokens too. Default: in safetensors, but not in parquet.")
    format: str = option("safetensors", "Files: safetensors, or parquet with CLS and the mean patch for tables.")
    dtype: str = option("float32", "Data type of the saved tokens: float32, float16 or (safetensors only) bfloat16.")
    shard_size: int = option(256, "Number of images per file, also held in memory, per process.")
    image_size: int | None = option(None, "Side of the square input in pixels. Default: set by the model's processor.")
    max_images: int | None = option(None, "Read at most this many images, from the first one on. Default: all.")
    dense_settings: str | None = option(
        None, "File of `regvit dense` that sets --layer, --image_size, the views and the pooling."
    )

    def images(self) -> "ImageSource | ImageStream":
        """Return the images for `extract_to_folder`, as a source or a stream."""
        from ..data.loading import load_images, stream_images

        if self.streaming:
            return stream_images(self.data, split=self.split or "train")  # type: ignore[arg-type]  # checked there
        return load_images(self.data, split=self.split)  # type: ignore[arg-type]  # checked there

    def settings(self) -> "ExtractionSettings":
        """Return the `ExtractionSettings` among the arguments."""
        from ..evaluation.dense_features import FeatureSettings
        from ..evaluation.extraction import ExtractionSettings

        names = [one.name for one in fields(ExtractionSettings) if one.name != "dense"]
        dense = None if self.dense_settings is None else FeatureSettings.load(self.dense_settings)
        return ExtractionSettings(**{name: getattr(self, name) for name in names}, dense=dense)


@dataclass(kw_only=True)
class DenseArguments:
    """Options of `regvit dense`."""

    model: str = _model("Model")
    data: str = option(MISSING, "Images with masks or depth maps, as for the tasks of `regvit evaluate`.")
    train_data: str | None = option(None, "Training images, if they are stored separately.")
    task: str = option("segmentation", "Task of the probe: segmentation (with masks) or depth (with depth maps).")
    layers: list[int] | None = option(None, "Blocks to compare, from 1 to the depth. Default: all.")
    views: list[int] = option(lambda: [1, 4], "Numbers of flipped and shifted views to compare, among 1 and 4.")
    image_sizes: list[int] | None = option(
        None, "Shorter image sides to compare in pixels. Default: the model's image size."
    )
    pool_to_grid: bool = option(False, "Average the patches of larger images down to the grid of the model's size.")
    ignore_values: list[int] | None = option(None, "Mask values to ignore. Default: 255.")
    max_images: int | None = option(None, "Maximum number of images per split. Default: all.")
    output_dir: str = option("dense", "Output folder for dense_settings.json and dense_features.json.")
    batch_size: int = option(8, "Number of images per forward pass.")
    device: str = option("auto", _DEVICE)
    seed: int = option(0, "Random seed for the halves of the test images and the interval.")

    def __post_init__(self) -> None:
        if self.task not in ("segmentation", "depth"):
            raise ValueError(f"Unknown task '{self.task}'. Choose from segmentation, depth.")
        if self.task == "depth" and self.ignore_values is not None:
            raise ValueError("ignore_values are values of masks, but task='depth' reads depth maps. Leave it out.")

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `choose_features`."""
        names = ("views", "image_sizes", "pool_to_grid", "batch_size", "seed")
        return {"layers": self.layers or "all"} | {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class EvaluateArguments:
    """Options of `regvit evaluate`. If `lost_` options have several values, the best combination is selected."""

    model: list[str] = _models("The first one is the reference.")
    data: str = option(
        MISSING,
        f"Test {_IMAGES[0].lower()}{_IMAGES[1:]} Probes are fitted on its train split unless --train_data is given.",
        "--validation_dir",
    )
    train_data: str | None = option(None, "Training images, for fitting and selecting probes.", "--train_dir")
    tasks: list[str] = option(["knn", "linear"], "Tasks to run.")
    output_dir: str = option("evaluation", "Output folder for report.json, report.md and report.html.")
    cache_dir: str | None = option(None, "Cache folder for features. Default: features/ in --output_dir.")
    device: str = option("auto", _DEVICE)
    seed: int = option(0, "Random seed for splits, sampling and confidence intervals.")

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `compare_backbones`."""
        from ..evaluation.tasks import Sampling, select_tasks, settings_from, task_options

        options = {name: getattr(self, name) for name in task_options()}
        for kind in (Sampling, *(task.Settings for task in select_tasks(self.tasks))):
            settings_from(kind, options)  # raises for values out of range, before a model is loaded
        own = {task: getattr(self, f"{task}_data") for task in _own_data()}
        return {
            "tasks": self.tasks,
            "train": self.train_data,
            "task_data": {task: data for task, data in own.items() if data is not None},
            "cache_dir": self.cache_dir or str(Path(self.output_dir, "features")),
            "device": self.device,
            "seed": self.seed,
            **options,
        }


def evaluate_arguments() -> type[EvaluateArguments]:
    """Return `EvaluateArguments` with the options of all tasks in the table."""
    from ..evaluation.tasks import TASKS, task_options

    by_need: dict[str, list[str]] = {}
    for title, one_task in TASKS.items():
        by_need.setdefault(one_task.needs, []).append(title)
    listed = "; ".join(f"{', '.join(names)} (with {need})" for need, names in by_need.items())
    made: list[Any] = [("tasks", list[str], option(["knn", "linear"], f"Tasks to run: {listed}."))]
    for task, need in _own_data().items():
        own = option(None, f"Images with {need} for the task {task}. Default: --data.")
        made.append((f"{task}_data", str | None, own))
    for name, (kind, one) in task_options().items():
        made.append(
            (name, kind, field(default=one.default, default_factory=one.default_factory, metadata=one.metadata))
        )
    return make_dataclass("EvaluateArguments", made, bases=(EvaluateArguments,), kw_only=True)


def _own_data() -> dict[str, str]:
    """Return the tasks that usually need other images than the rest, and what those images must have."""
    from ..evaluation.tasks import TASKS

    return {name: task.needs for name, task in TASKS.items() if task.needs != "labels"}


@dataclass(kw_only=True)
class _ArtifactArguments(_ImageArguments):
    """Options of the commands that find artifacts."""

    cutoff: str = option("auto", "Norm above which a patch token is an outlier; auto estimates it from the data.")
    max_images: int = option(1000, "Maximum number of images, drawn at random with --seed.")
    seed: int = option(0, "Random seed.")

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the public function.

        Raises:
            ValueError: `cutoff` is neither "auto" nor a number.
        """
        apart = ("model", "data", "split", "output_dir")
        given = {name: value for name, value in vars(self).items() if name not in apart}
        try:
            return given | {"cutoff": self.cutoff if self.cutoff == "auto" else float(self.cutoff)}
        except ValueError as error:
            raise ValueError(f"--cutoff {self.cutoff} is not a number. Use 'auto' or a norm such as 150.") from error


@dataclass(kw_only=True)
class DiagnoseArguments(_ArtifactArguments):
    """Options of `regvit diagnose`."""

    model: list[str] = _models("Several models are compared in a table.")
    data: str = option(MISSING, f"{_IMAGES} Use at least 500.", "--images")
    output_dir: str = option("diagnosis", "Output folder for report.json, report.html and figures.")
    layers: list[int] | None = option(None, "Blocks to read: 1 to the depth, 0 for the embedding. Default: all.")
    detail_images: int = option(128, "Number of images for directions, ranks and register controls; held in memory.")
    probes: bool = option(False, "Also fit linear probes on single tokens; the class probe needs labeled images.")

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `diagnose`."""
        return super().settings() | {"layers": self.layers or "all"}


@dataclass(kw_only=True)
class RetrofitArguments(_ArtifactArguments):
    """Options of `regvit retrofit`."""

    model: str = _model("RegViT, or any model that `regvit convert` accepts")
    output_dir: str = option(MISSING, "New output folder for the checkpoint, its report and figures.")
    num_register_tokens: int | None = option(None, "Number of registers to add. Default: the best of 1, 2, 4 and 8.")
    top_k: int | None = option(None, "Number of neurons to move. Default: the best of 1 to 50.")
    highest_block: int | None = option(
        None, "Last block to take neurons from, from 0. Default: the block in which outliers first appear."
    )
    max_passes: int = option(4, "Maximum number of groups of neurons, each searched in the model repaired so far.")
    image_sizes: list[int] = option([], "Other image sizes in pixels at which to test the result, e.g. 320 448.")
    max_images: int = option(500, "Maximum number of images, drawn at random with --seed.")


@dataclass
class DataCheckArguments:
    """Options of `regvit data-check`."""

    data: list[str] = option(
        MISSING, "Images: one or more folders, parquet or tar files, Hub data sets, photos or digits."
    )
    image_column: str | None = option(
        None, "Column with the images. Default: the only image column, or 'image'.", "--image_column_name"
    )
    label_column: str | None = option(
        None, "Column with the class ids. Default: 'label', if it holds class ids.", "--label_column_name"
    )
    batch_size: int = option(64, "Number of images per training step over all processes.")
    image_size: int = option(224, "Side of the global crops in pixels.")
    max_bad_share: float = option(0.01, "Maximum share of unreadable images that training would accept, 0 to 1.")
    near_limit_bits: int = option(
        6, "Maximum number of differing bits in the 64-bit image hashes of near duplicates, 0 to 16."
    )
    num_workers: int = option(
        0, "Number of processes that read images; 0 reads in the main process.", "--dataloader_num_workers"
    )


@dataclass
class DemoArguments:
    """Options of `regvit demo`."""

    model: list[str] = _models("Select one of them on the page.")
    compare: str | None = option(None, "Second model to show next to the first one.")
    host: str | None = option(
        None, "Address to listen on. Default: 127.0.0.1, which only this machine reaches; 0.0.0.0 is open to others."
    )
    port: int = option(7860, "Local port to listen on; 0 selects the first free port from 7860 on.")
    cache_mib: int = option(512, "Memory for cached images in MiB.")
    dense_settings: str | None = option(None, "File of `regvit dense` with block, image size and views to begin with.")
    device: str = option("auto", _DEVICE)


@dataclass
class PublishArguments:
    """Options of `regvit publish`."""

    model: str = option(MISSING, "RegViT checkpoint, folder of a run, or its `adapter/`.", "--model_name_or_path")
    repo_id: str | None = option(
        None, "Hub repository id, owner/name. The model card loads the model from it.", "--hub_model_id"
    )
    output_dir: str | None = option(
        None, "New folder for the bundle. Default: bundles/ followed by the repository name."
    )
    push: bool = option(False, "Upload the bundle. Without this option, nothing is uploaded.", "--push_to_hub")
    public: bool = option(
        False, "Create a public repository instead of a private one, or upload to an existing public one."
    )
    reports: list[str] = option(
        [], "Reports of `regvit diagnose` and `regvit evaluate` for the model card: files or folders."
    )
    license: str | None = option(
        None, "License of the weights, as a Hub license id such as apache-2.0, cc-by-nc-4.0 or other."
    )
    license_name: str | None = option(None, "Name of the license. Required with --license other.")
    license_link: str | None = option(None, "URL of the license text. Required with --license other.")
    data: str | None = option(None, "Description of the training images. Default: taken from the run.")
    data_license: str | None = option(None, "License or terms of the training images.")
    datasets: list[str] = option([], "Hub ids of the training data sets.")
    base_model: str | None = option(
        None, "Model that training or conversion started from. Default: taken from the run."
    )
    base_model_license: str | None = option(None, "License or terms of the base model.")
    origin: str | None = option(
        None,
        "Origin of the weights: pretrained, finetuned, converted or retrofitted. Default: taken from the run, or "
        "unknown.",
    )
    description: str | None = option(None, "Paragraph for the model card.")
    example_pictures: bool = option(
        False, "Include the example figures of the diagnosis, which show images of the data set."
    )
    max_shard_size: str = option("5GB", "Maximum size of a weights file; larger weights are split.")
    exported: str | None = option(
        None, "Folder that `regvit export` wrote from this model; its ONNX and OpenVINO files and page are included."
    )
    revision: str | None = option(None, "Branch of the repository. Default: main.")
    commit_message: str | None = option(None, "Message of the commit.")

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `publish`, with the fields of the model card that were given."""
        card = ("license", "license_name", "license_link", "data", "data_license", "datasets", "base_model",
                "base_model_license", "origin", "description")  # fmt: skip
        apart = ("model", "repo_id", "public", *card)
        return {name: value for name, value in vars(self).items() if name not in apart} | {
            "card": {name: value for name in card if (value := getattr(self, name))},
            "private": not self.public,
        }


@dataclass(kw_only=True)
class ExportArguments:
    """Options of `regvit export`, with the defaults of `export`."""

    model: str = _model("RegViT of any class, or a model that `regvit convert` accepts")
    output_dir: str = option(MISSING, "New or empty folder for the files.")
    format: list[str] = option(["onnx", "openvino"], "Formats: onnx, openvino, torch, web (a page).")
    size: str | None = option(
        None,
        "Image size of the files in pixels: 224, 336x448, stored for that of the position table, or any. Images of "
        "several sizes in one batch (pixel_mask) cannot be exported. Default: set by the model's processor.",
    )
    precision: list[str] = option(
        ["f32"], "Precisions: f32, f16 (of the weights), int8 (needs --data), int8-weights (weights only)."
    )
    input: str = option("float", "Input of the files: float for normalized pixels, or uint8.")
    task: str | None = option(
        None, "Part of a model with a head: features, or backbone for feature maps. Default: the whole model."
    )
    data: str | None = option(None, f"{_IMAGES} For the calibration of int8 and for the proof.", "--images")
    num_calibration: int = option(300, "Maximum number of images for the calibration of int8.")
    accept: list[str] = option([], "Precisions to write even if their proof misses its bounds.")
    opset: int = option(20, "Opset of ONNX files.")
    web_runtime: str | None = option(
        None, "Folder of the unpacked npm package onnxruntime-web for a page. Default: npm downloads it."
    )
    seed: int = option(0, "Random seed for the choice of the images.")

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `export`."""
        return {name: value for name, value in vars(self).items() if name not in ("model", "output_dir")}


@dataclass
class DoctorArguments:
    """Options of `regvit doctor`."""

    output_dir: str = option(".", "Folder for runs, whose free disk space is checked.")
    self_test: bool = option(True, "Train, save and load a tiny model.")
