"""Arguments of the commands that do not train."""

from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints


@dataclass
class ConvertArguments:
    """Options of `regvit convert`. The overrides set fields of `RegViTConfig` that a raw state dict lacks."""

    model_name_or_path: str = field(
        metadata={
            "aliases": ["--model"],
            "help": "Model to convert: a folder, a weights file (.safetensors, .pth), a Hub id or timm/NAME.",
        }
    )
    output_dir: str = field(metadata={"help": "Output folder for the RegViT; must not contain a checkpoint yet."})
    verify: bool = field(
        default=True, metadata={"help": "Compare the outputs with those of the source model, if it can be run."}
    )
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Number of attention heads, for raw state dicts."}
    )
    layer_norm_eps: float | None = field(default=None, metadata={"help": "LayerNorm epsilon, for raw state dicts."})
    interpolate_antialias: bool | None = field(
        default=None, metadata={"help": "Antialias resampled position embeddings, for raw state dicts."}
    )
    interpolate_offset: float | None = field(
        default=None,
        metadata={"help": "Offset added to the grid size when resampling position embeddings, for raw state dicts."},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "Image size of the stored position embeddings in pixels: one side, or height and width."},
    )
    pooling: str | None = field(
        default=None, metadata={"help": "Tokens that a classifier reads: cls, cls_mean_patch or mean_patch."}
    )
    pooler_act: str | None = field(
        default=None, metadata={"help": "Activation of the pooler (tanh in ViT), for raw state dicts that have one."}
    )

    def overrides(self) -> dict[str, Any]:
        """Return the config fields that were given."""
        names = [f.name for f in fields(self) if f.name not in ("model_name_or_path", "output_dir", "verify")]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given.get("image_size", [])) == 1:
            given["image_size"] = given["image_size"][0]
        return given


@dataclass
class ExtractArguments:
    """Options of `regvit extract`, with the defaults of `ExtractionSettings`."""

    model_name_or_path: str = field(
        metadata={"aliases": ["--model"], "help": "Model: a folder, a Hub id or timm/NAME."}
    )
    data: str = field(
        metadata={
            "aliases": ["--images"],
            "help": "Images: a folder, a parquet file or folder, a Hub data set, photos or digits.",
        }
    )
    output_dir: str = field(
        metadata={"help": "Output folder for shards and index.json; an interrupted run is continued."}
    )
    split: str | None = field(
        default=None,
        metadata={"help": "Split to read: train or validation. Default: all images; train with --streaming."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read parquet files or a Hub data set as a stream, without a local copy."}
    )
    layer: int = field(
        default=-1,
        metadata={"help": "Block whose output is saved: 1 to the depth, 0 for the embedding, -1 for the last block."},
    )
    final_norm: bool = field(
        default=True, metadata={"help": "Apply the model's final norm; otherwise save the raw residual stream."}
    )
    patches: bool = field(default=True, metadata={"help": "Save patch tokens in addition to CLS and registers."})
    dtype: str = field(
        default="float32", metadata={"help": "Data type of the saved tokens: float32, float16 or bfloat16."}
    )
    batch_size: int = field(default=32, metadata={"help": "Number of images per forward pass and process."})
    shard_size: int = field(
        default=256, metadata={"help": "Number of images per file, also held in memory, per process."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square input in pixels. Default: set by the model's processor."}
    )
    max_images: int | None = field(
        default=None, metadata={"help": "Read at most this many images, from the first one on. Default: all."}
    )

    def images(self) -> Any:
        """Return the images for `extract_to_folder`, as a source or a stream."""
        from ..data.loading import load_images, stream_images

        if self.streaming:
            return stream_images(self.data, split=self.split or "train")  # type: ignore[arg-type]  # checked there
        return load_images(self.data, split=self.split)  # type: ignore[arg-type]  # checked there

    def settings(self) -> Any:
        """Return the `ExtractionSettings` among the arguments."""
        from ..evaluation.extraction import ExtractionSettings

        return ExtractionSettings(**{f.name: getattr(self, f.name) for f in fields(ExtractionSettings)})


@dataclass
class EvaluateArguments:
    """Options of `regvit evaluate`. If `lost_` options have several values, the best combination is selected."""

    model_name_or_path: list[str] = field(
        metadata={
            "aliases": ["--model"],
            "action": "extend",
            "help": "One or more models: folders, Hub ids or timm/NAME. The first one is the reference.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--validation_dir"],
            "help": "Test images: a folder with class folders, a parquet file or folder, a Hub data set, photos or "
            "digits. Probes are fitted on its train split unless --train_data is given.",
        }
    )
    train_data: str | None = field(
        default=None,
        metadata={"aliases": ["--train_dir"], "help": "Training images, for fitting and selecting probes."},
    )
    tasks: list[str] = field(default_factory=lambda: ["knn", "linear"])  # the help lists the tasks of the table
    output_dir: str = field(default="evaluation", metadata={"help": "Output folder for report.json and report.md."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Cache folder for features. Default: features/ in --output_dir."}
    )
    device: str = field(
        default="auto", metadata={"help": "Device, such as cuda. auto is the first of cuda, mps, xpu and cpu."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed for splits, sampling and confidence intervals."})

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
    for name, task in TASKS.items():
        by_need.setdefault(task.needs, []).append(name)
    listed = "; ".join(f"{', '.join(names)} (with {need})" for need, names in by_need.items())
    hints = get_type_hints(EvaluateArguments)
    options: dict[str, tuple[Any, Any, Any]] = {
        one.name: (hints[one.name], one.default, one.metadata) for one in fields(EvaluateArguments)
    }
    options["tasks"] = (list[str], lambda: ["knn", "linear"], {"help": f"Tasks to run: {listed}."})
    for name, need in _own_data().items():
        help_text = f"Images with {need} for the task {name}. Default: --data."
        options[f"{name}_data"] = (str | None, None, {"help": help_text})
    for name, (kind, one) in task_options().items():
        options[name] = (kind, one.default if one.default is not MISSING else one.default_factory, one.metadata)
    made: list[Any] = []
    for name, (kind, default, metadata) in options.items():
        given: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
        made.append((name, kind, field(**given, metadata=dict(metadata))))
    own = {"settings": EvaluateArguments.settings, "__doc__": EvaluateArguments.__doc__}
    return make_dataclass("EvaluateArguments", made, namespace=own)


def _own_data() -> dict[str, str]:
    """Return the tasks that usually need other images than the rest, and what those images must have."""
    from ..evaluation.tasks import TASKS

    return {name: task.needs for name, task in TASKS.items() if task.needs != "labels"}


@dataclass
class DiagnoseArguments:
    """Options of `regvit diagnose`."""

    model_name_or_path: list[str] = field(
        metadata={
            "aliases": ["--model"],
            "action": "extend",
            "help": "One or more models: folders, Hub ids or timm/NAME. Several models are compared in a table.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--images"],
            "help": "Images: a folder, a parquet file or folder, a Hub data set, photos or digits. Use at least 500.",
        }
    )
    output_dir: str = field(
        default="diagnosis", metadata={"help": "Output folder for report.json, report.html and figures."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split to read: train or validation. Default: all images."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Blocks to read: 1 to the depth, 0 for the embedding. Default: all."}
    )
    cutoff: str = field(
        default="auto",
        metadata={"help": "Norm above which a patch token is an outlier; auto estimates it from the data."},
    )
    max_images: int = field(default=1000, metadata={"help": "Maximum number of images, drawn at random with --seed."})
    detail_images: int = field(
        default=128, metadata={"help": "Number of images for directions, ranks and register controls; held in memory."}
    )
    batch_size: int = field(default=32, metadata={"help": "Number of images per forward pass."})
    probes: bool = field(
        default=False,
        metadata={"help": "Also fit linear probes on single tokens; the class probe needs labeled images."},
    )
    seed: int = field(default=0, metadata={"help": "Random seed."})
    device: str | None = field(default=None, metadata={"help": "Device, such as cuda. Default: the CPU."})

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `diagnose`.

        Raises:
            ValueError: `cutoff` is neither "auto" nor a number.
        """
        cutoff = _cutoff(self.cutoff)
        names = ("max_images", "detail_images", "batch_size", "probes", "seed")
        return {name: getattr(self, name) for name in names} | {"layers": self.layers or "all", "cutoff": cutoff}


@dataclass
class RetrofitArguments:
    """Options of `regvit retrofit`."""

    model_name_or_path: str = field(
        metadata={
            "aliases": ["--model"],
            "help": "RegViT without registers, or any model that `regvit convert` accepts: a folder, a Hub id or a "
            "weights file.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--images"],
            "help": "Images, without labels: a folder, a parquet file or folder, a Hub data set, photos or digits.",
        }
    )
    output_dir: str = field(metadata={"help": "New output folder for the checkpoint, its report and figures."})
    split: str | None = field(
        default=None, metadata={"help": "Split to read: train or validation. Default: all images."}
    )
    num_register_tokens: int | None = field(
        default=None, metadata={"help": "Number of registers to add. Default: the best of 1, 2, 4 and 8."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Number of neurons to move. Default: the best of 1 to 50."}
    )
    highest_block: int | None = field(
        default=None,
        metadata={
            "help": "Last block to take neurons from, from 0. Default: the block in which outliers first appear."
        },
    )
    cutoff: str = field(
        default="auto",
        metadata={"help": "Norm above which a patch token is an outlier; auto estimates it from the data."},
    )
    max_images: int = field(default=500, metadata={"help": "Maximum number of images, drawn at random with --seed."})
    batch_size: int = field(default=32, metadata={"help": "Number of images per forward pass."})
    seed: int = field(default=0, metadata={"help": "Random seed."})
    device: str | None = field(default=None, metadata={"help": "Device, such as cuda. Default: the CPU."})

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `retrofit`."""
        names = ("num_register_tokens", "top_k", "highest_block", "max_images", "batch_size", "seed", "device")
        return {name: getattr(self, name) for name in names} | {"cutoff": _cutoff(self.cutoff)}


def _cutoff(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise ValueError(f"--cutoff {text} is not a number. Use 'auto' or a norm such as 150.") from error


@dataclass
class DataCheckArguments:
    """Options of `regvit data-check`."""

    data: list[str] = field(
        metadata={"help": "Images: one or more folders, parquet or tar files, Hub data sets, photos or digits."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images. Default: the only image column, or 'image'."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the class ids. Default: 'label', if it holds class ids."}
    )
    batch_size: int = field(default=64, metadata={"help": "Number of images per training step over all processes."})
    image_size: int = field(default=224, metadata={"help": "Side of the global crops in pixels."})
    max_bad_share: float = field(
        default=0.01, metadata={"help": "Maximum share of unreadable images that training would accept, 0 to 1."}
    )
    near_limit_bits: int = field(
        default=6,
        metadata={"help": "Maximum number of differing bits in the 64-bit image hashes of near duplicates, 0 to 16."},
    )
    num_workers: int = field(
        default=0, metadata={"help": "Number of processes that read images; 0 reads in the main process."}
    )


@dataclass
class DemoArguments:
    """Options of `regvit demo`."""

    model: list[str] = field(
        metadata={
            "aliases": ["--model_name_or_path"],
            "action": "extend",
            "help": "One or more models: folders, Hub ids or timm/NAME. Select one of them on the page.",
        }
    )
    compare: str | None = field(default=None, metadata={"help": "Second model to show next to the first one."})
    port: int = field(
        default=7860, metadata={"help": "Local port to listen on; 0 selects the first free port from 7860 on."}
    )
    cache_mib: int = field(default=512, metadata={"help": "Memory for cached images in MiB."})
    device: str = field(default="auto", metadata={"help": "Device, such as cuda. Default: the first that exists."})


@dataclass
class PublishArguments:
    """Options of `regvit publish`."""

    model_name_or_path: str = field(
        metadata={"aliases": ["--model"], "help": "Local RegViT checkpoint, or the folder of a training run."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "Hub repository id, owner/name. The model card loads the model from it."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "New folder for the bundle. Default: bundles/ followed by the repository name."},
    )
    push: bool = field(
        default=False, metadata={"help": "Upload the bundle. Without this option, nothing is uploaded."}
    )
    public: bool = field(
        default=False,
        metadata={"help": "Create a public repository instead of a private one, or upload to an existing public one."},
    )
    reports: list[str] = field(
        default_factory=list,
        metadata={"help": "Reports of `regvit diagnose` and `regvit evaluate` for the model card: files or folders."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "License of the weights, as a Hub license id such as apache-2.0, cc-by-nc-4.0 or other."},
    )
    license_name: str | None = field(
        default=None, metadata={"help": "Name of the license. Required with --license other."}
    )
    license_link: str | None = field(
        default=None, metadata={"help": "URL of the license text. Required with --license other."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Description of the training images. Default: taken from the run."}
    )
    data_license: str | None = field(default=None, metadata={"help": "License or terms of the training images."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the training data sets."})
    base_model: str | None = field(
        default=None, metadata={"help": "Model that training or conversion started from. Default: taken from the run."}
    )
    base_model_license: str | None = field(default=None, metadata={"help": "License or terms of the base model."})
    origin: str | None = field(
        default=None,
        metadata={
            "help": "Origin of the weights: pretrained, finetuned, converted or retrofitted. Default: taken from the "
            "run, or unknown."
        },
    )
    description: str | None = field(default=None, metadata={"help": "Paragraph for the model card."})
    example_pictures: bool = field(
        default=False,
        metadata={"help": "Include the example figures of the diagnosis, which show images of the data set."},
    )
    max_shard_size: str = field(
        default="5GB", metadata={"help": "Maximum size of a weights file; larger weights are split."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch of the repository. Default: main."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})

    def folder(self) -> str:
        """Return the folder of the bundle."""
        name = self.repo_id or Path(self.model_name_or_path).resolve().name
        return self.output_dir or f"bundles/{name.split('/')[-1]}"

    def card(self) -> dict[str, Any]:
        """Return the fields of the model card that were given."""
        names = ("license", "license_name", "license_link", "data", "data_license", "base_model", "base_model_license")
        given = {name: getattr(self, name) for name in (*names, "origin", "description")}
        given["datasets"] = tuple(self.datasets)
        return {name: value for name, value in given.items() if value}


@dataclass
class DoctorArguments:
    """Options of `regvit doctor`."""

    output_dir: str = field(default=".", metadata={"help": "Folder for runs, whose free disk space is checked."})
    self_test: bool = field(default=True, metadata={"help": "Train, save and load a tiny model."})
