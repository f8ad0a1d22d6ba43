"""The command line's arguments: dataclasses, and YAML recipes as their defaults."""

import difflib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


@dataclass
class ConvertArguments:
    """What `regvit convert` reads. The overrides are fields of `RegViTConfig` that a raw state dict cannot tell."""

    model_name_or_path: str = field(
        metadata={
            "aliases": ["--model"],
            "help": "Folder, weights file (.safetensors, .pth), Hub id or timm/NAME of the model to convert.",
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write the RegViT to; it must not hold one already."})
    verify: bool = field(
        default=True, metadata={"help": "Compare outputs with the source model where there is one to run."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads, for raw state dicts."})
    layer_norm_eps: float | None = field(default=None, metadata={"help": "LayerNorm epsilon, for raw state dicts."})
    interpolate_antialias: bool | None = field(
        default=None, metadata={"help": "Antialias when positions are resampled, for raw state dicts."}
    )
    interpolate_offset: float | None = field(
        default=None, metadata={"help": "Cells added to the grid when positions are resampled, for raw state dicts."}
    )
    image_size: list[int] | None = field(
        default=None, metadata={"help": "Pixels of the stored position table, one side or height and width."}
    )
    pooling: str | None = field(
        default=None, metadata={"help": "What a classifier reads: cls, cls_mean_patch or mean_patch."}
    )
    pooler_act: str | None = field(
        default=None, metadata={"help": "Activation of a pooler (ViT's is tanh), for raw state dicts that have one."}
    )

    def overrides(self) -> dict[str, Any]:
        """The config fields that were given."""
        names = [f.name for f in fields(self) if f.name not in ("model_name_or_path", "output_dir", "verify")]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given.get("image_size", [])) == 1:
            given["image_size"] = given["image_size"][0]
        return given


@dataclass
class ExtractArguments:
    """What `regvit extract` reads. Defaults are those of `ExtractionSettings`."""

    model_name_or_path: str = field(
        metadata={"aliases": ["--model"], "help": "Folder or Hub id of any supported model, or timm/NAME."}
    )
    data: str = field(
        metadata={
            "aliases": ["--images"],
            "help": "Folder of images, parquet file or folder, Hub data set, photos or digits.",
        }
    )
    output_dir: str = field(metadata={"help": "Folder for shards and index.json; of an earlier run: it goes on."})
    split: str | None = field(
        default=None, metadata={"help": "train or validation; default all images, of a stream train."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read parquet files or a Hub data set as they come, without a local copy."}
    )
    layer: int = field(
        default=-1, metadata={"help": "Block whose output is kept: 1 to the depth, 0 the embedding, -1 the last."}
    )
    final_norm: bool = field(
        default=True, metadata={"help": "Apply the model's final norm; without it the raw residual stream is kept."}
    )
    patches: bool = field(default=True, metadata={"help": "Keep patch tokens, not CLS and registers alone."})
    dtype: str = field(default="float32", metadata={"help": "float32, float16 or bfloat16."})
    batch_size: int = field(default=32, metadata={"help": "Images of one forward pass, per process."})
    shard_size: int = field(default=256, metadata={"help": "Images of one file, and in memory, per process."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square picture in pixels; default the model's own processor."}
    )
    max_images: int | None = field(default=None, metadata={"help": "Only the first so many images."})

    def images(self) -> Any:
        """What `extract_to_folder` takes: a source, or a stream."""
        from .images import load_images, stream_images

        if self.streaming:
            return stream_images(self.data, split=self.split or "train")  # type: ignore[arg-type]  # checked there
        return load_images(self.data, split=self.split)  # type: ignore[arg-type]  # checked there

    def settings(self) -> Any:
        """The `ExtractionSettings` among the arguments."""
        from .extraction import ExtractionSettings

        return ExtractionSettings(**{f.name: getattr(self, f.name) for f in fields(ExtractionSettings)})


@dataclass
class EvaluateArguments:
    """What `regvit evaluate` reads. Of several values of the `lost_` options the best combination is chosen."""

    model_name_or_path: list[str] = field(
        metadata={
            "aliases": ["--model"],
            "action": "extend",
            "help": "Folder, Hub id or timm/NAME of a model; several are put side by side, the first as reference.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--validation_dir"],
            "help": "Folder with class folders, parquet, Hub data set, photos or digits: images to judge on; without "
            "--train_data its train part is fitted on.",
        }
    )
    train_data: str | None = field(
        default=None, metadata={"aliases": ["--train_dir"], "help": "Images to fit and choose on."}
    )
    train_val_split: float | None = field(
        default=None, metadata={"help": "Share to judge on, class by class, where --data has no validation part."}
    )
    segmentation_data: str | None = field(default=None, metadata={"help": "Images with masks; default --data."})
    depth_data: str | None = field(default=None, metadata={"help": "Images with depths; default --data."})
    lost_data: str | None = field(default=None, metadata={"help": "Images with boxes; default --data."})
    tasks: list[str] = field(
        default_factory=lambda: ["knn", "linear"],
        metadata={
            "help": "Among knn linear logistic few_shot retrieval robustness (labels), segmentation (masks), depth, "
            "lost (boxes: object discovery)."
        },
    )
    output_dir: str = field(default="evaluation", metadata={"help": "Folder to write report.json and report.md to."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder to keep features in; default features inside --output_dir."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the centre crop in pixels; default the model's own."}
    )
    image_sizes: list[int] | None = field(default=None, metadata={"help": "Sizes that robustness judges at, pixels."})
    knn_k: list[int] | None = field(default=None, metadata={"help": "Neighbours; default 10 20 100 200."})
    linear_steps: int = field(default=2000, metadata={"help": "SGD steps of the linear probe."})
    select_on: str = field(
        default="held_out",
        metadata={"help": "held_out: choose on a tenth of the training images; judged: as the official probe does."},
    )
    shots: list[int] | None = field(default=None, metadata={"help": "Few-shot images a class; default 1 5 10."})
    num_tries: int = field(default=5, metadata={"help": "Draws of the few-shot images."})
    dense_steps: int = field(default=1000, metadata={"help": "Steps of the segmentation and depth heads."})
    dense_image_size: int | None = field(
        default=None, metadata={"help": "Shorter side for segmentation and depth, pixels; default the model's own."}
    )
    num_dense_blocks: int = field(
        default=1, metadata={"help": "Blocks that segmentation and depth read: 1, the last, or 4."}
    )
    ignore_values: list[int] | None = field(
        default=None, metadata={"help": "Stored values of masks that do not count; default 255."}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "0 in masks is background that does not count, as in ADE20k."}
    )
    depth_scale: float | None = field(
        default=None, metadata={"help": "Metres of a stored unit; default 0.001 for whole numbers, 1 for fractions."}
    )
    max_depth: float = field(default=10.0, metadata={"help": "Larger depths, in metres, are no measurements."})
    boxes: str | None = field(
        default=None, metadata={"help": "Column of ground-truth boxes; default objects, bbox or boxes."}
    )
    box_format: str = field(default="xywh", metadata={"help": "xywh: corner, width, height (COCO). xyxy: corners."})
    lost_features: list[str] | None = field(default=None, metadata={"help": "Among q k v out; default all."})
    lost_layers: list[int] | None = field(default=None, metadata={"help": "Blocks from the end; default -1 to -4."})
    lost_centers: list[str] | None = field(default=None, metadata={"help": "Among none image row; default all."})
    lost_l2norm: list[str] | None = field(default=None, metadata={"help": "Among false true; default both."})
    lost_biases: list[float] | None = field(
        default=None, metadata={"help": "Added to cosines; with --lost_l2norm false to dot products."}
    )
    lost_k: list[int] | None = field(default=None, metadata={"help": "Patches to expand among; default 100."})
    max_side: int = field(default=640, metadata={"help": "Larger images are read by lost at this longer side."})
    max_images: int | None = field(
        default=None, metadata={"help": "Use at most this many images of each part, drawn by --seed."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images of one forward pass."})
    device: str | None = field(default=None, metadata={"help": "Where to compute, e.g. cuda; default the CPU."})
    seed: int = field(default=0, metadata={"help": "Of the halves, of draws and of the intervals."})

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `evaluate_backbone`."""
        from .classification_probes import LinearGrid
        from .dense_probes import DepthSettings, SegmentationSettings
        from .evaluation import Protocol
        from .object_discovery import LostGrid

        same = (
            "image_size", "image_sizes", "select_on", "shots", "num_tries", "boxes", "box_format", "max_side",
            "max_images", "train_val_split", "batch_size", "dense_image_size", "num_dense_blocks", "ignore_values",
            "reduce_labels", "depth_scale",
        )  # fmt: skip
        task_data = {
            "segmentation": self.segmentation_data, "depth": self.depth_data, "lost": self.lost_data
        }  # fmt: skip
        return {
            "tasks": self.tasks,
            "train": self.train_data,
            "task_data": {task: data for task, data in task_data.items() if data is not None},
            "protocol": Protocol(
                knn_ks=self.knn_k,
                linear=LinearGrid(num_steps=self.linear_steps),
                lost_grid=LostGrid(**self.grid()),
                segmentation=SegmentationSettings(num_steps=self.dense_steps),
                depth=DepthSettings(num_steps=self.dense_steps, max_depth=self.max_depth),
                **{name: getattr(self, name) for name in same},
            ),
            "cache_dir": self.cache_dir or str(Path(self.output_dir, "features")),
            "seed": self.seed,
        }

    def grid(self) -> dict[str, Any]:
        """The options of `LostGrid` that were given."""
        norms = self.lost_l2norm
        if norms is not None and set(norms) - {"true", "false"}:
            raise ValueError(f"lost_l2norm={norms} must be among true and false.")
        given = {
            "features": self.lost_features,
            "layers": self.lost_layers,
            "centers": self.lost_centers,
            "l2norms": None if norms is None else [norm == "true" for norm in norms],
            "biases": self.lost_biases,
            "raw_biases": self.lost_biases if norms == ["false"] else None,
            "ks": self.lost_k,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class DiagnoseArguments:
    """What `regvit diagnose` reads."""

    model_name_or_path: list[str] = field(
        metadata={
            "aliases": ["--model"],
            "action": "extend",
            "help": "Folder, Hub id or timm/NAME of a model; several are diagnosed and tabulated side by side.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--images"],
            "help": "Folder of images, parquet file or folder, Hub data set, photos or digits. 500 images or more.",
        }
    )
    output_dir: str = field(default="diagnosis", metadata={"help": "Folder to write report.json and report.html to."})
    split: str | None = field(default=None, metadata={"help": "train or validation; default all images."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Blocks to read, 1 to the depth, 0 the embedding; default all."}
    )
    cutoff: str = field(
        default="auto", metadata={"help": "Norm above which a patch token is an outlier; auto finds it."}
    )
    max_images: int = field(default=1000, metadata={"help": "Use at most this many images, drawn by --seed."})
    detail_images: int = field(
        default=128, metadata={"help": "Images for directions, ranks and register controls; held in memory."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images of one forward pass."})
    probes: bool = field(
        default=False, metadata={"help": "Also fit linear probes on single tokens; the class needs labelled images."}
    )
    seed: int = field(default=0, metadata={"help": "Of all random draws."})
    device: str | None = field(default=None, metadata={"help": "Where to compute, e.g. cuda; default the CPU."})

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `diagnose`.

        Raises:
            ValueError: `cutoff` is neither auto nor a number.
        """
        cutoff = _cutoff(self.cutoff)
        names = ("max_images", "detail_images", "batch_size", "probes", "seed")
        return {name: getattr(self, name) for name in names} | {"layers": self.layers or "all", "cutoff": cutoff}


@dataclass
class RetrofitArguments:
    """What `regvit retrofit` reads."""

    model_name_or_path: str = field(
        metadata={
            "aliases": ["--model"],
            "help": "RegViT without registers, or anything that `regvit convert` takes: folder, Hub id, weights.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--images"],
            "help": "Folder of images, parquet file or folder, Hub data set, photos or digits; no labels needed.",
        }
    )
    output_dir: str = field(metadata={"help": "New folder for the checkpoint, its report and its pictures."})
    split: str | None = field(default=None, metadata={"help": "train or validation; default all images."})
    num_register_tokens: int | None = field(
        default=None, metadata={"help": "Registers to add; default chosen among 1, 2, 4 and 8."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Neurons to move; default chosen among 1 to 50."})
    highest_block: int | None = field(
        default=None,
        metadata={"help": "Last block to take neurons from, from 0; default the one that makes the first outliers."},
    )
    cutoff: str = field(
        default="auto", metadata={"help": "Norm above which a patch token is an outlier; auto finds it."}
    )
    max_images: int = field(default=500, metadata={"help": "Use at most this many images, drawn by --seed."})
    batch_size: int = field(default=32, metadata={"help": "Images of one forward pass."})
    seed: int = field(default=0, metadata={"help": "Of all random draws."})
    device: str | None = field(default=None, metadata={"help": "Where to compute, e.g. cuda; default the CPU."})

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `retrofit`."""
        names = ("num_register_tokens", "top_k", "highest_block", "max_images", "batch_size", "seed", "device")
        return {name: getattr(self, name) for name in names} | {"cutoff": _cutoff(self.cutoff)}


def _cutoff(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise ValueError(f"--cutoff {text} is neither 'auto' nor a norm such as 150.") from error


@dataclass
class DataCheckArguments:
    """What `regvit data-check` reads."""

    data: list[str] = field(
        metadata={"help": "One or more image folders, parquet or tar files, Hub data sets, photos or digits."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; default: the only one, or 'image'."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the class numbers; default: 'label' where it holds some."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images of a training step over all processes."})
    image_size: int = field(default=224, metadata={"help": "Side of the global crops in pixels."})
    max_bad_share: float = field(default=0.01, metadata={"help": "Share of bad images that training would accept."})
    near_limit_bits: int = field(
        default=6,
        metadata={"help": "Near duplicates differ in at most so many of the 64 bits of their hash; 0 to 16."},
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that read; 0 reads in this one."})


@dataclass
class DemoArguments:
    """What `regvit demo` reads."""

    model_name_or_path: list[str] = field(
        metadata={
            "aliases": ["--model"],
            "action": "extend",
            "help": "Folder, Hub id or timm/NAME of a model to look into; of several one is chosen on the page.",
        }
    )
    compare: str | None = field(default=None, metadata={"help": "Another model, to be shown beside the first."})
    port: int = field(
        default=7860, metadata={"help": "Port of this machine to listen on; 0: first free one from 7860."}
    )
    cache_mib: int = field(default=512, metadata={"help": "Memory for pictures that were read, MiB."})
    device: str | None = field(default=None, metadata={"help": "Where to compute, e.g. cuda; default the CPU."})


@dataclass
class PublishArguments:
    """What `regvit publish` reads."""

    model_name_or_path: str = field(
        metadata={"aliases": ["--model"], "help": "RegViT checkpoint, or folder of a run, on this machine."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, owner/name; also named on the card."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "New folder for the bundle; default bundles/ and the name of the repository."}
    )
    push: bool = field(default=False, metadata={"help": "Send the bundle; without, nothing leaves this machine."})
    public: bool = field(
        default=False, metadata={"help": "Make a new repository public, or send to one that is; default private."}
    )
    reports: list[str] = field(
        default_factory=list,
        metadata={"help": "Reports of `regvit diagnose` and `regvit evaluate`, files or folders, for the card."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights, in the Hub's words: apache-2.0, cc-by-nc-4.0, other."},
    )
    license_name: str | None = field(default=None, metadata={"help": "Its name, where the licence is 'other'."})
    license_link: str | None = field(default=None, metadata={"help": "Address of its text, likewise."})
    data: str | None = field(default=None, metadata={"help": "Training images in words; default from the run."})
    data_license: str | None = field(default=None, metadata={"help": "Terms of the training images."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Their ids on the Hub."})
    base_model: str | None = field(
        default=None, metadata={"help": "Model that this one started from; default from the run."}
    )
    base_model_license: str | None = field(default=None, metadata={"help": "Terms of that model."})
    origin: str | None = field(
        default=None,
        metadata={"help": "pretrained, finetuned, converted or retrofitted; default what the run says, or unknown."},
    )
    description: str | None = field(default=None, metadata={"help": "A paragraph for the card."})
    example_pictures: bool = field(
        default=False, metadata={"help": "Publish example pictures of the diagnosis; they are images of the data set."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Larger weights are split into files of this size."})
    revision: str | None = field(default=None, metadata={"help": "Branch of the repository; default main."})
    commit_message: str | None = field(default=None, metadata={"help": "Of the commit."})

    def folder(self) -> str:
        """Where the bundle goes."""
        name = self.repo_id or Path(self.model_name_or_path).resolve().name
        return self.output_dir or f"bundles/{name.split('/')[-1]}"

    def card(self) -> dict[str, Any]:
        """Fields of the card that were given."""
        names = ("license", "license_name", "license_link", "data", "data_license", "base_model", "base_model_license")
        given = {name: getattr(self, name) for name in (*names, "origin", "description")}
        given["datasets"] = tuple(self.datasets)
        return {name: value for name, value in given.items() if value}


@dataclass
class DoctorArguments:
    """What `regvit doctor` reads."""

    output_dir: str = field(default=".", metadata={"help": "Where runs would be written: its disk is looked at."})
    self_test: bool = field(default=True, metadata={"help": "Train, save and load a tiny model."})


class RecipeError(ValueError):
    """A recipe file that cannot be used; the message names file, line and key."""


# Inherited options that every run may want: they stand among the own ones in the help.
_COMMON = (
    "output_dir", "max_steps", "gradient_accumulation_steps", "label_smoothing_factor", "bf16", "seed", "use_cpu",
    "eval_steps", "save_steps", "dataloader_num_workers", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
)  # fmt: skip


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """One spelling of every option, and no default where there is none."""

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: Any) -> str:
        spellings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if not spellings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(spellings)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` with `--config recipe.yaml`: default < recipe < flag.

    Values of the recipe become the parser's defaults and pass through its types, because YAML reads `1e-4` as text and
    transformers' own YAML parsing leaves it so. Recipes are flat; an unknown key is an error with the nearest one.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.add_argument(
            "--config", metavar="RECIPE.yaml", help="Flat YAML file of these options; flags override it."
        )

    def format_help(self) -> str:
        """The command's own options first; what it inherits from transformers, some 120 options, behind them."""
        of_base = {
            name for one in self.dataclass_types for name in getattr(one.__mro__[1], "__dataclass_fields__", {})
        }
        redefined = {name for one in self.dataclass_types for name in one.__annotations__}

        def section(action: Any) -> int:
            if action.dest not in of_base:
                return 0
            return 1 if action.dest in redefined or action.dest in _COMMON else 2

        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [--config RECIPE.yaml] [--option value ...]", [], [])
        formatter.add_text(self.description)
        for number, title in enumerate(("options", "training", "left of transformers.TrainingArguments")):
            formatter.start_section(title)
            formatter.add_arguments([action for action in self._actions if section(action) == number])
            formatter.end_section()
        return formatter.format_help()

    def parse(self, args: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses of `args` (without the program's name).

        Raises:
            RecipeError: The recipe is missing, not flat YAML, or has an unknown key or a value of the wrong type.
        """
        args = [_at_home(argument) for argument in args]
        recipe = _take_config(args)
        if recipe is not None:
            self._use_recipe(Path(recipe))
        # The parser's own namespace comes after the dataclasses (it holds --config), then what nothing claimed.
        *parsed, _, unknown = self.parse_args_into_dataclasses(
            list(args), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0], options, n=1, cutoff=0.0)[0]
            self.error(f"unknown option '{unknown[0]}'. Did you mean '{nearest}'?")  # exits with status 2
        return tuple(parsed)

    def _use_recipe(self, path: Path) -> None:
        if not path.is_file():
            raise RecipeError(f"The recipe '{path}' does not exist.")
        try:
            text = path.read_text(encoding="utf-8-sig")
            values, node = yaml.safe_load(text) or {}, yaml.compose(text)
        except UnicodeDecodeError as error:
            raise RecipeError(f"'{path}' is not UTF-8 text ({error}). Save it again as UTF-8.") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"'{path}' is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"'{path}' holds a {type(values).__name__}, expected one 'option: value' a line.")
        first: dict[str, int] = {}
        # YAML itself takes the last one without a word.
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if first.setdefault(key.value, line) != line:
                raise RecipeError(f"'{key.value}' stands twice in {path}, lines {first[key.value]} and {line}.")
        known: dict[str, list[Any]] = {}  # a switch has a second action of the same name, --no_switch
        for action in self._actions:
            if action.dest not in ("help", "config"):
                known.setdefault(action.dest, []).append(action)
        for key, value in values.items():
            line = next((i for i, row in enumerate(text.splitlines(), 1) if row.startswith(f"{key}:")), 0)
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise RecipeError(f"Unknown key '{key}' in {path}:{line}. Did you mean '{nearest}'?")
            try:
                default = self._typed(known[key][0], value, self._kinds(key))
            except (TypeError, ValueError, ArgumentTypeError) as error:
                raise RecipeError(f"{key}: {value!r} in {path}:{line} cannot be used: {error}") from error
            for action in known[key]:
                action.default, action.required = default, False

    def _kinds(self, key: str) -> set[Any]:
        """What an option may hold by its annotation: `int | None` gives int and NoneType, `list[str]` list."""
        hint = next(hints[key] for one in self.dataclass_types if key in (hints := get_type_hints(one)))
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        return {get_origin(kind) or kind for kind in kinds}

    @staticmethod
    def _typed(action: Any, value: Any, kinds: set[Any]) -> Any:
        if value is None:
            if type(None) not in kinds:
                raise ValueError("there is no value; leave the line out for the default")
            return None
        if isinstance(value, dict | list) and not kinds & {type(value), Any}:
            raise ValueError("expected a single value" + (" or a list" if list in kinds else ""))
        if isinstance(value, dict):
            return value
        if value is False and "no" in (action.choices or ()):
            value = "no"  # YAML reads `save_strategy: no` as false
        if list in kinds and action.nargs in ("+", "*") and not isinstance(value, list):
            value = [value]
        convert = action.type or str
        if isinstance(value, bool) and action.type is None:
            return value
        if isinstance(value, list):
            return [convert(_at_home(item) if isinstance(item, str) else str(item)) for item in value]
        return convert(_at_home(value) if isinstance(value, str) else str(value))


def _at_home(argument: str) -> str:
    """`~/x` in a recipe, and `--option=~/x`, which shells leave as it is: a folder called `~` is never meant."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return name + equals + (str(Path(value).expanduser()) if value.startswith("~/") else value)


def _take_config(args: Sequence[str]) -> str | None:
    for i, argument in enumerate(args):
        if argument == "--config" and i + 1 < len(args):
            return args[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None
