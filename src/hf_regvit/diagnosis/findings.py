"""Six numbers that sum up a diagnosis, each with a sentence, and the next step."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.results import Record
from .report import ArtifactReport
from .sinks import NOP_RATIO, last_quarter

_PLACES = {
    "nop": ("a parking place", "Heads look at these tokens to do nothing: their values are small."),
    "broadcast": ("a notice board", "Every token reads the same message from these tokens."),
    "mixed": ("mixed", "The values are neither small enough for a parking place nor one message for all."),
}
_SETS = {"outliers": "outliers", "registers": "registers", "top": "the most attended 2 % of the tokens"}


@dataclass(frozen=True)
class Finding:
    """Number of a report: a name, the value as text, a sentence, the number itself, and its key for differences."""

    name: str
    value: str
    sentence: str
    number: float | None = None
    key: str | None = None


def findings(report: ArtifactReport) -> list[Finding]:
    """Return the six numbers of a report; empty for reports of earlier versions."""
    if report.spurious is None or report.position is None:
        return []
    return [
        _tokens(report, report.spurious),
        _attention(report),
        _purpose(report),
        _birth(report),
        _position(report.position),
        _sizes(report),
    ]


def main_set(report: ArtifactReport) -> str:
    """Return the set of tokens whose attention is reported: outliers, else registers, else the most attended ones."""
    sets = report.sinks["sets"] if report.sinks else {}
    return next((name for name in ("outliers", "registers") if name in sets), "top")


def last_mass(report: ArtifactReport, name: str) -> float | None:
    """Return the mean attention to a set in the last quarter of the blocks; None if it was not measured."""
    if not report.sinks or name not in report.sinks["sets"]:
        return None
    rows = report.sinks["sets"][name]["mass"][-last_quarter(report.model["num_layers"]) :]
    return sum(map(sum, rows)) / sum(map(len, rows))


def _tokens(report: ArtifactReport, found: Record) -> Finding:
    rows, columns = report.outliers["grid"]
    share = found["per_image"] / (rows * columns)
    norm_only, repetition_only = (found[name] - found["both"] for name in ("outliers", "flagged"))
    sentence = (
        f"Tokens with an outlying norm, or that repeat in unrelated images ({norm_only} found by their norm only, "
        f"{repetition_only} by repetition only)."
    )
    if not found["judged"]:
        sentence += f" Repetition was not decided: {found['reason']}."
    value = f"{found['per_image']:.1f} of {rows * columns} per image ({share:.1%})"
    return Finding("tokens that do not describe their place", value, sentence, share, "tokens")


def _attention(report: ArtifactReport) -> Finding:
    name, layers = main_set(report), report.model["num_layers"]
    mass = last_mass(report, name)
    if mass is None:
        return Finding("attention they take", "not measured", "The attention weights of this model cannot be read.")
    first = layers - last_quarter(layers) + 1
    blocks = f"blocks {first} to {layers}" if first < layers else f"block {layers}"
    sentence = f"Share of the attention of all tokens in {blocks} that goes to {_SETS[name]}; mean over heads."
    if name != "outliers":
        sentence += " The model has no outliers."
    return Finding("attention they take", f"{mass:.0%}", sentence, mass, f"{name}.mass")


def _purpose(report: ArtifactReport) -> Finding:
    title = "use of this attention"
    if not report.sinks:
        return Finding(title, "not measured", "The attention weights of this model cannot be read.")
    found, key = report.sinks["sets"][main_set(report)], f"{main_set(report)}.events"
    counts = {kind: found["per_image"][kind] for kind in _PLACES}
    kind = max(counts, key=lambda each: counts[each])
    if found["per_image"]["events"] < 0.5:
        return Finding(title, "none", "No head gives these tokens half of its attention.", 0.0, key)
    value, sentence = _PLACES[kind]
    ratio = sink_ratio(found)
    return Finding(
        title,
        value if ratio is None else f"{value} (value {ratio:.2f} of normal)",
        f"{sentence} An image has {found['per_image']['events']:.1f} such heads on average.",
        found["per_image"]["events"],
        key,
    )


def sink_ratio(found: Record) -> float | None:
    """Return the mean value ratio of the heads whose attention sinks into a set; None without such heads."""
    ratios = [
        ratio
        for kinds, values in zip(found["class"], found["ratio"])
        for kind, ratio in zip(kinds, values)
        if kind and ratio is not None
    ]
    return sum(ratios) / len(ratios) if ratios else None


def _birth(report: ArtifactReport) -> Finding:
    layer = report.emergence_layer
    if layer is None:
        return Finding("first block with outliers", "none", "No block has patch norms with two distinct modes.")
    if layer == 0:
        return Finding("first block with outliers", "embedding", "No neuron writes these outliers.", 0.0)
    text = f"From the output of block {layer} on, the norms have two modes; the neurons are in this block or before."
    return Finding("first block with outliers", f"block {layer}", text, float(layer))


def _position(found: Record) -> Finding:
    drops = [before - after for before, after in zip(found["r2"], found["r2"][1:])]
    text = f"0 is none, 1 is all; permuted positions give {found['final_permuted']:.2f}."
    if drops and max(drops) > 0.1:
        text += f" The largest drop is at block {found['layers'][drops.index(max(drops)) + 1]}."
    text += f" Removing it leaves a cosine of {found['removed']['cosine']:.3f} with the original tokens."
    return Finding("position in the output", f"R2 {found['final']:.2f}", text, found["final"], "position")


def _sizes(report: ArtifactReport) -> Finding:
    sizes = report.model.get("register_sizes")
    if not report.model.get("test_time_registers"):
        return Finding("repaired for image sizes", "not repaired", "The model has no test-time registers.")
    value = ", ".join(f"{size} px" for size in sizes) if sizes else "none tested"
    return Finding("repaired for image sizes", value, "Sizes at which a retrofit removed the outliers of test images.")


def next_step(report: ArtifactReport, *, model: str = "MODEL", data: str = "IMAGES") -> tuple[str, tuple[str, ...]]:
    """Return the most useful next step: a sentence, and the words after `regvit` of a command for it.

    Args:
        report: Result of a diagnosis.
        model: Name of the model in the command.
        data: Name of the images in the command.
    """
    look = ("demo", "--model", model)
    repair = ("retrofit", "--model", model, "--data", data, "--output_dir", "repaired")
    found, sinks = report.spurious or {}, report.sinks or {}
    broadcast = max((entry["per_image"]["broadcast"] for entry in sinks.get("sets", {}).values()), default=0)
    rules: Sequence[tuple[bool, str, tuple[str, ...]]] = (
        (report.emergence_layer == 0, "The outliers exist before the first block (position table or patch embedding), "
         "so no neuron writes them and a retrofit cannot move them.", look),
        (report.bimodal and not report.model["num_register_tokens"], "Add registers without training: run "
         "regvit retrofit with images of the sizes that you use.", repair),
        (report.bimodal, "The model has outliers although it has registers: regvit retrofit searches for further "
         "groups of neurons and adds registers for them.", repair),
        (found.get("flagged", 0) > found.get("both", 0), "Tokens of ordinary norm repeat in unrelated images. A "
         "retrofit cannot move them; leave these cells out of pooling, or fine-tune.", look),
        (broadcast >= 0.5, "Some heads broadcast one message. Registers may carry content: look at the controls with "
         "mean and exchanged registers first.", look),
        (report.position is not None and report.position["final"] > 0.3, "The output contains the position. Remove it "
         "for matching and clustering, and keep it for scenes of a fixed layout.", look),
    )  # fmt: skip
    tested = "norms of all blocks, repetition between images, attention sinks, position"
    use = ("extract", "--model", model, "--data", data, "--output_dir", "features")
    clean = f"Use the model as it is. Tested: {tested}."
    return next(((text, command) for holds, text, command in rules if holds), (clean, use))


def relocation(first: ArtifactReport, second: ArtifactReport) -> str | None:
    """Return a sentence if registers of the second model took over the attention of the outliers of the first."""
    before, after = last_mass(first, "outliers"), last_mass(second, "registers")
    if before is None or after is None or second.bimodal or abs(after - before) > 0.2 * before:
        return None
    ratio = sink_ratio((second.sinks or {})["sets"]["registers"])
    still = "still a parking place" if ratio is not None and ratio <= NOP_RATIO else "with ordinary values"
    return (
        f"The attention was relocated, not removed: {before:.0%} went to outliers in the last blocks of the first "
        f"model, and {after:.0%} goes to registers in the second one, {still}."
    )
