"""Test-time registers beside the published code, on tiny DINOv2 and OpenCLIP towers (golden files `ttr/`)."""

import pytest
import torch
from torch import nn

from helpers import assert_golden, load_golden, requires_shared, subtree
from hf_regvit import RegViTConfig, RegViTModel, convert
from hf_regvit.diagnosis.register_neurons import RegisterNeurons, add_test_time_registers, score_neurons
from hf_regvit.models.tokens import TokenReader

pytestmark = requires_shared
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # the golden files' own


def dinov2_tower(tensors: dict, config: dict) -> RegViTModel:
    fields = {"num_attention_heads": config["model"]["num_heads"], "layer_norm_eps": 1e-6}
    fields |= {"interpolate_antialias": False, "interpolate_offset": 0.1}
    return convert(subtree(tensors, "sd."), verify=False, **fields)


def clip_tower(tensors: dict, config: dict) -> RegViTModel:
    size, sd = config["model"], subtree(tensors, "sd.")
    model = RegViTModel(
        RegViTConfig(
            num_register_tokens=0,
            image_size=size["image_size"],
            patch_size=size["patch_size"],
            hidden_size=size["width"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
            layerscale_value=None,
        )
    )
    names = {
        "ln_1": "norm1", "ln_2": "norm2", "attn.in_proj_": "attention.qkv.", "attn.out_proj": "attention.o_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    state = {
        "embeddings.cls_token": sd["class_embedding"].view(1, 1, -1),
        "embeddings.position_embeddings": sd["positional_embedding"][None],
        "embeddings.patch_embeddings.projection.weight": sd["conv1.weight"],
        "embeddings.patch_embeddings.projection.bias": torch.zeros(size["width"]),
        "layernorm.weight": sd["ln_post.weight"],
        "layernorm.bias": sd["ln_post.bias"],
    }
    for key, value in subtree(sd, "transformer.resblocks.").items():
        if key[0].isdigit():
            for old, new in names.items():
                key = key.replace(f".{old}", f".{new}")
            state[f"layers.{key}"] = value
    model.load_state_dict(state)
    return model.eval()


def with_clip_norm(model: RegViTModel, tensors: dict) -> RegViTModel:
    """Normalize the tokens before the first block, registers included, as OpenCLIP does and RegViT does not."""
    norm = nn.LayerNorm(model.config.hidden_size, eps=1e-5)
    norm.load_state_dict(subtree(tensors, "sd.ln_pre."))
    model.embeddings.ln_pre = norm
    model.embeddings.register_forward_hook(lambda module, args, output: module.ln_pre(output))
    return model


TOWERS = {
    "dinov2": dinov2_tower,
    "clip": lambda tensors, config: with_clip_norm(clip_tower(tensors, config), tensors),
}
# Arguments of the published search: whether a neuron has to be quiet elsewhere, and how.
QUIET = {"plain": (0.0, 0.0), "sparse": (0.5, 0.5), "last_layer_strict": (0.9, 0.25)}


@pytest.mark.parametrize("tower", TOWERS)
def test_the_search_gives_the_published_scores_and_order(tower):
    tensors, config = load_golden(f"ttr/{tower}_search.safetensors")
    model = TOWERS[tower](tensors, config)
    # As `prepare_images` hands them out, in batches of three
    batches = enumerate(tensors["in.images"].split(3))
    images = [([str(3 * number + i) for i in range(len(batch))], batch) for number, batch in batches]
    read = TokenReader(model).read_many(tensors["in.images"], {"residual": "all", "mlp": "all"})
    norms = torch.stack([values.norm(dim=-1) for values in read["residual"].values[1:]], dim=1)  # (n, L, T)
    assert_golden(norms, tensors["out.layer_norms"], **TOLERANCE)
    activations = torch.stack([values[0] for values in read["mlp"].values])  # (L, T, H) of the first image
    assert_golden(activations, tensors["out.image0.neuron_activations"], **TOLERANCE)
    for tag, search in config["searches"].items():
        block = search["detect_outliers_layer"]
        is_outlier = norms[:, block, 1:] > search["register_norm_threshold"]  # CLS is none in these files
        assert is_outlier.sum(1).tolist() == config["outliers_per_image"]
        share, below = QUIET[tag]
        scores = score_neurons(TokenReader(model), images, is_outlier.numpy(), quiet_share=share, quiet_below=below)
        assert_golden(scores.float(), tensors[f"out.search.{tag}.scores"], **TOLERANCE)
        top = tensors[f"out.search.{tag}.top"].tolist()
        found = RegisterNeurons(scores, layer=0, cutoff=0.0, emergence=0, outlier_share=0.0, num_images=6)
        assert found.best(len(top), highest_block=len(scores) - 1) == top


def retrofitted(tower: str, variant: str) -> tuple[RegViTModel, dict]:
    tensors, config = load_golden(f"ttr/{tower}_intervene.safetensors", double=True)
    settings = config["variants"][variant]
    pairs = [[int(block), neuron] for block, found in settings["neurons"].items() for neuron in found]
    plain = (dinov2_tower if tower == "dinov2" else clip_tower)(tensors, config)
    model = plain
    if settings["num_registers"]:
        model = add_test_time_registers(plain, pairs, num_register_tokens=settings["num_registers"])
    return (with_clip_norm(model, tensors) if tower == "clip" else model), tensors


@pytest.mark.parametrize("variant", ["baseline", "register_only", "single_neuron_1", "per_neuron_zero_1"])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_forward_pass_gives_the_published_tokens(tower, variant):
    """The published order is [CLS | patches | registers]; nothing but the order differs."""
    model, tensors = retrofitted(tower, variant)
    with torch.no_grad():
        hidden_states = model.double()(tensors["in.image"], output_hidden_states=True).hidden_states
    raw = [torch.cat([state[:1, :1], *model.split_tokens(state[:1])[:0:-1]], dim=1) for state in hidden_states]
    name = "x_prenorm" if tower == "dinov2" else "tokens"
    assert_golden(raw[-1], tensors[f"out.{variant}.{name}"], **TOLERANCE)
    norms = torch.stack([state[0].norm(dim=-1) for state in raw[1:]])  # (L, T)
    assert_golden(norms, tensors[f"out.{variant}.layer_norms"], **TOLERANCE)
    with torch.no_grad():
        if tower == "dinov2":
            assert_golden(model.layernorm(raw[-1]), tensors[f"out.{variant}.x_norm"], **TOLERANCE)
        else:
            embedding = model.layernorm(raw[-1][:, 0]) @ tensors["sd.proj"].double()
            assert_golden(embedding, tensors[f"out.{variant}.embedding"], **TOLERANCE)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_image_of_a_batch_is_treated_as_it_would_be_alone(tower):
    """The published code changes the first image only."""
    model, tensors = retrofitted(tower, "per_neuron_zero_1")
    images = tensors["in.image"]
    with torch.no_grad():
        together = model(images).last_hidden_state
        alone = torch.cat([model(image[None]).last_hidden_state for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        other = retrofitted(tower, "register_only")[0](images).last_hidden_state
    assert (together - other).abs().amax(dim=(1, 2)).min() > 1e-3
