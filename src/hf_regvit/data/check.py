"""Data set reports before training: counts, sizes, duplicates, bad images, and whether a run can use the data.

`check_data` reads every image once, in the same way as training, and also inspects the stored bytes.
"""

import hashlib
import html
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .decoding import BadImageError, ImageFacts, ImageLimits, image_facts
from .loading import Data, load_images
from .maps import has_masks, without_masks
from .parts import open_parts
from .source import ImageSource, MissingSplitError

logger = logging.getLogger(__name__)

_QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}
_SIDES = (32, 64, 96, 128, 224, 256, 384, 512, 1024, 2048)  # edges of the histogram of the shorter side, pixels
_STEP = 2  # gray levels; smaller differences between neighboring cells are noise
_NEARLY_BLACK = 16  # of 255; 12-bit values in a 16-bit file end there
_BLACK = f"nearly black (nothing above {_NEARLY_BLACK} of 255; 12-bit values in 16-bit files? multiply them by 16)"
_FLAT = 8  # gray levels between the darkest and the brightest cell; below this, a hash is only noise
# Hashes alone confuse bright objects on a dark background: among 27,499 images of 64 px, 66 pairs differed by
# at most 3 bits, and none of those inspected was a true duplicate. The colors of the thumbnails separate them.
_SAME_COLORS = 7
_MOST_PAIRS = 5_000_000


# --- Near duplicates


def difference_hash(thumbnail: Image.Image) -> int | None:
    """Compute a 64-bit hash of an image that hardly changes with its size, color and compression.

    A bit is set for each cell that is brighter than its right neighbor by more than noise. The result is None for a
    flat image, whose bits would be noise. Of 326 images scaled by 0.7 and saved as JPEG with quality 80, 93 % changed
    by at most 6 bits, and no pair of different images was that close.

    Args:
        thumbnail: RGB, 9 x 8 pixels.

    Source: the "dHash" of N. Krawetz, "Kind of Like That" (2013).
    """
    gray = np.asarray(thumbnail.convert("L"), dtype=np.int16)  # (8, 9)
    if int(gray.max() - gray.min()) < _FLAT:
        return None
    return int.from_bytes(np.packbits(gray[:, :-1] > gray[:, 1:] + _STEP).tobytes(), "big")


def near_pairs(hashes: np.ndarray, limit: int) -> np.ndarray:
    """Find all pairs of hashes that differ in at most `limit` bits.

    Two such hashes agree in at least one of `limit + 1` bands of bits, so only hashes that share a band are compared.

    Args:
        hashes: (n,) uint64.
        limit: Largest number of different bits, 0 to 31.

    Returns:
        (pairs, 2) int64 indices, the smaller one first, sorted. At most five million pairs, a limit reached only if
        one image is repeated very often.

    Source: the pigeonhole argument of G. S. Manku et al., "Detecting near-duplicates for web crawling" (2007).
    """
    edges = np.linspace(0, 64, limit + 2).astype(int)
    found: list[np.ndarray] = []
    count = 0
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] + np.uint64(1)))
        for members in np.split(order, starts[1:]):
            for pairs in _pairs_within(hashes, members, limit):
                found.append(pairs)
                count += len(pairs)
            if count > _MOST_PAIRS:
                logger.warning(
                    "There are more than %d pairs of near duplicates. The remaining ones are not counted.", _MOST_PAIRS
                )
                return _in_order(found, len(hashes))[:_MOST_PAIRS]
    return _in_order(found, len(hashes))


def _pairs_within(hashes: np.ndarray, members: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    chunk = max(2**22 // max(len(members), 1), 1)  # limits the table of differences to some ten MiB
    for start in range(0, len(members) - 1, chunk):
        rows = members[start : start + chunk]
        others = members[start:]
        bits = _bit_count(hashes[rows][:, None] ^ hashes[others][None, :])  # (rows, others)
        row, column = np.nonzero(bits <= limit)
        later = column > row  # each pair once, and no hash with itself
        yield np.stack([rows[row[later]], others[column[later]]], axis=1)


_BITS = np.array([value.bit_count() for value in range(2**16)], dtype=np.uint8)


def _bit_count(values: np.ndarray) -> np.ndarray:
    return _BITS[values.view(np.uint16).reshape(*values.shape, 4)].sum(axis=-1, dtype=np.uint8)


def _in_order(pairs: list[np.ndarray], num_hashes: int) -> np.ndarray:
    """Sort the pairs and remove repeated ones, since two hashes may share several bands."""
    if not pairs:
        return np.empty((0, 2), dtype=np.int64)
    both = np.concatenate(pairs)
    keys = np.unique(both.min(axis=1) * num_hashes + both.max(axis=1))
    return np.stack(np.divmod(keys, num_hashes), axis=1)


# --- One image


@dataclass(frozen=True)
class _Finding:
    """Result for one image; `error` is set if the image cannot be used."""

    id: str
    split: str
    size: tuple[int, int] | None = None
    facts: ImageFacts | None = None
    digest: bytes | None = None
    thumbnail: bytes = b""  # 8 x 9 RGB
    hash: int | None = None
    brightest: int = 255  # largest value of any channel, 0 to 255
    error: BadImageError | None = None


class _Inspection(Dataset[_Finding]):
    """Results by index over all splits, for worker processes."""

    def __init__(self, sources: dict[str, ImageSource]) -> None:
        self.places = [(split, index) for split, source in sources.items() for index in range(len(source))]
        self.sources = sources

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> _Finding:
        split, index = self.places[place]
        source = self.sources[split]
        id, facts, digest = source.ids[index], None, None
        try:
            if source.encoded is not None:
                data = source.encoded(index)
                digest = hashlib.sha256(data).digest()
                with suppress(BadImageError):  # reading the image raises the same error, with its name
                    facts = image_facts(data, name="")
            image = source.read(index)
        except BadImageError as error:
            return _Finding(id, split, facts=facts, error=error)
        if digest is None:
            digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        thumbnail = image.resize((9, 8), Image.Resampling.BOX)
        brightest = int(np.asarray(image).max())
        bits = difference_hash(thumbnail)
        return _Finding(id, split, image.size, facts, digest, thumbnail.tobytes(), bits, brightest)


def _inspect(sources: dict[str, ImageSource], *, num_workers: int, progress: bool) -> list[_Finding]:
    from tqdm import tqdm

    loader = DataLoader(_Inspection(sources), batch_size=None, num_workers=num_workers)
    return list(tqdm(loader, desc="images", unit="", disable=not progress, mininterval=0.5))


# --- The report


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split: images listed, images that can be used, and images per class (None without labels)."""

    images: int
    usable: int
    classes: dict[str, int] | None


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal images, and the number of redundant images; `examples` are groups of split and id.

    Near duplicates do not include exact ones. `across_splits` counts validation images that duplicate a training
    image, which makes validation results too optimistic.
    """

    groups: int
    surplus: int
    across_splits: int
    examples: list[list[str]]


@dataclass(frozen=True, repr=False)
class DataReport:
    """Result of `check_data`. Sizes are pixels of the upright image; counts are images of all splits together.

    `bad` lists every image that cannot be used, with path, kind and reason; `problems` lists problems that are not
    single images; `notes` says what was left out of the data, or taken in.
    `upsampled_share` is the share of usable training images whose shorter side is below `image_size`.
    """

    data: list[str]
    splits: dict[str, SplitReport]
    formats: dict[str, int]
    modes: dict[str, int]
    bits: dict[str, int]
    traits: dict[str, int]
    width: dict[str, int]
    height: dict[str, int]
    shorter_side: dict[str, int]
    shorter_side_histogram: dict[str, int]
    bad: list[dict[str, str]]
    problems: list[dict[str, str]]
    notes: list[str]
    exact_duplicates: Duplicates
    near_duplicates: Duplicates
    near_limit_bits: int
    batch_size: int
    steps_per_epoch: int
    image_size: int
    upsampled_share: float
    max_bad_share: float
    verdict: str

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.verdict}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return the report as text."""
        lines = [f"data: {', '.join(self.data)}", *(f"note: {note}" for note in self.notes)]
        for name, part in self.splits.items():
            lines.append(f"{name}: {part.images} images, {part.usable} usable{_class_line(part.classes)}")
        lines += [
            f"formats: {_counts(self.formats)}" if self.formats else "formats: none, the images are generated",
            f"modes: {_counts(self.modes)}; bits per channel: {_counts(self.bits)}" if self.modes else "",
            f"special cases: {_counts(self.traits)}" if self.traits else "",
        ]
        if self.width:
            for name in ("width", "height", "shorter_side"):
                quantiles = ", ".join(f"{key} {value}" for key, value in getattr(self, name).items())
                lines.append(f"{name.replace('_', ' ')}: {quantiles}")
            lines.append("images by shorter side (pixels):")
            most = max(self.shorter_side_histogram.values())
            for span, count in self.shorter_side_histogram.items():
                lines.append(f"  {span:>10} {count:>8} {'#' * round(40 * count / most)}")
        lines.append(_duplicate_lines("exact duplicates (sha256 of the stored bytes)", self.exact_duplicates))
        near = (
            f"near duplicates (hashes within {self.near_limit_bits} of 64 bits, colors within {_SAME_COLORS} of 255)"
        )
        lines.append(_duplicate_lines(near, self.near_duplicates))
        kinds = Counter(record["kind"] for record in self.bad)
        lines.append(f"bad images: {len(self.bad)}" + (f" ({_counts(kinds)})" if kinds else ""))
        lines += _named(self.bad)
        if self.problems:
            lines.append(f"other problems: {len(self.problems)}")
            lines += _named(self.problems)
        lines.append(
            f"training with {self.batch_size} images per step: {self.steps_per_epoch} steps per epoch; "
            f"{self.upsampled_share:.1%} of the images are smaller than {self.image_size} px and would be enlarged"
        )
        # File names are not always UTF-8; characters that a terminal cannot show are written as escapes.
        return "\n".join(line for line in lines if line).encode("utf-8", "backslashreplace").decode()


def _class_line(classes: dict[str, int] | None) -> str:
    if not classes:
        return ", no labels"
    sizes = classes.values()
    span = f"{min(sizes)} to {max(sizes)} images" if min(sizes) < max(sizes) else f"{min(sizes)} images each"
    line = f", {len(classes)} classes of {span}"
    return line if len(classes) > 20 else f"{line}: {_counts(classes)}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _duplicate_lines(what: str, found: Duplicates) -> str:
    if not found.groups:
        return f"{what}: none"
    line = f"{what}: {found.groups} groups, {found.surplus} redundant images"
    if found.across_splits:
        line += f"; validation images that duplicate a training image: {found.across_splits}"
    return "\n".join([line, *("  " + " = ".join(group[:4]) for group in found.examples[:3])])


def _named(records: Sequence[dict[str, str]]) -> list[str]:
    lines = [f"  {record['path']}: {record['reason']}" for record in records[:10]]
    return lines + ([f"  and {len(records) - 10} more (all with --json)"] if len(records) > 10 else [])


def check_data(
    data: Data,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    limits: ImageLimits | None = None,
    batch_size: int = 64,
    image_size: int = 224,
    max_bad_share: float = 0.01,
    near_limit_bits: int = 6,
    num_workers: int = 0,
    progress: bool = False,
) -> DataReport:
    """Read every image of a data set and report on it. Masks in a folder next to `images/` are checked too.

    Args:
        data: Image source or sources, as for `load_images`.
        image_column: Image column of a table. Default: the only image column, or `image`.
        label_column: Integer or ClassLabel column. Default: `label`, if it has one of these types.
        limits: Limits that images must satisfy. Default: those of training.
        batch_size: Number of images per optimizer step over all processes, to compute the number of steps.
        image_size: Side of the global crops in pixels, to compute the share of images that would be enlarged.
        max_bad_share: Largest share of bad images that the verdict accepts.
        near_limit_bits: Largest number of different bits between the hashes of near duplicates, 0 to 16. The search
            takes longer with every bit; 3 or 4 suit millions of images.
        num_workers: Number of processes that read images.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: There are no usable images, or an option is out of range.
    """
    if not 0 <= near_limit_bits <= 16:
        raise ValueError(f"near_limit_bits={near_limit_bits} must be between 0 and 16.")
    if batch_size < 1 or image_size < 1:
        raise ValueError(f"batch_size={batch_size} and image_size={image_size} must be positive.")
    options: dict[str, Any] = {"image_column": image_column, "label_column": label_column, "limits": limits}
    try:
        parts = open_parts(data, kind="images", options=options)
        sources = {"train": parts.train} | ({"validation": parts.heldout} if parts.heldout else {})
    except MissingSplitError:
        sources = {"validation": load_images(data, split="validation", **options)}
    # Each problem once: a folder that cannot be listed appears in every split.
    once = {problem.path: problem for source in sources.values() for problem in source.problems}
    notes, problems = [], [_record(problem) for problem in once.values()]
    if isinstance(data, str | Path) and has_masks(data):
        sources = {split: without_masks(source) for split, source in sources.items()}
        try:
            notes = [f"masks: {line}" for line in open_parts(data, kind="masks", options={"limits": limits}).report]
        except ValueError as error:  # unreadable, without an image, of another size, or with values of no class
            problems.append({"path": str(data), "kind": "masks", "reason": str(error)})
    findings = _inspect(sources, num_workers=num_workers, progress=progress)
    good = [finding for finding in findings if finding.error is None]
    return DataReport(
        data=[str(data)] if isinstance(data, str | Path) else [str(one) for one in data],
        splits={split: _split_report(split, source, findings) for split, source in sources.items()},
        **_image_record(findings),
        **_sizes(good),
        bad=[_record(finding.error) for finding in findings if finding.error],
        problems=problems,
        notes=list(dict.fromkeys([*(note for source in sources.values() for note in source.notes), *notes])),
        exact_duplicates=_exact_duplicates(good),
        near_duplicates=_near_duplicates(good, near_limit_bits),
        near_limit_bits=near_limit_bits,
        **_run_facts(findings, batch_size=batch_size, image_size=image_size, max_bad_share=max_bad_share),
    )


def _record(error: BadImageError) -> dict[str, str]:
    return {"path": error.path, "kind": error.kind, "reason": error.reason}


def _split_report(split: str, source: ImageSource, findings: Sequence[_Finding]) -> SplitReport:
    classes = None
    if source.labels is not None and source.label_names is not None:
        counts = Counter(source.labels)
        classes = {name: counts[label] for label, name in enumerate(source.label_names)}
    usable = sum(finding.error is None for finding in findings if finding.split == split)
    return SplitReport(len(source), usable, classes)


def _image_record(findings: Sequence[_Finding]) -> dict[str, Any]:
    facts = [finding.facts for finding in findings if finding.facts is not None]
    traits = {
        "animated (first frame counts)": sum(fact.animated for fact in facts),
        "with transparency (composited on white)": sum(fact.transparent for fact in facts),
        "turned upright by EXIF": sum(fact.orientation != 1 for fact in facts),
        "with an ICC profile (ignored)": sum(fact.icc_profile for fact in facts),
        _BLACK: sum(finding.brightest <= _NEARLY_BLACK for finding in findings if finding.error is None),
    }
    return {
        "formats": dict(Counter(fact.format for fact in facts).most_common()),
        "modes": dict(Counter(fact.mode for fact in facts).most_common()),
        "bits": dict(Counter(str(fact.bits) for fact in facts).most_common()),
        "traits": {name: count for name, count in traits.items() if count},
    }


def _sizes(good: Sequence[_Finding]) -> dict[str, Any]:
    sizes = np.array([finding.size for finding in good], dtype=np.int64).reshape(-1, 2)
    shorter = sizes.min(axis=1) if len(sizes) else sizes[:, 0]
    values = {"width": sizes[:, 0], "height": sizes[:, 1], "shorter_side": shorter}

    def quantiles(numbers: np.ndarray) -> dict[str, int]:
        if not len(numbers):
            return {}
        return {name: int(np.quantile(numbers, q, method="nearest")) for name, q in _QUANTILES.items()}

    edges = (0, *_SIDES, np.iinfo(np.int64).max)
    counts = np.histogram(shorter, bins=edges)[0]
    spans = [f"< {_SIDES[0]}", *(f"{a}-{b - 1}" for a, b in pairwise(_SIDES)), f">= {_SIDES[-1]}"]
    histogram = {span: int(count) for span, count in zip(spans, counts, strict=True) if count}
    return {**{name: quantiles(numbers) for name, numbers in values.items()}, "shorter_side_histogram": histogram}


def _exact_duplicates(good: Sequence[_Finding]) -> Duplicates:
    by_digest = defaultdict(list)
    for finding in good:
        by_digest[finding.digest].append(finding)
    groups = [group for group in by_digest.values() if len(group) > 1]
    mixed = [group for group in groups if len({finding.split for finding in group}) > 1]
    twins = sum(finding.split == "validation" for group in mixed for finding in group)
    return _duplicates(groups, twins)


def _near_duplicates(good: Sequence[_Finding], limit: int) -> Duplicates:
    """Group near duplicates; of byte-identical images only the first is compared, training images before others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    distinct = {finding.digest: finding for finding in reversed(good)}
    hashed = [finding for finding in reversed(distinct.values()) if finding.hash is not None]
    pairs = near_pairs(np.array([finding.hash for finding in hashed], dtype=np.uint64), limit)
    pairs = pairs[_have_same_colors([finding.thumbnail for finding in hashed], pairs)]
    # Groups are the connected components of the pairs, so a chain of small changes is one group.
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(hashed), len(hashed)))
    members = defaultdict(list)
    component = connected_components(links, directed=False)[1] if len(hashed) else []
    for i in sorted(set(pairs.flatten().tolist())):
        members[component[i]].append(hashed[i])
    twins = {
        j if hashed[j].split == "validation" else i
        for i, j in pairs.tolist()
        if {hashed[i].split, hashed[j].split} == {"train", "validation"}
    }
    return _duplicates(list(members.values()), len(twins))


def _have_same_colors(thumbnails: Sequence[bytes], pairs: np.ndarray) -> np.ndarray:
    """Test if the thumbnails of each pair differ by at most `_SAME_COLORS` levels on average, (pairs,) bool."""
    pixels = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(-1, 8 * 9 * 3)
    same = [np.empty(0, dtype=bool)]
    for start in range(0, len(pairs), 65_536):  # limits the memory
        one, other = (pixels[pairs[start : start + 65_536, side]].astype(np.int16) for side in (0, 1))
        same.append(np.abs(one - other).mean(axis=1) <= _SAME_COLORS)
    return np.concatenate(same)


def _duplicates(groups: Sequence[Sequence[_Finding]], across_splits: int) -> Duplicates:
    largest = sorted(groups, key=len, reverse=True)
    return Duplicates(
        groups=len(groups),
        surplus=sum(len(group) - 1 for group in groups),
        across_splits=across_splits,
        examples=[[f"{finding.split}: {finding.id}" for finding in group[:8]] for group in largest[:8]],
    )


def _run_facts(
    findings: Sequence[_Finding], *, batch_size: int, image_size: int, max_bad_share: float
) -> dict[str, Any]:
    """Predict how a training run would use the data. Bad images count in an epoch, because others replace them."""
    train = [finding for finding in findings if finding.split == "train"]
    sizes = [min(finding.size) for finding in train if finding.size is not None]
    bad = len(train) - len(sizes)
    steps = len(train) // batch_size
    allowed = max(int(max_bad_share * len(train)), 1 if max_bad_share else 0)
    if not train:
        verdict = "The data has no training split."
    elif not sizes:
        verdict = "A training run would stop, because no training image can be used."
    elif bad > allowed:
        verdict = (
            f"A training run would stop: {bad} of {len(train)} training images are bad, and {allowed} are allowed by "
            f"max_bad_share={max_bad_share:g}. Repair or remove them, or increase max_bad_share."
        )
    elif not steps:
        verdict = (
            f"A training run would not start: {len(train)} training images are fewer than one step of {batch_size}. "
            "Add images or use a smaller batch size."
        )
    else:
        verdict = f"A training run can use this data: {len(sizes)} usable images" + (f", {bad} bad." if bad else ".")
    return {
        "batch_size": batch_size,
        "steps_per_epoch": steps,
        "image_size": image_size,
        "upsampled_share": sum(side < image_size for side in sizes) / len(sizes) if sizes else 0.0,
        "max_bad_share": max_bad_share,
        "verdict": verdict,
    }
