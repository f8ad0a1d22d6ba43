"""Attention sinks: which tokens take the attention of a head, and what the head does with it.

A *sink* takes at least half of the attention of a head. A head that parks its attention on tokens with small values
does nothing ("parking place", NOP); one whose sink has ordinary values writes the same vector everywhere ("notice
board", broadcast). Artifact tokens often share a sink: no single column of the attention matrix dominates, but the
set of outliers does. So sinks are counted over sets of tokens, and the published rule for single columns is shown
beside them.

Shape letters: B images, H heads, T = prefix + N tokens, d width of a head, L blocks, S sets of tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.families import attention_output
from ..models.results import Record
from ..models.tokens import Reduction, Site, TokenReader
from .readings import blocks_of

EVENT_MASS = 0.5  # attention that makes a set a sink, and a query one that is routed to it
ROUTED_SHARE = 0.9  # share of the queries that must be routed to a column, by the published rule
NOP_RATIO, BROADCAST_RATIO, BROADCAST_RANK = 0.2, 0.5, 1.5
STRICT_EPS = (0.5, 0.3, 0.2, 0.1)  # of the published strict rule: every query gives at least 1 - eps to the column
TOP_SHARE = 0.02
HIJACKER_FACTOR = 10.0  # received attention relative to uniform attention
FIRST_BLOCK = 2  # block 1 is not counted: its attention follows pixels and positions
SETTINGS: Record = {
    "event_mass": EVENT_MASS,
    "routed_share": ROUTED_SHARE,
    "nop_ratio": NOP_RATIO,
    "broadcast": {"ratio": BROADCAST_RATIO, "stable_rank": BROADCAST_RANK},
    "value_ratio": "values before the output projection",
    "counted_blocks_from": FIRST_BLOCK,
    "top_share": TOP_SHARE,
}
_MAX_BYTES = 2**28  # of the attention of one block


def head_numbers(
    attention: Tensor, values: Tensor, factor: Tensor | None, sets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the sink numbers of each head of one block, each (B, H) float32; NaN where a set is empty.

    All tokens are queries and keys. `column` is the column with the largest mean attention, and `top` the 2 % of the
    columns with the largest mean attention. `NAME.mass` is the mean over queries of the attention to a set,
    `NAME.routed` the share of the queries that give it at least half, and `NAME.ratio` the mean norm of the values in
    the set over that of the others (for `top`, weighted by received attention). `column.least` is the smallest
    attention of a query to the column. `rank` is the stable rank of the update A V W: 1 if every token receives the
    same direction.

    Args:
        attention: (B, H, T, T), whose rows sum to 1.
        values: (B, H, T, d) values before the output projection.
        factor: (H, d, d) matrices with the same Gram matrix as the output projection of a head, see `output_factor`;
            None if it is unknown, and `rank` is NaN.
        sets: (B, T) masks by name.

    Source: sinks per column after arXiv 2606.08105; the stable rank of (A V R) equals that of (A V W), because R and W
    have the same Gram matrix. Slow twin: tests/diagnosis/test_sinks.py.
    """
    attention, values = attention.float(), values.float()
    received, norms = attention.mean(dim=2), values.norm(dim=-1)  # (B, H, T)
    count = attention.shape[-1]
    top = torch.zeros_like(received)
    top.scatter_(2, received.topk(max(1, round(TOP_SHARE * count)), dim=2).indices, 1.0)
    masks = {name: mask[:, None].to(received).expand_as(received) for name, mask in sets.items()} | {"top": top}
    shares = attention @ torch.stack(list(masks.values()), dim=-1)  # (B, H, T, S)
    found: dict[str, Tensor] = {}
    for place, (name, mask) in enumerate(masks.items()):
        share, weight = shares[..., place], mask * received if name == "top" else mask
        found[f"{name}.mass"] = share.mean(dim=2)
        found[f"{name}.routed"] = (share >= EVENT_MASS).float().mean(dim=2)
        found[f"{name}.ratio"] = _mean(norms, weight) / _mean(norms, 1 - mask)
    column = received.argmax(dim=2, keepdim=True)  # (B, H, 1)
    weights = attention.gather(3, column[:, :, None].expand(-1, -1, count, 1))[..., 0]  # (B, H, T)
    alone = torch.zeros_like(received).scatter_(2, column, 1.0)
    found["column.mass"] = received.gather(2, column)[..., 0]
    found["column.routed"] = (weights >= EVENT_MASS).float().mean(dim=2)
    found["column.least"] = weights.amin(dim=2)
    found["column.ratio"] = _mean(norms, alone) / _mean(norms, 1 - alone)
    found["rank"] = torch.full_like(received[..., 0], torch.nan)
    if factor is not None:
        update = (attention @ (values @ factor.mT)).double()  # (B, H, T, d)
        eigenvalues = torch.linalg.eigvalsh(update.mT @ update).clamp(min=0)  # (B, H, d)
        largest = eigenvalues[..., -1]
        rank = eigenvalues.sum(dim=-1) / largest.clamp(min=1e-300)
        found["rank"] = torch.where(largest > 0, rank, 1.0).float()
    return found


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean over the last axis; NaN if all weights are zero."""
    return (values * weight).sum(dim=-1) / weight.sum(dim=-1)


def output_factor(block: nn.Module, reader: TokenReader) -> Tensor | None:
    """Return (H, d, d) triangular factors of the output projection of a block; None if it is not known."""
    weight, heads = attention_output(block, reader.family), reader.description.num_heads
    if weight is None or weight.shape[1] % heads:
        return None
    return torch.linalg.qr(weight.unflatten(1, (heads, -1)).permute(1, 0, 2).double()).R.float()  # (H, d, d)


class SinkReader:
    """Sink numbers of all blocks, reduced during the forward pass: the attention of one block is in memory at a time.

    Attributes:
        sets: (n, T) masks of tokens by name: "outliers", "registers" and "cls", as far as they exist.
        numbers: (n, L, H) of each number of `head_numbers`.
        received: (n, N) attention that a patch receives in the last quarter of the blocks, relative to uniform.

    Args:
        reader: Reader of the model.
        ids: Names of the n images, for error messages.
        num_patches: Number of patches N.
        outliers: (n, N) mask of the outlier patches; None if there is no distinct population.
    """

    def __init__(
        self, reader: TokenReader, ids: Sequence[str], num_patches: int, outliers: NDArray[np.bool_] | None
    ) -> None:
        self.reader, self.ids, d = reader, list(ids), reader.description
        self.num_tokens = d.num_prefix_tokens + num_patches
        place = torch.arange(self.num_tokens).expand(len(ids), -1)
        is_patch = place >= d.num_prefix_tokens
        self.sets: dict[str, Tensor] = {}
        if outliers is not None:
            self.sets["outliers"] = is_patch.clone()
            self.sets["outliers"][is_patch] = torch.from_numpy(outliers).flatten()
        if d.num_register_tokens:
            self.sets["registers"] = ~is_patch & (place >= d.num_prefix_tokens - d.num_register_tokens)
        if d.has_cls:
            self.sets["cls"] = place == 0
        self.factors = [output_factor(block, reader) for block in blocks_of(reader)]
        self.numbers: dict[str, Tensor] = {}
        self.received = torch.zeros(len(ids), num_patches)
        self._values: Tensor | None = None  # of the current block

    @property
    def max_batch(self) -> int:
        """Largest number of images per forward pass for which the attention of one block needs at most 256 MiB."""
        return max(1, _MAX_BYTES // (4 * self.reader.description.num_heads * self.num_tokens**2))

    def reductions(self, start: int) -> dict[Site, Reduction]:
        """Return what to do with the values and the attention of the batch that begins with image `start`."""

        def hold(values: Tensor, layer: int) -> Tensor:
            self._values = values  # the values of a block are read before its attention
            return values.new_empty(0)

        def reduce(attention: Tensor, layer: int) -> Tensor:
            self._add(attention, layer, start)
            return attention.new_empty(0)

        return {"v": hold, "attention": reduce}

    def _add(self, attention: Tensor, layer: int, start: int) -> None:
        assert self._values is not None
        heads, num_layers = attention.shape[1], self.reader.description.num_layers
        known = [factor.shape[-1] for factor in self.factors if factor is not None]
        width = known[0] if known else self._values.shape[-1] // heads
        values = self._values.unflatten(-1, (-1, width)).transpose(1, 2)  # (B, key heads, T, d)
        values = values.repeat_interleave(heads // values.shape[1], dim=1)  # (B, H, T, d)
        rows, factor = slice(start, start + len(attention)), self.factors[layer - 1]
        finite = (attention.float().sum(dim=(2, 3)) + values.float().sum(dim=(2, 3))).isfinite()  # (B, H)
        if not finite.all():
            image, head = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"Image '{self.ids[start + image]}' has NaN or infinite attention or values at block {layer}, head "
                f"{head} (counted from 0). Check the weights and the pixels."
            )
        sets = {name: mask[rows].to(attention.device) for name, mask in self.sets.items()}
        factor = None if factor is None else factor.to(attention.device)
        for name, value in head_numbers(attention, values, factor, sets).items():
            shape = (len(self.ids), num_layers, heads)
            self.numbers.setdefault(name, torch.full(shape, torch.nan))[rows, layer - 1] = value.cpu()
        if layer > num_layers - last_quarter(num_layers):
            received = attention.float().mean(dim=(1, 2)) * self.num_tokens / last_quarter(num_layers)
            self.received[rows] += received[:, -self.received.shape[1] :].cpu()


def last_quarter(num_layers: int) -> int:
    """Return the number of blocks in the last quarter of a model, at least 1."""
    return -(-num_layers // 4)


# --- Report ---


def sink_events(numbers: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return (n, L, H) masks of the sink events of a set, and of their classes "nop", "broadcast" and "mixed".

    The event of "column" is the published rule: at least 90 % of the queries give it half of their attention.
    """
    ratio, rank = numbers[f"{name}.ratio"], numbers["rank"]
    event = numbers["column.routed"] >= ROUTED_SHARE if name == "column" else numbers[f"{name}.mass"] >= EVENT_MASS
    nop = event & (ratio <= NOP_RATIO)
    broadcast = event & (ratio >= BROADCAST_RATIO) & (rank <= BROADCAST_RANK)
    return {"events": event, "nop": nop, "broadcast": broadcast, "mixed": event & ~nop & ~broadcast}


def sink_record(numbers: Mapping[str, Tensor]) -> Record:
    """Return means over images (L, H) for a report, and the number of events per image from block 2 on.

    In images without a member of a set, its mass counts as 0, and its value ratio is not counted.
    """
    sets = {}
    for name in ("outliers", "registers", "cls", "top", "column"):
        if f"{name}.mass" not in numbers:
            continue
        events = sink_events(numbers, name)
        sets[name] = {
            "mass": rounded(numbers[f"{name}.mass"].mean(dim=0)),
            "routed": rounded(numbers[f"{name}.routed"].mean(dim=0)),
            "ratio": rounded(numbers[f"{name}.ratio"].nanmean(dim=0)),
            "class": _classes(events),
            "per_image": {kind: rounded(counted(mask).mean()) for kind, mask in events.items()},
        }
    for name in sets.keys() - {"column"}:
        routed = numbers[f"{name}.routed"] >= ROUTED_SHARE
        sets[name]["per_image"]["routed"] = rounded(counted(routed).mean())
    strict = {str(eps): rounded(counted(numbers["column.least"] >= 1 - eps).mean()) for eps in STRICT_EPS}
    sets["column"]["per_image"]["strict"] = strict
    return {
        "num_images": len(numbers["rank"]),
        "sets": sets,
        "stable_rank": rounded(numbers["rank"].nanmean(dim=0)),
        "settings": SETTINGS,
    }


def counted(events: Tensor) -> Tensor:
    """Count the events (n, L, H) of each image from block 2 on, (n,)."""
    return events[:, FIRST_BLOCK - 1 :].sum(dim=(1, 2)).float()


def image_numbers(numbers: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """Return for each set of tokens "NAME.mass" in the last quarter of the blocks and "NAME.events", each (n,)."""
    found: dict[str, NDArray[np.float64]] = {}
    for name in ("outliers", "registers", "top"):
        if (mass := numbers.get(f"{name}.mass")) is not None:
            found[f"{name}.mass"] = mass[:, -last_quarter(mass.shape[1]) :].mean(dim=(1, 2)).double().numpy()
            found[f"{name}.events"] = counted(sink_events(numbers, name)["events"]).double().numpy()
    return found


def _classes(events: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the most frequent class of each head, (L, H), "" where less than half of the images have an event."""
    kinds = torch.stack([events[kind].float().mean(dim=0) for kind in ("nop", "broadcast", "mixed")])  # (3, L, H)
    names = np.where((kinds.sum(dim=0) >= 0.5).numpy(), np.array(["N", "B", "m"])[kinds.argmax(dim=0).numpy()], "")
    return names.tolist()


def rounded(values: Tensor) -> Any:
    """Return plain values with four significant digits, None for NaN."""
    if values.ndim:
        return [rounded(part) for part in values]
    return None if values.isnan() else float(f"{values.item():.4g}")
