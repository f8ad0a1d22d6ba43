"""What a fine-tuning run leaves beside the model: learning curves and a card.

The folder itself is listed in `hf_regvit.finetuning.finetune`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .configuration_regvit import RegViTConfig
from .figures import save_figure
from .run_folder import read_metrics
from .upload import may_be_published


def draw_finetuning_curves(folder: Path, *, shown: Sequence[str]) -> Path | None:
    """`curves.png` from `metrics.jsonl`: losses, the metrics `shown`, learning rate; None if nothing was logged."""
    from matplotlib.figure import Figure

    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    panels: list[tuple[str, dict[str, str]]] = [("loss", {"loss": "training", "eval_loss": "validation"})]
    panels += [(name, {f"eval_{name}": "validation"}) for name in shown]
    panels += [("learning rate", {"learning_rate": "largest of the groups"})]
    curves = [
        (title, {label: [(line["step"], line[key]) for line in lines if key in line] for key, label in keys.items()})
        for title, keys in panels
    ]
    curves = [(title, drawn) for title, drawn in curves if any(drawn.values())]
    if not curves:
        return None
    figure = Figure(figsize=(3.6 * len(curves), 3.0))
    # Constrained layout would draw everything several times over.
    figure.subplots_adjust(0.16 / len(curves), 0.16, 1 - 0.06 / len(curves), 0.9, wspace=0.3)
    for axis, (title, drawn) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for label, points in drawn.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(color="#dddddd", lw=0.5)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    target = folder / "curves.png"
    save_figure(figure, target)
    return target


def write_finetuning_card(
    folder: Path,
    config: RegViTConfig,
    *,
    report: Mapping[str, Any],
    recipe: Mapping[str, Any],
    changes: Sequence[str],
    pictures: Sequence[str],
    rows: Mapping[str, str],
    usage: str,
) -> None:
    """`README.md`: what it was made from, on what, how good it is with which protocol, how to use it.

    Folders of one's own are named by their last part only, because a card may be published.
    """
    data = recipe.get("data") or recipe.get("train_dir") or "images of the caller"
    named = Path(str(data)).name or str(data)
    base = recipe.get("model_name_or_path")
    start = f"`{Path(str(base)).name}`" if base else "random weights"
    images = report["images"]
    measured = {name: value for name, value in report["eval"].items() if not _is_speed(name)}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items()) or "not measured"
    table = {
        "started from": f"{start}. {' '.join(changes)}".strip(),
        "data": f"`{named}`, {images['train']:,} training images, {images['validation']:,} for validation",
        **rows,
        "trained": f"{recipe['mode']}: {report['parameters']['trained']:,} of {report['parameters']['all']:,} "
        f"parameters, {report['steps']:,} steps ({report['epochs']:.1f} epochs), {images['seen']:,} images seen",
        "recipe": f"batch {recipe['per_device_train_batch_size']} per process, learning rate "
        f"{recipe['learning_rate']:g}, layer decay {recipe['layer_decay']:g}, augmentation {recipe['augmentation']}, "
        f"seed {report['seed']}",
        "on the validation images": f"{shown} (step {report['step_of_the_result']}"
        + (", chosen on these images" if recipe["load_best_model_at_end"] else "")
        + ")",
    }
    lines = "\n".join(f"| {name} | {text.replace('|', '/')} |" for name, text in table.items())
    # The card may be published; pictures that show images of the data are not.
    gallery = "\n".join(f"![{Path(name).stem}]({name})\n" for name in pictures if may_be_published(name))
    rows_, columns = config.patch_shape
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: {_PIPELINES[report["task"]]}
tags:
- regvit
- register-tokens
- {report["task"]}
---

# RegViT for {report["task"].replace("-", " ")}

{config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_register_tokens} registers, patches of \
{rows_} x {columns} pixels; fine-tuned with hf_regvit.

| | |
|---|---|
{lines}

```python
import hf_regvit  # or trust_remote_code=True without the package
{usage}
```

{gallery}""",
        encoding="utf-8",
    )


_PIPELINES = {
    "image-classification": "image-classification",
    "semantic-segmentation": "image-segmentation",
    "depth-estimation": "depth-estimation",
}


def _is_speed(name: str) -> bool:
    return name in ("runtime", "samples_per_second", "steps_per_second", "epoch")
