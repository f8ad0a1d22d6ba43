"""Attention sinks: slow twin in loops, known heads, reference numbers of the real ViT-Tiny, models of every kind."""

import math

import numpy as np
import pytest
import torch

from builders import pixels, randomized, tiny_model, tiny_source, tiny_timm
from hf_regvit.diagnosis.sinks import (
    SinkReader,
    counted,
    head_numbers,
    last_quarter,
    output_factor,
    sink_events,
    sink_record,
)
from hf_regvit.models.families import FAMILIES, attention_output, has_part
from hf_regvit.models.tokens import TokenReader


def read_sinks(model, pixel_values, outliers=None, *, batch=3):
    """Sinks of a model on these pixels."""
    reader = TokenReader(model)
    grid = reader.read(pixel_values[:1], layers=(0,)).grid
    sinks = SinkReader(reader, [f"image {i}" for i in range(len(pixel_values))], grid[0] * grid[1], outliers)
    for start in range(0, len(pixel_values), batch):
        part = pixel_values[start : start + batch]
        reader.read_many(part, {"v": "all", "attention": "all"}, reduce=sinks.reductions(start))
    return sinks


def slow_head(attention, values, weight, chosen):
    """Sink numbers of one head of one image, from T x T matrices and loops: attention (T, T), values (T, d)."""
    count = len(attention)
    lengths = [math.sqrt(sum(float(x) ** 2 for x in row)) for row in values]
    received = [sum(float(attention[i, j]) for i in range(count)) / count for j in range(count)]
    given = [sum(float(attention[i, j]) for j in range(count) if chosen[j]) for i in range(count)]
    inside = [lengths[j] for j in range(count) if chosen[j]]
    outside = [lengths[j] for j in range(count) if not chosen[j]]
    column = max(range(count), key=lambda j: received[j])
    update = attention.double() @ (values.double() @ weight.double().T)  # (T, D)
    eigenvalues = torch.linalg.eigvalsh(update @ update.T)  # T x T
    return {
        "set.mass": sum(given) / count,
        "set.routed": sum(share >= 0.5 for share in given) / count,
        "set.ratio": sum(inside) / len(inside) / (sum(outside) / len(outside)),
        "column.mass": received[column],
        "column.routed": sum(float(attention[i, column]) >= 0.5 for i in range(count)) / count,
        "column.least": min(float(attention[i, column]) for i in range(count)),
        "column.ratio": lengths[column] / ((sum(lengths) - lengths[column]) / (count - 1)),
        "rank": float(eigenvalues.sum() / eigenvalues.max()),
    }


@pytest.mark.parametrize("scale", [1.0, 6.0])  # of the attention scores: nearly uniform, and nearly one column
def test_numbers_of_a_head_equal_their_slow_twin(scale):
    model = randomized(tiny_model(num_register_tokens=2))
    reader, block = TokenReader(model), model.layers[1]
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(2, 2, 1, 19, generator=generator) + torch.randn(2, 2, 19, 19, generator=generator)
    attention, values = scores.softmax(dim=-1), torch.randn(2, 2, 19, 16, generator=generator)
    chosen = torch.rand(2, 19, generator=generator) < 0.3
    found = head_numbers(attention, values, output_factor(block, reader), {"set": chosen})
    weight = attention_output(block, reader.family)
    torch.testing.assert_close(weight, block.attention.o_proj.weight * block.layer_scale1.lambda1[:, None])
    for image, head in np.ndindex(2, 2):
        part = slice(16 * head, 16 * head + 16)
        slow = slow_head(attention[image, head], values[image, head], weight[:, part], chosen[image])
        for name, value in slow.items():
            tolerance = {"rel": 1e-4} if name == "rank" else {"abs": 1e-6}
            assert found[name][image, head].item() == pytest.approx(value, **tolerance), name
        received = attention[image, head].mean(dim=0)
        assert found["top.mass"][image, head].item() == pytest.approx(received.max().item(), abs=1e-6)  # 2 % of 19


def test_uniform_attention_to_equal_values():
    attention, values = torch.full((1, 1, 8, 8), 1 / 8), torch.ones(1, 1, 8, 4)
    chosen = torch.arange(8)[None] < 2
    found = head_numbers(attention, values, torch.eye(4)[None], {"set": chosen, "none": chosen & ~chosen})
    assert found["rank"].item() == pytest.approx(1, abs=1e-6)
    assert found["set.ratio"].item() == pytest.approx(1, abs=1e-6)
    assert found["set.mass"].item() == pytest.approx(0.25, abs=1e-6)
    assert found["none.mass"].item() == 0
    assert found["none.ratio"].isnan()
    assert head_numbers(attention, 0 * values, torch.eye(4)[None], {})["rank"].item() == 1


@pytest.mark.parametrize(
    ("ratio", "rank", "expected"), [(0.2, 3, "nop"), (0.5, 1.5, "broadcast"), (0.5, 1.6, "mixed"), (0.3, 1, "mixed")]
)
def test_classes_of_an_event(ratio, rank, expected):
    shape = (1, 3, 1)  # (n, L, H)
    numbers = {"set.mass": torch.tensor([0.9, 0.49, 0.5]).view(shape), "rank": torch.full(shape, float(rank))}
    numbers["set.ratio"] = torch.full(shape, ratio)
    events = sink_events(numbers, "set")
    assert events["events"].flatten().tolist() == [True, False, True]
    kinds = {kind: counted(mask).item() for kind, mask in events.items()}  # block 1 is not counted
    assert kinds == {"events": 1, "nop": 0, "broadcast": 0, "mixed": 0} | {expected: 1}


def test_record_counts_images_without_outliers_in_the_mass_only():
    model, images = randomized(tiny_model(num_register_tokens=2)), pixels(4, 32, 32)
    outliers = np.zeros((4, 16), dtype=bool)
    outliers[0, 3] = outliers[1, :2] = True
    sinks = read_sinks(model, images, outliers)
    record = sink_record(sinks.numbers)
    mass, ratio = sinks.numbers["outliers.mass"], sinks.numbers["outliers.ratio"]
    assert (mass[2:] == 0).all()
    assert record["sets"]["outliers"]["mass"][1][0] == pytest.approx(mass[:2, 1, 0].sum().item() / 4, rel=1e-3)
    assert record["sets"]["outliers"]["ratio"][1][0] == pytest.approx(ratio[:2, 1, 0].mean().item(), rel=1e-3)
    assert list(record["sets"]) == ["outliers", "registers", "cls", "top", "column"]
    weights = TokenReader(model).read(images, layers="all", site="attention")
    expected = torch.stack([weights.at(layer)[..., 1:3].sum(-1).mean(-1) for layer in (1, 2)], dim=1)
    torch.testing.assert_close(sinks.numbers["registers.mass"], expected, atol=1e-6, rtol=0)
    received = weights.at(2).mean(dim=(1, 2))[:, 3:] * 19  # the last quarter of two blocks is one block
    torch.testing.assert_close(sinks.received, received, atol=1e-5, rtol=0)


def test_batches_do_not_change_the_numbers():
    model, images = randomized(tiny_model()), pixels(5, 32, 32)
    one, five = (read_sinks(model, images, batch=batch).numbers for batch in (1, 5))
    for name, values in one.items():
        torch.testing.assert_close(values, five[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["q", "v"])
def test_a_head_that_is_not_finite_is_named(where):
    model = randomized(tiny_model())
    with torch.no_grad():  # the rows of the fused projection are those of q, k and v
        model.layers[1].attention.qkv.bias[{"q": 16, "v": 64 + 16}[where]] = torch.nan
    with pytest.raises(ValueError, match=r"Image 'image 0' has NaN or .* at block 2, head 1 \(counted from 0"):
        read_sinks(model, pixels(2, 32, 32))


ODD_MODELS = {
    "no CLS": lambda: tiny_source("SiglipVisionModel"),
    "distillation token": lambda: tiny_source("DeiTModel"),
    "rotary, registers": lambda: tiny_source("DINOv3ViTModel", num_register_tokens=2),
    "I-JEPA": lambda: tiny_source("IJepaModel"),
    "MAE": lambda: tiny_source("ViTMAEModel"),
    "AIMv2": lambda: tiny_source("Aimv2VisionModel"),
    "CLIP": lambda: tiny_source("CLIPVisionModel"),
    "DINOv2 with registers": lambda: tiny_source("Dinov2WithRegistersModel", num_register_tokens=3),
    "gated MLP": lambda: tiny_model(use_swiglu_ffn=True, num_register_tokens=1),
    "timm, fused qkv with norms": lambda: tiny_timm(qk_norm=True, init_values=0.1),
    "timm EVA": lambda: tiny_timm("Eva", use_rot_pos_emb=True, num_reg_tokens=1),
    "timm EVA, scaled": lambda: tiny_timm("Eva", init_values=0.1, qkv_fused=False),
}


@pytest.mark.parametrize("name", ODD_MODELS)
def test_every_kind_of_model_has_numbers(name):
    model = randomized(ODD_MODELS[name]())
    sinks = read_sinks(model, pixels(3, 32, 32))
    reader, record = TokenReader(model), sink_record(sinks.numbers)
    assert set(record["sets"]) == {"top", "column"} | ({"cls"} if reader.description.has_cls else set()) | (
        {"registers"} if reader.description.num_register_tokens else set()
    )
    weights = reader.read(pixels(3, 32, 32), layers="all", site="attention")
    for layer in weights.layers:
        largest = weights.at(layer).mean(dim=2).amax(dim=-1)
        torch.testing.assert_close(sinks.numbers["column.mass"][:, layer - 1], largest, atol=1e-6, rtol=0)
    assert sinks.numbers["rank"].isfinite().all()
    assert (sinks.numbers["rank"] >= 1 - 1e-5).all()


def test_stable_rank_is_that_of_what_the_head_adds():
    """Compare with the real update of a block whose other head is switched off."""
    model, images = randomized(tiny_source("Dinov2Model", layerscale_value=0.3)), pixels(2, 32, 32)
    block, added = model.encoder.layer[1], []
    paths = FAMILIES["dinov2"].attention_output  # other names in other versions of transformers
    projection = block.attention.get_submodule(next(path for path in paths if has_part(block.attention, path)))
    with torch.no_grad():
        projection.weight[:, 16:] = 0
        projection.bias.zero_()
    block.layer_scale1.register_forward_hook(lambda module, args, output: added.append(output))
    numbers = read_sinks(model, images, batch=2).numbers
    singular = torch.linalg.svdvals(added[-1].double())  # of (2, T, D)
    expected = singular.square().sum(dim=1) / singular[:, 0].square()
    torch.testing.assert_close(numbers["rank"][:, 1, 0], expected.float(), atol=0, rtol=1e-4)


def test_last_quarter():
    assert [last_quarter(count) for count in (1, 4, 6, 12)] == [1, 1, 2, 3]
