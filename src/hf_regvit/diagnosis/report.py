"""The report of a diagnosis."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .outliers import Cutoff


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def emergence_layer(cutoffs: Mapping[int, Cutoff], layer: int) -> int | None:
    """Return the first of the unbroken run of bimodal layers that ends at `layer`, or None if it is not bimodal."""
    if not cutoffs[layer].bimodal:
        return None
    first = layer
    for earlier in sorted((i for i in cutoffs if i < layer), reverse=True):
        if not cutoffs[earlier].bimodal:
            break
        first = earlier
    return first


# --- The diagnosis ---


@dataclass(frozen=True)
class ArtifactReport:
    """Result of a diagnosis. The first fields describe the reported layer, where the modes are furthest apart.

    Attributes:
        cutoff: Norm above which a patch token is an outlier.
        bimodal: Whether the outliers are a distinct population.
        outlier_share: Share of all patch tokens that are outliers, in [0, 1].
        norm_ratio: Median norm of outliers over that of the other patches; None without outliers.
        layer: Reported layer; i is the output of block i. The last one if no layer has two modes.
        emergence_layer: First layer of the unbroken run of bimodal layers that ends at the reported one; 1 is the
            output of the first block, 0 the embedding. None if the reported layer is not bimodal.
        num_images: Number of images used.
        separation: Ashman's D of the reported layer.
        method: Origin of the cut-off: "mixture", "fallback" or "fixed".
        reason: Explanation of why the norms count as bimodal or not.
        model: Name, family, sizes, number of parameters and cost of the model.
        layers: One record per layer: quantiles, histogram counts, cut-off and gate, norms of CLS and registers.
        histogram_edges: Bin edges of all histograms as norms, logarithmically spaced.
        outliers: Number per image, positions (`position_map` is the share of images in which a cell is an outlier),
            direction and channels.
        neighbours: Similarity to neighboring patches at the patch embedding, for normal and outlier patches.
        attention: Attention from CLS to patches in the last block; None without CLS.
        registers: Norms and similarity of registers; None without registers.
        patches: Effective rank of the patch tokens after the final norm.
        controls: Effect of replacing registers; None without registers.
        probes: Linear probes on single tokens; None if not requested.
        examples: A few images with their norm and attention maps.
        skipped: Skipped images, with the reason.
        warnings: Sentences on what limits the reliability of the numbers.
        settings: All settings, and a description of the preprocessing.
        versions: Versions of the libraries.
        seconds: Wall time of each step.
    """

    cutoff: float
    bimodal: bool
    outlier_share: float
    norm_ratio: float | None
    layer: int
    emergence_layer: int | None
    num_images: int
    separation: float
    method: str
    reason: str
    model: dict[str, Any]
    layers: list[dict[str, Any]]
    histogram_edges: list[float]
    outliers: dict[str, Any]
    neighbours: dict[str, Any]
    attention: dict[str, Any] | None
    registers: dict[str, Any] | None
    patches: dict[str, Any]
    controls: dict[str, Any] | None
    probes: dict[str, Any] | None
    examples: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    warnings: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` into `folder`, which is created if needed, and return its path."""
        path = Path(folder) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ArtifactReport":
        """Read a report written by `save`; `path` is the file or its folder."""
        path = Path(path)
        return cls(**json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8")))

    @property
    def verdict(self) -> str:
        """Conclusion in one sentence."""
        where = f"block {self.layer} of {self.model['num_layers']}"
        if self.bimodal:
            return (
                f"This model has artifact tokens: at {where}, {self.outlier_share:.2%} of the patch tokens form a "
                f"distinct group with {_number(self.norm_ratio)} times the median norm of the others."
            )
        return f"No distinct outliers: no block has patch norms with two distinct modes ({self.reason} at {where})."

    def summary(self) -> str:
        """Return a summary of ten lines for a terminal, plus one line per warning."""
        return "\n".join(_summary_lines(self))


def _summary_lines(report: ArtifactReport) -> list[str]:
    model, outliers, neighbours = report.model, report.outliers, report.neighbours
    record = next(entry for entry in report.layers if entry["layer"] == report.layer)
    born = {None: "none", 0: "in the embedding, before the first block"}.get(
        report.emergence_layer, f"at the output of block {report.emergence_layer}"
    )
    cells = ", ".join(f"({c['row']}, {c['column']}) in {c['share']:.0%} of images" for c in outliers["top_cells"][:3])
    lines = [
        f"model       {model['name']}: {model['family']}, {model['num_layers']} blocks, width {model['hidden_size']}, "
        f"{model['num_register_tokens']} registers, {report.num_images} images of {_by(outliers['grid'])} patches",
        f"verdict     {report.verdict}",
        f"cut-off     {report.cutoff:.1f} at block {report.layer} (method {report.method}; median norm "
        f"{record['median']:.1f}, largest norm {record['max']:.1f}); {report.reason}",
        f"emergence   {born}",
        f"outliers    {outliers['per_image']:.2f} per image, in {outliers['images_with']:.0%} of the images; "
        f"{_percent(outliers['border_share'])} of them on the border, which has {outliers['border_cells']:.0%} of the "
        f"cells; most frequent cells: {cells or 'none'}",
        f"direction   mean |cosine| between images: {_number(outliers['direction']['outlier'], 2)} for outliers, "
        f"{_number(outliers['direction']['normal'], 2)} for other patches",
        f"neighbors   median cosine at the input: {_number(neighbours['median_outlier'], 2)} for outliers, "
        f"{_number(neighbours['median_normal'], 2)} for other patches; AUROC {_number(neighbours['auroc'], 2)}",
    ]
    if report.attention is None:
        lines.append("attention   not measured, because the model has no CLS token")
    else:
        mean = {name: entry["mean"] for name, entry in report.attention["statistics"].items()}
        lines.append(
            f"attention   CLS puts {mean['mass_on_patches']:.1%} on patches ({mean['mass_on_outliers']:.1%} on "
            f"outliers) and {mean['mass_on_registers']:.1%} on registers; entropy is {mean['entropy_share']:.2f} of "
            f"uniform; the top 2 % of patches get {mean['top_mass']:.1%} of the patch attention"
        )
    if report.registers is None:
        lines.append("registers   none")
    else:
        r = report.registers
        lines.append(
            f"registers   {r['norm_ratio']:.1f} times the median patch norm at block {report.layer}; cosine between "
            f"registers {_number(r['cosine'], 2)}, of one register between images "
            f"{_number(r['cosine_across_images'], 2)}"
        )
    rank = report.patches["effective_rank"]
    lines.append(
        f"rank        effective rank of the patch tokens {rank['mean']:.1f} ± {rank['std']:.1f}; "
        f"took {report.seconds['total']:.0f} s" + "".join(f"\nwarning     {text}" for text in report.warnings)
    )
    return lines
