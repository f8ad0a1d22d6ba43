"""Test both forms of stochastic depth: exact scaling, exact expectation, independent draws, padded batches."""

import itertools
from unittest.mock import Mock

import pytest
import torch

from builders import gradients_of, padded, tiny_model
from hf_regvit import RegViTModel

MODES = ("sample", "batch_subset")


def tiny(**fields) -> RegViTModel:
    """Create a model with large branches: LayerScale 0.5 and wide weights."""
    wide = {"image_size": 16, "hidden_size": 16, "layerscale_value": 0.5, "initializer_range": 0.3}
    return tiny_model(**wide | {"num_register_tokens": 2} | fields).train()


def one_branch(branch: str, **fields) -> torch.nn.Module:
    """Create a block in which only the attention or only the MLP contributes."""
    layer = tiny(**fields).layers[0].train()
    silent = layer.layer_scale2 if branch == "attention" else layer.layer_scale1
    torch.nn.init.zeros_(silent.lambda1)
    return layer


def full_residual(layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    layer.eval()
    residual = layer(tokens)[0] - tokens
    layer.train()
    return residual


# Rate, samples, samples whose branch is computed, scale of the residual.
@pytest.mark.parametrize(
    ("rate", "batch_size", "kept", "scale"),
    [
        (0.3, 128, 89, 1.438), (0.3, 512, 358, 1.430), (0.4, 64, 38, 1.684), (0.4, 256, 153, 1.673),
        (0.4, 24, 14, 1.714), (0.4, 2, 1, 2.0), (0.4, 1, 1, 1.0), (0.99, 10, 1, 10.0), (0.4, 5, 3, 1.667),
    ],
)  # fmt: skip
@pytest.mark.parametrize("branch", ["attention", "mlp"])
@torch.no_grad()
def test_batch_subset_keeps_this_many_and_scales_by_their_share(branch, rate, batch_size, kept, scale):
    layer = one_branch(branch, drop_path_rate=rate, drop_path_mode="batch_subset").double()
    tokens = torch.randn(batch_size, 3, 16, dtype=torch.float64)
    computed = []
    layer.norm1.register_forward_hook(lambda module, args, output: computed.append(len(args[0])))
    layer.norm2.register_forward_hook(lambda module, args, output: computed.append(len(args[0])))
    residual = layer(tokens)[0] - tokens
    assert computed == [kept, kept]  # the other samples are not computed
    changed = residual.flatten(1).abs().amax(1) > 0
    assert changed.sum() == kept
    assert round(batch_size / kept, 3) == scale
    expected = full_residual(layer, tokens) * (batch_size / kept)
    torch.testing.assert_close(residual[changed], expected[changed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
@torch.no_grad()
def test_sample_mode_drops_whole_samples_and_scales_the_others(branch):
    layer = one_branch(branch, drop_path_rate=0.25)
    tokens = torch.randn(64, 3, 16)
    residual = layer(tokens)[0] - tokens
    changed = residual.flatten(1).abs().amax(1) > 0
    assert 0 < changed.sum() < 64
    expected = full_residual(layer, tokens) / 0.75
    torch.testing.assert_close(residual[changed], expected[changed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
@torch.no_grad()
def test_batch_subset_expects_the_full_residual(branch, monkeypatch):
    """Compute the exact expectation as the mean over all 24 permutations of four samples."""
    layer = one_branch(branch, drop_path_rate=0.5, drop_path_mode="batch_subset")
    tokens = torch.randn(4, 3, 16)
    total = torch.zeros_like(tokens)
    for permutation in itertools.permutations(range(4)):
        monkeypatch.setattr(torch, "randperm", lambda size, order=permutation, **_: torch.tensor(order))
        total += layer(tokens)[0] - tokens
    torch.testing.assert_close(total / 24, full_residual(layer, tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sample_mode_expects_the_full_residual():
    rate, batch_size = 0.4, 4000
    layer = one_branch("mlp", drop_path_rate=rate)
    tokens = torch.randn(1, 3, 16).expand(batch_size, -1, -1).contiguous()
    torch.manual_seed(1)
    residual = layer(tokens)[0] - tokens
    kept = (residual.flatten(1).abs().amax(1) > 0).float().mean()
    deviation = (rate * (1 - rate) / batch_size) ** 0.5
    assert abs(kept - (1 - rate)) < 4 * deviation
    full = full_residual(layer, tokens[:1])[0]
    torch.testing.assert_close(residual.mean(0), full * kept / (1 - rate), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_two_branches_draw_on_their_own():
    for mode in MODES:
        layer = tiny(drop_path_rate=0.5, drop_path_mode=mode).layers[0].train()
        tokens = torch.randn(64, 3, 16)
        layer._add = Mock(wraps=layer._add)
        out = layer(tokens)[0]
        middle = [call.args[0] for call in layer._add.call_args_list]
        by_attention = (middle[1] - middle[0]).flatten(1).abs().amax(1) > 0
        by_mlp = (out - middle[1]).flatten(1).abs().amax(1) > 0
        combinations = {(bool(a), bool(m)) for a, m in zip(by_attention, by_mlp, strict=True)}
        assert len(combinations) == 4, mode


@torch.no_grad()
def test_every_block_and_branch_draws_anew(monkeypatch):
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(1) or randperm(*args, **kwargs))
    tiny(drop_path_rate=0.5, drop_path_mode="batch_subset", num_hidden_layers=3).train()(torch.randn(4, 3, 16, 16))
    assert len(drawn) == 2 * 3


def test_rates_of_the_blocks():
    uniform = tiny(drop_path_rate=0.3, num_hidden_layers=4)
    assert [layer.drop_path_rate for layer in uniform.layers] == [0.3] * 4
    rising = tiny(drop_path_rate=0.3, num_hidden_layers=4, drop_path_uniform=False)
    assert [layer.drop_path_rate for layer in rising.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert tiny(drop_path_rate=0.3, num_hidden_layers=1, drop_path_uniform=False).layers[0].drop_path_rate == 0


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_no_effect_in_eval_mode_or_at_rate_zero(mode):
    pixel_values = torch.randn(4, 3, 16, 16)
    expected = tiny().eval()(pixel_values).last_hidden_state
    at_rest = tiny(drop_path_rate=0.5, drop_path_mode=mode).eval()(pixel_values).last_hidden_state
    assert torch.equal(at_rest, expected)
    rate_zero = tiny(drop_path_rate=0.0, drop_path_mode=mode).train()(pixel_values).last_hidden_state
    assert torch.equal(rate_zero, expected)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_seed_decides(mode):
    model, pixel_values = tiny(drop_path_rate=0.5, drop_path_mode=mode).train(), torch.randn(8, 3, 16, 16)

    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(pixel_values).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# --- Padded batches --------------------------------------------------------------------------------------------------

SIZES = [(16, 16), (8, 24), (24, 16), (8, 8), (24, 24)]


def slow_twin(model: RegViTModel, pixel_values: torch.Tensor, gains: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run each image at its own size; `gains[branch][image]` scales the branch of that image, 0 drops it."""
    results = []
    for i, (height, width) in enumerate(SIZES):
        tokens = model.embeddings(pixel_values[i : i + 1, :, :height, :width])
        for depth, layer in enumerate(model.layers):
            branch = layer.attention(layer.norm1(tokens))[0] * layer.layer_scale1.lambda1
            tokens = tokens + gains[2 * depth][i] * branch
            branch = layer.mlp(layer.norm2(tokens)) * layer.layer_scale2.lambda1
            tokens = tokens + gains[2 * depth + 1][i] * branch
        results.append(tokens[0])
    return results


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_batch_subset_in_a_padded_batch(attn_implementation, monkeypatch):
    model = tiny(drop_path_rate=0.4, drop_path_mode="batch_subset").train()
    model.set_attn_implementation(attn_implementation)
    pixel_values, pixel_mask = padded(*SIZES, seed=5)
    generator = torch.Generator().manual_seed(6)
    permutations = [torch.randperm(5, generator=generator) for _ in range(4)]
    queue = iter(permutations)
    monkeypatch.setattr(torch, "randperm", lambda size, **_: next(queue))
    output = model(pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
    gains = [torch.zeros(5).index_fill(0, permutation[:3], 5 / 3) for permutation in permutations]
    real = output.patch_mask | (torch.arange(output.patch_mask.shape[1]) < 3)  # CLS, 2 registers, real patches
    for i, expected in enumerate(slow_twin(model, pixel_values, gains)):
        torch.testing.assert_close(output.hidden_states[-1][i][real[i]], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sample_mode_in_a_padded_batch(monkeypatch):
    model = tiny(drop_path_rate=0.4).train()
    pixel_values, pixel_mask = padded(*SIZES, seed=5)
    draws, bernoulli = [], torch.Tensor.bernoulli_

    def remember(tensor, keep):
        draws.append(bernoulli(tensor, keep).clone())
        return tensor

    monkeypatch.setattr(torch.Tensor, "bernoulli_", remember)
    output = model(pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
    assert len(draws) == 4
    gains = [draw.flatten() / 0.6 for draw in draws]
    real = output.patch_mask | (torch.arange(output.patch_mask.shape[1]) < 3)
    for i, expected in enumerate(slow_twin(model, pixel_values, gains)):
        torch.testing.assert_close(output.hidden_states[-1][i][real[i]], expected, atol=1e-5, rtol=1e-5)


def test_batch_subset_refuses_the_one_mask_it_cannot_select_from(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # others refuse any such mask
    model = tiny(drop_path_rate=0.4, drop_path_mode="batch_subset").train()
    model.set_attn_implementation("flex_attention")
    pixel_values, pixel_mask = padded(*SIZES, seed=5)
    # Eager, because compiling the construction of that mask takes fifteen seconds.
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotImplementedError, match=r"batch_subset.*'sample'"):
        model(pixel_values, pixel_mask=pixel_mask)


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_same_draws(mode, reentrant):
    model, pixel_values = tiny(drop_path_rate=0.5, drop_path_mode=mode).train(), torch.randn(8, 3, 16, 16)

    torch.manual_seed(3)
    plain = gradients_of(model(pixel_values).last_hidden_state.square().sum(), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(3)
    for name, gradient in gradients_of(model(pixel_values).last_hidden_state.square().sum(), model).items():
        torch.testing.assert_close(gradient, plain[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_trains(mode):
    model = tiny(drop_path_rate=0.5, drop_path_mode=mode).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(8, 3, 16, 16)).last_hidden_state
    output.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
