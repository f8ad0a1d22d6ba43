"""Read tokens from an exported file, so that `regvit extract` and `regvit evaluate` measure what will be used."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..models.configuration_regvit import RegViTConfig
from ..models.modeling_regvit import RegViTModel
from ..models.processing import EvaluationTransform, saved_processor
from ..models.tokens import Layers, Reduction, Site, TokenReader, TokenReading, resolve_layers
from .exported import ExportedModel, ExportError, load_exported, load_proof


def open_exported(source: str) -> TokenReader | str:
    """Return a reader for the folder of an export or for one of its files, and every other name unchanged."""
    path = Path(source)
    if (path / "proof.json").is_file():
        return ExportedReader(load_exported(path))
    folder = path.parent.parent
    if not path.is_file() or not (folder / "proof.json").is_file():
        return source
    name = path.relative_to(folder).as_posix()
    for exported in load_proof(folder)["files"]:
        if exported["file"] == name:
            return ExportedReader(load_exported(folder, engine=exported["engine"], precision=exported["precision"]))
    raise ExportError(f"'{source}' is not in '{folder}/proof.json'. Export it again.")


class _Tower(RegViTModel):
    """Sizes of the exported model without weights; its state is the checksum of the file."""

    digest = ""

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        return {"sha256": torch.tensor(list(bytes.fromhex(self.digest)), dtype=torch.uint8)}

    def to(self, *args: object, **kwargs: object) -> Self:  # type: ignore[override]
        return self


class ExportedReader(TokenReader):
    """Reader of the tokens after the final norm of an exported file, which count as its only block.

    Raises:
        ExportError: The file has no tokens after a final norm.
    """

    def __init__(self, exported: ExportedModel) -> None:
        config = RegViTConfig.from_pretrained(exported.folder)
        outputs = exported.proof["outputs"]
        if "patches" not in outputs or config.final_norm != "tokens":
            raise ExportError(
                f"'{exported.folder}' has the outputs {', '.join(outputs)}, but extract and evaluate read tokens "
                "after the final norm. Export the model with --task features."
            )
        with torch.device("meta"):
            tower = _Tower(config, add_pooling_layer=False)
        tower.digest = exported.file["sha256"][exported.file["file"]]
        super().__init__(tower.eval(), saved_processor(exported.folder))
        registers = outputs.get("registers", [0, 0])[1]
        self.exported, self.final_norm = exported, torch.nn.Identity()
        self.description = replace(
            self.description,
            name=f"{exported.folder.name}/{exported.file['file']}",
            num_layers=1,
            num_register_tokens=registers,
            image_size=self.description.image_size if exported.size == "any" else tuple(exported.size),
        )

    @property
    def device(self) -> torch.device:
        """Device of the engine."""
        return torch.device("cpu")

    def transform_for(self, *, image_size: int | None = None, keep_aspect: bool = False) -> EvaluationTransform:
        """Return the transform for an image size; a file for images that are not square has only its own."""
        size = self.description.image_size
        if self.exported.size != "any" and size[0] != size[1] and image_size in (None, *size) and not keep_aspect:
            return super().transform_for()
        return super().transform_for(image_size=image_size, keep_aspect=keep_aspect)

    def read_many(
        self, pixel_values: Tensor, sites: Mapping[Site, Layers], *, reduce: Mapping[Site, Reduction] | None = None
    ) -> dict[Site, TokenReading]:
        """Run the file; only the residual stream of its block, after the final norm, can be read."""
        for site, layers in sites.items():
            if site != "residual" or resolve_layers(layers, 1) != (1,):
                raise ExportError(
                    f"An exported file has only the tokens of its last block, not site='{site}' of {layers}. Use "
                    "tasks that read the last block, such as knn, or the model from which it was exported."
                )
        settings, images = self.exported.proof["preprocessing"], pixel_values.float().cpu()
        if self.exported.proof["input"]["dtype"] == "uint8":
            mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
            levels = ((images * std + mean) / settings["scale"]).round().clamp(0, 255)
            images = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        outputs = {name: torch.from_numpy(values) for name, values in self.exported(images.numpy()).items()}
        parts = [outputs["cls"][:, None]] if "cls" in outputs else []
        parts += [outputs["registers"]] if "registers" in outputs else []
        tokens = torch.cat([*parts, outputs["patches"]], dim=1)  # (B, T, D)
        patch = self.description.patch_size
        grid = (pixel_values.shape[2] // patch[0], pixel_values.shape[3] // patch[1])
        kept = reduce["residual"](tokens, 1) if reduce and "residual" in reduce else tokens
        registers = self.description.num_register_tokens
        return {"residual": TokenReading("residual", (1,), (kept,), grid, "cls" in outputs, registers)}
