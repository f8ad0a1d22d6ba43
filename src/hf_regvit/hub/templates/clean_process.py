"""Load a bundle in a clean process, where hf_regvit cannot be imported and there is no network.

`hf_regvit.hub.verify` runs it in a new process: `python -P clean_process.py BUNDLE FOLDER THREADS`. FOLDER has images
and `questions.json`; the results are written to `answers.safetensors` and `answers.json` in the same folder.
"""

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class _Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "hf_regvit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Hide())
try:
    import hf_regvit  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_regvit can be imported in this process, so loading the bundle would not verify anything.")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def in_fresh_memory(model: torch.nn.Module) -> torch.nn.Module:
    """Copy the weights to memory that torch allocates: kernels round differently for addresses in a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


bundle, folder = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
transformers.utils.logging.disable_progress_bar()
questions = json.loads((folder / "questions.json").read_text())
tensors: dict[str, torch.Tensor] = {}
facts: dict[str, Any] = {"classes": {}, "pipelines": {}}
processor = transformers.AutoImageProcessor.from_pretrained(bundle)
facts["processor"] = type(processor).__name__
images = [Image.open(folder / name).convert("RGB") for name in questions["images"]]

for auto_class in questions["auto_classes"]:
    model = getattr(transformers, auto_class).from_pretrained(bundle, trust_remote_code=True)
    in_fresh_memory(model)
    facts["classes"][auto_class] = [type(model).__module__, type(model).__name__]
    for number, image in enumerate(images):
        inputs = processor(image, return_tensors="pt")
        tensors[f"{number}.pixel_values"] = inputs["pixel_values"]
        with torch.inference_mode():
            for key, value in model(**inputs).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{number}.{auto_class}.{key}"] = value
for task in questions["pipelines"]:
    tool = transformers.pipeline(task, model=bundle, trust_remote_code=True)
    in_fresh_memory(tool.model)
    for number, image in enumerate(images):
        if task == "image-feature-extraction":
            tensors[f"{number}.{task}"] = tool(image, return_tensors=True)
        elif task == "image-classification":
            facts["pipelines"][f"{number}.{task}"] = tool(image, top_k=5)
        elif task == "depth-estimation":
            tensors[f"{number}.{task}"] = tool(image)["predicted_depth"]
        else:
            facts["pipelines"][f"{number}.{task}"] = [
                [entry["label"], sum(entry["mask"].histogram()[1:])] for entry in tool(image)
            ]
facts["hidden"] = "hf_regvit" not in sys.modules
save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
          folder / "answers.safetensors")  # fmt: skip
(folder / "answers.json").write_text(json.dumps(facts))
