"""The report of a diagnosis."""

from dataclasses import dataclass
from typing import ClassVar

from ..models.results import Record, Result, show


@dataclass(frozen=True, repr=False)
class ArtifactReport(Result):
    """Result of a diagnosis. The first fields describe the reported layer, where the modes are furthest apart.

    Attributes:
        cutoff: Norm above which a patch token is an outlier.
        bimodal: True if the outliers are a distinct population.
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
        sinks: Attention sinks per block and head, on the images of the details: attention to outliers, registers, CLS
            and the 2 % most attended tokens, and what the heads do with it. None if the attention cannot be read, and
            in reports of earlier versions, which lack the next two fields as well.
        spurious: Tokens that repeat in unrelated images whatever their norm, tokens that many others attend to, and
            the experimental share of tokens that describe the whole image.
        position: R2 with which a linear map reads the position of a patch from its token, per layer, with a permuted
            control, and the price of removing the position.
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
    model: Record
    layers: list[Record]
    histogram_edges: list[float]
    outliers: Record
    neighbours: Record
    attention: Record | None
    registers: Record | None
    patches: Record
    controls: Record | None
    probes: Record | None
    examples: list[Record]
    skipped: list[dict[str, str]]
    warnings: list[str]
    settings: Record
    versions: dict[str, str]
    seconds: dict[str, float]
    sinks: Record | None = None
    spurious: Record | None = None
    position: Record | None = None

    file_name: ClassVar = "report.json"

    @property
    def verdict(self) -> str:
        """Conclusion in one sentence."""
        if self.bimodal:
            return (
                f"This model has artifact tokens: at block {self.layer} of {self.model['num_layers']}, "
                f"{self.outlier_share:.2%} of the patch tokens form a distinct group with "
                f"{show(self.norm_ratio, '.1f')} times the median norm of the others."
            )
        return "No distinct outliers: in no block do the norms of the patch tokens have two distinct modes."

    def summary(self) -> str:
        """Return a summary of ten lines for a terminal, plus one line per warning."""
        return "\n".join(f"{name:12}{text}" for name, text in self.table_rows())

    def table_rows(self) -> list[tuple[str, str]]:
        """Return the lines of the summary, as names and texts."""
        model, outliers, neighbors, rank = self.model, self.outliers, self.neighbours, self.patches["effective_rank"]
        record = next(entry for entry in self.layers if entry["layer"] == self.layer)
        born = {None: "none", 0: "in the embedding, before the first block"}.get(
            self.emergence_layer, f"at the output of block {self.emergence_layer}"
        )
        cells = [f"({c['row']}, {c['column']}) in {c['share']:.0%} of images" for c in outliers["top_cells"][:3]]
        direction, (rows, columns) = outliers["direction"], outliers["grid"]
        lines = {
            "model": f"{model['name']}: {model['family']}, {model['num_layers']} blocks, width "
            f"{model['hidden_size']}, {model['num_register_tokens']} registers, {self.num_images} images of "
            f"{rows} x {columns} patches",
            "verdict": self.verdict,
            "cut-off": f"{self.cutoff:.1f} at block {self.layer} (method {self.method}; median norm "
            f"{record['median']:.1f}, largest norm {record['max']:.1f}); {self.reason}",
            "emergence": born,
            "outliers": f"{outliers['per_image']:.2f} per image, in {outliers['images_with']:.0%} of the images; "
            f"{show(outliers['border_share'], '.0%', missing='none')} of them on the border, which has "
            f"{outliers['border_cells']:.0%} of the cells; most frequent cells: {', '.join(cells) or 'none'}",
            "direction": f"mean |cosine| between images: {show(direction['outlier'], '.2f')} for outliers, "
            f"{show(direction['normal'], '.2f')} for other patches",
            "neighbors": f"median cosine at the input: {show(neighbors['median_outlier'], '.2f')} for outliers, "
            f"{show(neighbors['median_normal'], '.2f')} for other patches; AUROC {show(neighbors['auroc'], '.2f')}",
            "attention": self._attention_text(),
            "registers": self._register_text(),
            "rank": f"effective rank of the patch tokens {rank['mean']:.1f} ± {rank['std']:.1f}; took "
            f"{self.seconds['total']:.0f} s",
        }
        return [*lines.items(), *(("warning", text) for text in self.warnings)]

    def _attention_text(self) -> str:
        if self.attention is None:
            return "not measured, because the model has no CLS token"
        mean = {name: entry["mean"] for name, entry in self.attention["statistics"].items()}
        return (
            f"CLS puts {mean['mass_on_patches']:.1%} on patches ({mean['mass_on_outliers']:.1%} on outliers) and "
            f"{mean['mass_on_registers']:.1%} on registers; entropy is {mean['entropy_share']:.2f} of uniform; the "
            f"top 2 % of patches get {mean['top_mass']:.1%} of the patch attention"
        )

    def _register_text(self) -> str:
        if self.registers is None:
            return "none"
        return (
            f"{self.registers['norm_ratio']:.1f} times the median patch norm at block {self.layer}; cosine between "
            f"registers {show(self.registers['cosine'], '.2f')}, of one register between images "
            f"{show(self.registers['cosine_across_images'], '.2f')}"
        )
