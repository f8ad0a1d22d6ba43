"""Names and layouts of the weights of other families, written apart from `hf_regvit.models.conversion`."""

import re

import torch

# (pattern, replacement), in this order.
RULES = [
    (r"^(vision_model|model)\.", ""),
    (r"^(encoder\.)?(layers?|blocks)\.", "layers."),
    (r"^patch_embed\.proj\.|^embeddings\.patch_(embeddings?|projection)\.(projection\.)?",
     "embeddings.patch_embeddings.projection."),
    (r"^(embeddings\.)?(class_embedding|cls_token)$", "embeddings.cls_token"),
    (r"^(reg_token)$", "embeddings.register_tokens"),
    (r"^pos_embed$|^embeddings\.position_embedding(\.weight)?$", "embeddings.position_embeddings"),
    (r"^(pre_layrnorm|norm_pre)\.", "embeddings.layernorm."),
    (r"^(post_layernorm|norm|fc_norm)\.", "layernorm."),
    (r"^(visual_projection)\.", "projection."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(attn|self_attn)\.", ".attention."),
    (r"\.attention\.(proj|out_proj)\.", ".attention.o_proj."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),  # older transformers
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.attention\.q_bias$", ".attention.q_proj.bias"),
    (r"\.attention\.v_bias$", ".attention.v_proj.bias"),
    (r"\.(gamma_|ls)([12])(\.gamma)?$", r".layer_scale\2.lambda1"),
    (r"\.fc1_g\.", ".gate_proj."),
    (r"\.fc1_x\.", ".up_proj."),
    (r"^attn_pool\.latent$|^head\.probe$", "pooler.probe"),
    (r"^attn_pool\.(q|kv)\.", r"pooler.\1_proj."),
    (r"^attn_pool\.proj\.|^head\.attention\.out_proj\.", "pooler.o_proj."),
    (r"^head\.attention\.", "pooler."),
    (r"^(attn_pool|head)\.(layernorm|norm)\.", "pooler.norm."),
    (r"^(attn_pool|head)\.mlp\.", "pooler.mlp."),
]  # fmt: skip
LEFT_OUT = re.compile(r"inv_freq|position_ids|^head\.(weight|bias)$|^input_conditioner|^summary_idxs")


def rotary_order(head_dim: int, axes: str) -> list[int]:
    """Channel of an interleaved source for each channel of a head: `[row | column | row | column]` bands."""
    half, quarter = head_dim // 2, head_dim // 4
    pairs = list(range(half))
    if axes == "xy":
        pairs = pairs[quarter:] + pairs[:quarter]
    return [2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs]


def translate(state: dict[str, torch.Tensor], config, *, axes: str | None = None) -> dict[str, torch.Tensor]:
    """Weights, or gradients, of another family under the names of RegViT.

    `axes` is the order "ij" or "xy" of the rotary bands of a source with interleaved channel pairs, or None.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    named = {}
    for name, tensor in state.items():
        if not LEFT_OUT.search(name):
            for pattern, replacement in RULES:
                name = re.sub(pattern, replacement, name)
            named[name] = tensor
    for block in range(config.num_hidden_layers):
        attention, mlp = f"layers.{block}.attention", f"layers.{block}.mlp"
        for kind in ("weight", "bias"):
            parts = [named.pop(f"{attention}.{part}_proj.{kind}", None) for part in "qkv"]
            if parts[0] is not None:
                parts = [torch.zeros(width) if part is None else part for part in parts]
                named[f"{attention}.qkv.{kind}"] = torch.cat(parts)
            if axes is not None and f"{attention}.qkv.{kind}" in named:
                whole = named[f"{attention}.qkv.{kind}"].unflatten(0, (3, heads, -1)).clone()
                whole[:2] = whole[:2, :, rotary_order(config.head_dim, axes)]
                named[f"{attention}.qkv.{kind}"] = whole.flatten(0, 2)
            if config.use_swiglu_ffn:
                gate_and_up = [named.pop(f"{mlp}.{part}_proj.{kind}", None) for part in ("gate", "up")]
                packed = gate_and_up[0] is None  # in one layer, the gate first
                named[f"{mlp}.gate_up_proj.{kind}"] = (
                    named.pop(f"{mlp}.fc1.{kind}") if packed else torch.cat(gate_and_up)
                )
                named[f"{mlp}.down_proj.{kind}"] = named.pop(f"{mlp}.fc2.{kind}", named.get(f"{mlp}.down_proj.{kind}"))
            elif f"{mlp}.up_proj.{kind}" in named:
                named[f"{mlp}.fc1.{kind}"] = named.pop(f"{mlp}.up_proj.{kind}")
                named[f"{mlp}.fc2.{kind}"] = named.pop(f"{mlp}.down_proj.{kind}")
    for kind in ("weight", "bias"):
        if f"pooler.in_proj_{kind}" in named:
            query, key_value = named.pop(f"pooler.in_proj_{kind}").split([width, 2 * width])
            named[f"pooler.q_proj.{kind}"], named[f"pooler.kv_proj.{kind}"] = query, key_value
    return {name: tensor for name, tensor in _shaped(named, config).items() if tensor is not None}


def _shaped(named: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor | None]:
    """The tokens and tables in the shapes of RegViT, with the positions of registers folded into them."""
    projection = "embeddings.patch_embeddings.projection"
    named.setdefault(f"{projection}.bias", torch.zeros(config.hidden_size))
    named[f"{projection}.weight"] = named[f"{projection}.weight"].reshape(
        config.hidden_size, config.num_channels, *config.patch_shape
    )
    if "embeddings.cls_register_token" in named:  # RADIO
        named["embeddings.cls_token"] = named.pop("embeddings.cls_register_token")
    if "embeddings.mask_token" in named:
        mask = named.pop("embeddings.mask_token").reshape(1, -1)
        named["embeddings.mask_token"] = mask if config.use_mask_token else None
    table = named.get("embeddings.position_embeddings")
    prefix = [named.get(f"embeddings.{kind}") for kind in ("cls_token", "register_tokens")]
    prefix = [token.reshape(-1, config.hidden_size) for token in prefix if token is not None and token.numel()]
    tokens = torch.cat(prefix) if prefix else torch.zeros(0, config.hidden_size)
    if table is not None:
        table = table.reshape(-1, config.hidden_size)
        rows = len(table) - config.grid[0] * config.grid[1]
        folded = rows if config.no_embed_class or not config.use_cls_token else 0
        if rows > 1:
            tokens = tokens + torch.cat([table[:1] * (folded > 0), table[1:rows]])
            table = torch.cat([table[: 1 - (folded > 0)], table[rows:]])
        elif folded:
            tokens = tokens + table[:1]
            table = table[1:]
        named["embeddings.position_embeddings"] = table[None]
    first = int(config.use_cls_token)
    named["embeddings.cls_token"] = tokens[None, :1] if first else None
    named["embeddings.register_tokens"] = tokens[None, first:] if len(tokens) > first else None
    return named
