"""Place the tensors of other projects in the tensors of RegViT, and take them out again.

Every tensor of a source becomes one or more pieces: rows that are renamed, joined with others (query, key and value
are one tensor in RegViT), and reordered for the rotation. Each step can be reversed without a rounding error.

Shapes: D width, R registers, N patches.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .source_families import ConversionError

PROJECTION = "embeddings.patch_embeddings.projection.weight"
TOKENS = {
    "embeddings.cls_token": 3, "embeddings.register_tokens": 3, "embeddings.position_embeddings": 3,
    "embeddings.mask_token": 2, "pooler.probe": 3,
}  # fmt: skip

# (pattern, replacement), applied to every name in this order. The spellings are those of transformers (CLIP, SigLIP,
# both generations of ViT and DINO), OpenCLIP, timm, and the official DINO, DINOv2 and DINOv3.
_NAMES = [
    (r"^(?:embeddings\.)?class_embedding$", "embeddings.cls_token"),
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^(?:reg_token|register_tokens|storage_tokens)$", "embeddings.register_tokens"),
    (r"^(?:embeddings\.position_embedding\.weight|positional_embedding|pos_embed)$", "embeddings.position_embeddings"),
    (r"^(?:embeddings\.patch_embeddings?|conv1|patch_embed\.proj)\.(weight|bias)$", rf"{PROJECTION[:-7]}.\1"),
    (r"^(?:pre_layrnorm|ln_pre|norm_pre)\.", "embeddings.layernorm."),
    (r"^(?:post_layernorm|ln_post|norm|fc_norm)\.", "layernorm."),
    (r"^(?:visual_projection\.weight|proj)$", "projection.weight"),
    (r"^(?:head\.probe|attn_pool\.latent)$", "pooler.probe"),
    (r"^head\.attention\.in_proj_", "pooler.in_proj."),
    (r"^(?:head\.attention\.out_proj|attn_pool\.proj)\.", "pooler.o_proj."),
    (r"^head\.layernorm\.", "pooler.norm."),
    (r"^attn_pool\.(q|kv)\.", r"pooler.\1_proj."),
    (r"^(?:head(?=\.mlp\.)|attn_pool)\.", "pooler."),
    (r"^(?:head|linear_head)\.", "classifier."),
    (r"^(?:encoder\.layers?|(?:model\.)?layer|transformer\.resblocks)\.(\d+)\.", r"layers.\1."),
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"layers.\1."),  # `block_chunks` nests the blocks without renumbering them
    (r"\.(?:layer_norm|ln_)([12])\.", r".norm\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(?:ls_?([12])\.gamma|gamma_([12]))$", r".layer_scale\1\2.lambda1"),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.(?:self_attn\.out_proj|attn\.(?:out_)?proj|attention\.output\.dense)\.", ".attention.o_proj."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attention.qkv.\1"),
    (r"\.attn\.([qv])_bias$", r".attention.\1.bias"),
    (r"\.(?:self_attn|attn)\.", ".attention."),
    (r"\.attention\.(?:query|q_proj)\.", ".attention.q."),
    (r"\.attention\.(?:key|k_proj)\.", ".attention.k."),
    (r"\.attention\.(?:value|v_proj)\.", ".attention.v."),
    (r"\.(?:mlp\.c_fc|intermediate\.dense)\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.|(?<=\d)\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.(?:w12|weights_in)\.", ".mlp.gate_up_proj."),
    (r"\.mlp\.(?:w1|fc1_g|gate_proj)\.", ".mlp.gate."),
    (r"\.mlp\.(?:w2|fc1_x|up_proj)\.", ".mlp.up."),
    (r"\.mlp\.(?:w3|weights_out)\.", ".mlp.down_proj."),
]
# Tensors without which the outputs are the same: tables that the code computes, and heads of pretraining.
_WITHOUT_USE = re.compile(
    r"rope_embed(dings)?\.|embeddings\.position_ids$|.*\.bias_mask$|local_cls_norm\.|decoder|projectors?\.\d|"
    r"(head|fc)\.(\d+|mlp\.\d+|last_layer)\.|(dino|ibot)_head\.|logit_(scale|bias)$"
)
# Joined tensors of RegViT, and the parts of them that other projects store apart.
_PARTS = {
    ".attention.q.": (".attention.qkv.", 0, 3), ".attention.k.": (".attention.qkv.", 1, 3),
    ".attention.v.": (".attention.qkv.", 2, 3), ".mlp.gate.": (".mlp.gate_up_proj.", 0, 2),
    ".mlp.up.": (".mlp.gate_up_proj.", 1, 2),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a tensor of the source, and their place in a tensor of RegViT.

    Args:
        source: Name of the tensor in the source.
        target: Name of the tensor in RegViT.
        place: Index of this piece among the `count` equal parts of the target, or its order if their sizes differ.
        count: Number of equal parts of the target; parts without a piece are 0. 0 if their sizes differ.
        start: First row of the source tensor.
        stop: Row after the last one; None is the end.
        order: Order of the rows in the target.
        added: Constant rows that are added to the rows of the source.
        is_transposed: True if the source stores the transposed matrix.
    """

    source: str
    target: str
    place: int = 0
    count: int = 1
    start: int = 0
    stop: int | None = None
    order: Tensor | None = field(default=None, repr=False)
    added: Tensor | None = field(default=None, repr=False)
    is_transposed: bool = False

    def rows_of(self, tensor: Tensor, width: int) -> Tensor:
        """Return a view of these rows of the source tensor, in the order of the source."""
        if self.target in TOKENS:
            tensor = tensor.reshape(-1, width)
        elif self.target == PROJECTION:
            tensor = tensor.reshape(width, -1)
        elif self.is_transposed:
            tensor = tensor.t()
        return tensor[self.start : self.stop]

    def read(self, tensor: Tensor, width: int) -> Tensor:
        """Return the rows as they are in RegViT."""
        rows = self.rows_of(tensor, width)
        rows = rows if self.order is None else rows[self.order.to(rows.device)]
        return rows if self.added is None else rows + self.added

    def write(self, rows: Tensor, tensor: Tensor, width: int) -> None:
        """Write rows of RegViT into a contiguous tensor of the source; the reverse of `read`."""
        rows = rows.reshape(len(rows), -1).to(tensor.device)
        rows = rows if self.added is None else rows - self.added
        own = self.rows_of(tensor, width)
        order = torch.arange(len(rows)) if self.order is None else self.order
        own[order] = rows.reshape(own.shape).to(own.dtype)


def target_names(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the RegViT names of the tensors of a source, without those that RegViT does not need."""
    targets: dict[str, str] = {}
    for name in names:
        if _WITHOUT_USE.match(name) or not names[name].numel():
            continue
        targets[name] = name
        for pattern, replacement in _NAMES:
            targets[name] = re.sub(pattern, replacement, targets[name])
    shapes = {target: names[name].shape for name, target in targets.items()}
    for name, target in targets.items():
        mlp = target.partition(".mlp.")[0] + ".mlp."
        first, last = (shapes.get(f"{mlp}{layer}.weight") for layer in ("fc1", "fc2"))
        if f"{mlp}gate.weight" in shapes or f"{mlp}gate_up_proj.weight" in shapes:
            target = target.replace(".mlp.fc2.", ".mlp.down_proj.")
        elif first and last and first[0] == 2 * last[1]:  # timm stores both parts of a SwiGLU in fc1
            target = target.replace(".mlp.fc1.", ".mlp.gate_up_proj.").replace(".mlp.fc2.", ".mlp.down_proj.")
        else:  # DINOv3 has these names without a gate, too
            target = target.replace(".mlp.up.", ".mlp.fc1.").replace(".mlp.down_proj.", ".mlp.fc2.")
        targets[name] = target
    return targets


def find_pieces(tensors: Mapping[str, Tensor], width: int, *, masked_key_bias: bool) -> list[Piece]:
    """Return the pieces of all tensors of a source.

    Args:
        tensors: Tensors of the source by their names without a prefix.
        width: D.
        masked_key_bias: True if the source ignores the part of the keys in its joined biases.
    """
    pieces = []
    for name, target in target_names(tensors).items():
        piece = Piece(name, target)
        if target == "embeddings.mask_token" and tensors[name].numel() != width:
            continue  # of the decoder of MAE
        part = next((part for part in _PARTS if part in target), None)
        if part is not None:
            whole, place, count = _PARTS[part]
            pieces.append(replace(piece, target=target.replace(part, whole), place=place, count=count))
        elif masked_key_bias and target.endswith(".attention.qkv.bias"):
            pieces.append(replace(piece, place=0, count=3, stop=width))
            pieces.append(replace(piece, place=2, count=3, start=2 * width))
        elif target.startswith("pooler.in_proj."):
            kind = target.rpartition(".")[2]
            pieces.append(replace(piece, target=f"pooler.q_proj.{kind}", stop=width))
            pieces.append(replace(piece, target=f"pooler.kv_proj.{kind}", start=width))
        else:
            pieces.append(replace(piece, is_transposed=name == "proj"))
    return pieces


def _parts_of(
    target: str, pieces: list[Piece], tensors: Mapping[str, Tensor], width: int
) -> list[tuple[Piece | None, int]]:
    """Return the pieces of one target in their order, with their numbers of rows; None is a part that is 0."""
    found = {piece.place: piece for piece in pieces if piece.target == target}
    lengths = {place: len(piece.rows_of(tensors[piece.source], width)) for place, piece in found.items()}
    count = next(iter(found.values())).count or len(found)
    return [(found.get(place), lengths.get(place, max(lengths.values()))) for place in range(count)]


def put_together(pieces: list[Piece], tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return the tensors of RegViT."""
    joined: dict[str, Tensor] = {}
    for target in dict.fromkeys(piece.target for piece in pieces):
        parts = [
            None if piece is None else piece.read(tensors[piece.source], width)
            for piece, _ in _parts_of(target, pieces, tensors, width)
        ]
        like = next(part for part in parts if part is not None)
        whole = torch.cat([torch.zeros_like(like) if part is None else part for part in parts])
        if target in TOKENS:
            whole = whole.reshape(*[1] * (TOKENS[target] - 2), -1, width)
        elif target == PROJECTION:
            source = tensors[next(piece.source for piece in pieces if piece.target == target)]
            whole = whole.reshape(source.shape if source.ndim == 4 else whole.shape)
        joined[target] = whole
    return joined


def take_apart(
    pieces: list[Piece], tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor], width: int
) -> dict[str, Tensor]:
    """Return the tensors of the source with the values of RegViT; equal values keep the bits of the source.

    Args:
        pieces: Pieces of the source.
        tensors: Tensors of the source.
        ours: Tensors of RegViT; those that it lacks keep the values of the source.
        width: D.
    """
    before = put_together(pieces, tensors, width)
    result = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    for target, old in before.items():
        new = ours.get(target)
        if new is None or (new.dtype == old.dtype and torch.equal(new.to(old.device), old)):
            continue
        rows = new.detach().reshape(-1, width) if target in TOKENS else new.detach()
        start = 0
        for piece, length in _parts_of(target, pieces, tensors, width):
            if piece is not None:
                piece.write(rows[start : start + length], result[piece.source], width)
            elif rows[start : start + length].any():
                raise ConversionError(
                    f"A part of {target} was trained, for which the source has no place: it is 0 there."
                )
            start += length
    return result
