"""Run the Auto classes and pipelines of transformers on a model, in a clean process or in this one.

`hf_regvit.hub.verify` runs this file in a new process, where hf_regvit cannot be imported and there is no network:
`python -P clean_process.py BUNDLE FOLDER THREADS`. FOLDER has images and `questions.json`; the results are written to
`answers.safetensors` and `answers.json` in the same folder. For the original, `verify` calls `outputs_of`.
"""

import importlib
import importlib.abc
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class _Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "hf_regvit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Hide())
    with suppress(ModuleNotFoundError):
        importlib.import_module("hf_regvit")
        raise SystemExit("hf_regvit can be imported in this process, so loading the bundle would not verify anything.")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def outputs_of(
    source: str, images: Sequence[Image.Image], *, auto_classes: Sequence[str], pipelines: Sequence[str], trusted: bool
) -> tuple[dict[str, torch.Tensor], dict[str, list[tuple[str, float]]], dict[str, str]]:
    """Return the outputs of a model on images: tensors, labels with scores or pixel counts, and the loaded classes.

    Args:
        source: Folder of the model.
        images: Images in RGB.
        auto_classes: Names of the Auto classes to run.
        pipelines: Names of the pipelines to run.
        trusted: Whether to run the code files of the folder.
    """
    tensors: dict[str, torch.Tensor] = {}
    labels: dict[str, list[tuple[str, float]]] = {}
    classes: dict[str, str] = {}
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    for auto_class in auto_classes:
        model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=trusted)
        in_fresh_memory(model)
        classes[auto_class] = f"{type(model).__module__}.{type(model).__name__}"
        for number, image in enumerate(images):
            inputs = processor(image, return_tensors="pt")
            tensors[f"{number}.pixel_values"] = inputs["pixel_values"]
            with torch.inference_mode():
                outputs = model(**inputs).items()
            tensors |= {f"{number}.{auto_class}.{k}": v for k, v in outputs if isinstance(v, torch.Tensor)}
    for task in pipelines:
        pipeline: Any = transformers.pipeline  # its overloads list every task by name
        tool = pipeline(task, model=source, trust_remote_code=trusted)
        in_fresh_memory(tool.model)
        for number, image in enumerate(images):
            name = f"{number}.{task}"
            if task == "image-feature-extraction":
                tensors[name] = tool(image, return_tensors=True)
            elif task == "image-classification":
                labels[name] = [(entry["label"], entry["score"]) for entry in tool(image, top_k=5)]
            elif task == "depth-estimation":
                tensors[name] = tool(image)["predicted_depth"]
            else:
                labels[name] = [(entry["label"], sum(entry["mask"].histogram()[1:])) for entry in tool(image)]
    return tensors, labels, classes


def in_fresh_memory(model: torch.nn.Module) -> None:
    """Copy the weights to memory that torch allocates: kernels round differently for addresses in a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.eval()


def main(bundle: str, folder: Path, threads: int) -> None:
    """Answer the questions in a folder."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    questions = json.loads((folder / "questions.json").read_text())
    images = [Image.open(folder / name).convert("RGB") for name in questions.pop("images")]
    tensors, labels, classes = outputs_of(bundle, images, **questions, trusted=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "answers.safetensors")
    (folder / "answers.json").write_text(json.dumps([labels, classes]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
