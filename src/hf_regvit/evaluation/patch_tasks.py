"""Evaluation tasks on patch tokens: linear segmentation, linear depth and object discovery."""

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from .image_tasks import option

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from ..data.maps import DenseSource
    from ..models.tokens import TokenReader
    from .dense_features import DenseFeatures
    from .dense_heads import LinearResult
    from .lost import LostSettings
    from .object_discovery import LostEvaluation
    from .report import Score
    from .run import TaskParts


# --- Maps


@dataclass
class FeatureFile:
    """Setting of every task on patch tokens."""

    dense_settings: str | None = option(
        None, "File of `regvit dense` that sets block, views and image size of segmentation, depth and LOST."
    )


@dataclass
class DenseSettings(FeatureFile):
    """Settings of both heads on patch tokens."""

    dense_steps: int = option(1000, "Number of training steps of the segmentation and depth heads.")
    dense_batch_size: int = option(8, "Number of images per step of these heads.")
    dense_learning_rate: float | None = option(
        None, "Peak learning rate of these heads. Default: 0.001 for segmentation, 0.003 for depth."
    )
    dense_image_size: int | None = option(
        None, "Shorter image side for segmentation and depth in pixels. Default: the model's image size."
    )
    num_dense_blocks: int = option(1, "Number of blocks that segmentation and depth read: 1 (the last one) or 4.")

    def __post_init__(self) -> None:
        if self.num_dense_blocks not in (1, 4):
            raise ValueError(f"num_dense_blocks={self.num_dense_blocks} must be 1 or 4.")
        if self.dense_settings is not None and self.num_dense_blocks != 1:
            raise ValueError("dense_settings names one block, so num_dense_blocks must be 1. Leave out one of them.")

    def head(self) -> dict[str, Any]:
        """Return the training settings of the head that were given."""
        rate = {} if self.dense_learning_rate is None else {"learning_rate": self.dense_learning_rate}
        return {"num_steps": self.dense_steps, "batch_size": self.dense_batch_size} | rate

    def read(self, reader: "TokenReader", sources: "list[DenseSource]", parts: "TaskParts") -> "list[DenseFeatures]":
        """Read the patch tokens of the training and the test images; their time is added to `parts`."""
        from .dense_features import four_blocks, read_dense_features, settings_for

        layers = (-1,) if self.num_dense_blocks == 1 else four_blocks(reader.description.num_layers)
        options: dict[str, Any] = {"layers": layers, "image_size": self.dense_image_size}
        if self.dense_settings is not None:
            chosen = settings_for(self.dense_settings, reader, image_size=self.dense_image_size)
            options |= {"layers": (chosen.layer,), "image_size": chosen.image_size}
            options |= {"views": chosen.views, "pool_to_grid": chosen.pool_to_grid}
        batch_size = parts.sampling.batch_size
        found = [read_dense_features(reader, one, batch_size=batch_size, **options) for one in sources]
        parts.reading_seconds += sum(one.seconds for one in found)
        return found


@dataclass
class Segmentation:
    """Linear segmentation head on frozen patch tokens."""

    @dataclass
    class Settings(DenseSettings):
        """Settings of the masks."""

        ignore_values: list[int] | None = option(None, "Mask values to ignore. Default: 255.")
        do_reduce_labels: bool = option(
            False, "Treat mask value 0 as background to ignore, as in ADE20k.", "--reduce_labels"
        )

    settings: Settings
    name, title, hub_type, needs = "segmentation", "Linear segmentation", "image-segmentation", "masks"

    def run(self, reader: "TokenReader", parts: "TaskParts", *, seed: int) -> "list[Score]":
        """Score the mean intersection over union."""
        from .dense_heads import SegmentationSettings, linear_segmentation

        settings = self.settings
        options = {"ignore_values": settings.ignore_values, "reduce_labels": settings.do_reduce_labels}
        train, test = sources = parts.maps("masks", **options)
        features = settings.read(reader, sources, parts)
        result = linear_segmentation(
            features[0], train.targets, features[1], test.targets, class_names=train.class_names,
            settings=SegmentationSettings(**settings.head()), seed=seed,
        )  # fmt: skip
        return _dense_scores(self.name, {"mean_iou": result.rows}, result, test.name, "mean_iou")


@dataclass
class Depth:
    """Linear depth head on frozen patch tokens."""

    @dataclass
    class Settings(DenseSettings):
        """Settings of the depth maps."""

        depth_scale: float | None = option(
            None, "Meters per stored depth unit. Default: 0.001 for integers, 1 for floating-point values."
        )
        max_depth: float = option(10.0, "Maximum depth in meters; larger values are ignored.")

    settings: Settings
    name, title, hub_type, needs = "depth", "Linear depth", "depth-estimation", "depth maps"

    def run(self, reader: "TokenReader", parts: "TaskParts", *, seed: int) -> "list[Score]":
        """Score rmse, abs_rel and delta1."""
        from .dense_heads import DepthSettings, linear_depth

        settings = self.settings
        train, test = sources = parts.maps("depth", depth_scale=settings.depth_scale, max_depth=settings.max_depth)
        features = settings.read(reader, sources, parts)
        head = DepthSettings(max_depth=settings.max_depth, **settings.head())
        result = linear_depth(features[0], train.targets, features[1], test.targets, settings=head, seed=seed)
        rows = {name: result.rows[:, [i]] for i, name in enumerate(("rmse", "abs_rel", "delta1"))}
        return _dense_scores(self.name, rows, result, test.name, "mean")


def _dense_scores(
    task: str, metrics: "Mapping[str, np.ndarray]", result: "LinearResult", data: str, statistic: str
) -> "list[Score]":
    from .report import Score

    return [
        Score.measured(
            rows,
            ids=result.ids,
            data=data,
            seed=result.seed,
            statistic=statistic,
            task=task,
            variant="",
            metric=metric,
            protocol=result.protocol,
            settings={"layer": ", ".join(map(str, result.layers)), "num_steps": result.settings.num_steps},
            num_train=result.num_train,
            seconds=result.seconds,
        )
        for metric, rows in metrics.items()
    ]


# --- Boxes


@dataclass
class Lost:
    """Object discovery by LOST; with several values of an option, the best combination is selected."""

    @dataclass
    class Settings(FeatureFile):
        """Settings of the boxes, and the values of LOST's settings: all combinations are candidates."""

        boxes: str | None = option(None, "Column with ground-truth boxes. Default: objects, bbox or boxes.")
        box_format: str = option("xywh", "Box format: xywh (corner, width, height, as in COCO) or xyxy (two corners).")
        lost_features: list[str] = option(["k", "q", "v", "out"], "Features for object discovery, among q k v out.")
        lost_layers: list[int] = option(
            [-1, -2, -3, -4],
            "Blocks for object discovery, counted from the end. A shallow model uses those that it has.",
        )
        lost_centers: list[str] = option(
            ["none", "image", "row"], "Centering for object discovery, among none image row."
        )
        lost_l2norm: list[str] = option(["false", "true"], "L2 normalization for object discovery, among false true.")
        lost_biases: list[float] | None = option(
            None,
            "Biases added to the cosine similarities, or to the dot products with --lost_l2norm false. Default: 0 "
            "-0.1 -0.2 -0.4 -0.6 for cosines and 0 for dot products, whose scale depends on the model.",
        )
        lost_k: list[int] = option([100], "Numbers of candidate patches for seed expansion.")
        max_side: int = option(640, "Maximum longer side for object discovery in pixels; larger images are resized.")

        def __post_init__(self) -> None:
            if self.dense_settings is not None and self.lost_layers != [-1, -2, -3, -4]:
                raise ValueError("dense_settings names a block, and so does lost_layers. Leave out one of them.")
            if set(self.lost_l2norm) - {"true", "false"}:
                raise ValueError(f"lost_l2norm={self.lost_l2norm} contains an unknown value. Choose from true, false.")

        def candidates(self, num_layers: int, layer: int | None = None) -> "list[LostSettings]":
            """Return the combinations for a model of that many blocks, or for one block; the first wins a tie."""
            from .lost import LostSettings

            cosine = (0.0, -0.1, -0.2, -0.4, -0.6) if self.lost_biases is None else self.lost_biases
            raw = cosine if self.lost_biases is not None and self.lost_l2norm == ["false"] else (0.0,)
            layers = [one for one in self.lost_layers if one >= -num_layers] if layer is None else [layer]
            values: Any = product(self.lost_features, layers, self.lost_centers, self.lost_l2norm, self.lost_k)
            found = [
                LostSettings(feature, layer, center, norm == "true", bias, k)
                for feature, layer, center, norm, k in values
                for bias in (cosine if norm == "true" else raw)
            ]
            if not found:
                raise ValueError(
                    f"{self} has no setting for a model of {num_layers} blocks. Add layers or other values."
                )
            return found

    settings: Settings
    name, title, hub_type, needs = "lost", "Object discovery", "object-detection", "boxes"

    def run(self, reader: "TokenReader", parts: "TaskParts", *, seed: int) -> "list[Score]":
        """Score CorLoc; the report also keeps the whole result as `lost`."""
        from .dense_features import settings_for
        from .object_discovery import evaluate_lost

        settings = self.settings
        train, (images, truth) = parts.boxes(column=settings.boxes, box_format=settings.box_format)
        dense = None if settings.dense_settings is None else settings_for(settings.dense_settings, reader)
        candidates = settings.candidates(reader.description.num_layers, None if dense is None else dense.layer)
        parts.lost = evaluate_lost(
            reader, images, truth, train=train, settings=candidates, max_side=settings.max_side, dense=dense, seed=seed
        )
        return [lost_score(parts.lost, parts.name, seed)]


def lost_score(lost: "LostEvaluation", data: str, seed: int) -> "Score":
    """Return the CorLoc of the chosen settings as a score."""
    import numpy as np

    from .report import Score

    score, threshold, dense = lost.scores["lost"], lost.protocol["iou_threshold"], lost.protocol.get("dense")
    size = f"longer side up to {lost.protocol['max_side']} px"
    if dense is not None:
        size = f"shorter side {dense['image_size'] or 'of the model'} px, {dense['views']} views"
        size += ", pooled" * dense["pool_to_grid"]
    chosen = "as given" if lost.choice is None else f"{lost.settings} (of {lost.choice['num_settings']})"
    return Score.measured(
        np.asarray(score.overlaps) >= threshold,
        ids=lost.ids,
        data=data,
        seed=seed,
        task=Lost.name,
        variant="",
        metric="corloc",
        protocol=f"LOST, one box per image, CorLoc at IoU {threshold}, {size}",
        settings={
            "layer": lost.settings.layer,
            "chosen": chosen,
            "compared_with": {name: other.corloc for name, other in lost.scores.items() if name != "lost"},
        },
        num_train=0 if lost.choice is None else lost.choice["num_images"],
        seconds=lost.seconds,
    )
