"""Test-time registers: forward pass against a loop, search for planted neurons, errors, command line."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from builders import noise, planted_model, randomized, save_images, save_model, tiny_model
from builders import pixels as random_pixels
from hf_regvit import (
    ConfigError,
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)
from hf_regvit.app import cli
from hf_regvit.data.preparation import prepare_images
from hf_regvit.diagnosis import retrofit as retrofit_module
from hf_regvit.diagnosis.register_neurons import (
    RegisterNeurons,
    RetrofitError,
    _find_outliers,
    add_test_time_registers,
    find_register_neurons,
    read_all_norms,
    score_neurons,
    search_neurons,
    silence_neurons,
)
from hf_regvit.diagnosis.retrofit import (
    RetrofitReport,
    _divide,
    _least_change,
    _SearchReadings,
    _Tally,
    retrofit,
)
from hf_regvit.figures.maps import TokenMaps, before_after_figure
from hf_regvit.hub.bundle import bundle
from hf_regvit.models.modeling_regvit import move_to_registers
from hf_regvit.models.processing import EvaluationTransform, default_image_processor
from hf_regvit.models.tokens import TokenReader, read_tokens

TINY = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_register_tokens": 0, "num_labels": 5, "num_depth_bins": 8,
}  # fmt: skip
NEURONS = [[1, 7], [0, 3], [1, 0], [2, 20]]


# --- The forward pass ---


def moved_in_loops(activations, neurons, config, token_mask):
    """Slow twin of `move_to_registers`."""
    result, first = activations.clone(), int(config.use_cls_token)
    for image in range(len(activations)):
        for neuron in neurons:
            largest = 0.0
            for token, value in enumerate(activations[image, :, neuron].tolist()):
                real = token_mask is None or bool(token_mask[image, token])
                if real and abs(value) > abs(largest):
                    largest = value
            for token in range(first, activations.shape[1]):
                result[image, token, neuron] = largest if token < first + config.num_register_tokens else 0.0
    return result


@pytest.mark.parametrize("use_cls_token", [True, False])
@pytest.mark.parametrize("num_register_tokens", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_activations_move_as_in_a_loop(num_register_tokens, padded, use_cls_token):
    activations = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    activations[0, 5, 2] = -9.0  # the sign stays
    activations[1, 8, 4] = 50.0  # in padding, if there is any
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 7:] = False
    config = RegViTConfig(num_register_tokens=num_register_tokens, use_cls_token=use_cls_token)
    arguments = ([2, 4, 0], config, mask if padded else None)
    before = activations.clone()
    torch.testing.assert_close(
        move_to_registers(activations, *arguments), moved_in_loops(activations, *arguments), atol=0, rtol=0
    )
    assert torch.equal(activations, before)


def test_without_neurons_nothing_is_computed():
    activations = torch.randn(1, 4, 6)
    assert move_to_registers(activations, [], RegViTConfig(), None) is activations
    assert all(layer.mlp.register_neurons == [] for layer in randomized(tiny_model(**TINY)).layers)


KINDS = {
    "mlp": {},
    "swiglu": {"use_swiglu_ffn": True},
    "rotary": {"use_position_embeddings": False, "rope_theta": 100},
    "no CLS": {"use_cls_token": False, "attention_pooler": True},
    "EVA-02": {"use_swiglu_ffn": True, "mlp_norm": True, "attention_norm": True},
}
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


@kinds
def test_the_model_does_it_in_the_named_blocks(fields):
    """Compare the input of the last layer of each MLP with the loop on the unmodified input."""
    plain = randomized(tiny_model(**TINY | fields))
    model = add_test_time_registers(plain, NEURONS, num_register_tokens=2)
    reading = read_tokens(model, random_pixels(2, 32, 32), layers="all", site="mlp")
    residual = read_tokens(model, random_pixels(2, 32, 32), layers="all").values
    for block, layer in enumerate(model.layers):
        silent = copy.deepcopy(layer)
        silent.mlp.register_neurons = []
        seen = []
        last = silent.mlp.down_proj if "use_swiglu_ffn" in fields else silent.mlp.fc2
        last.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            silent(residual[block], rotary=model.embeddings.rotary_table(random_pixels(2, 32, 32)))
        neurons = [neuron for where, neuron in NEURONS if where == block]
        assert bool(neurons) == (block < 3)
        expected = moved_in_loops(seen[0], neurons, model.config, None)
        torch.testing.assert_close(reading.values[block], expected, atol=1e-5, rtol=1e-5)


@kinds
def test_padded_batch_equals_each_image_alone(fields):
    """Padding with larger activations than the image must not reach the registers."""
    model = add_test_time_registers(randomized(tiny_model(**TINY | fields)), NEURONS)
    small = random_pixels(1)
    padded = torch.full((2, 3, 32, 32), 40.0)
    padded[0, :, :16, :16], padded[1] = small[0], random_pixels(1, 32, 32)[0]
    mask = torch.zeros(2, 32, 32)
    mask[0, :16, :16] = mask[1] = 1
    with torch.no_grad():
        together, alone = model(padded, pixel_mask=mask), model(small)
    torch.testing.assert_close(together.register_tokens[0], alone.register_tokens[0], atol=1e-5, rtol=1e-5)
    patches = together.patch_tokens[0].unflatten(0, (4, 4))[:2, :2].flatten(0, 1)
    torch.testing.assert_close(patches, alone.patch_tokens[0], atol=1e-5, rtol=1e-5)


def test_registers_reach_no_head_and_masks_know_them():
    model = add_test_time_registers(randomized(tiny_model(**TINY)), NEURONS, num_register_tokens=2)
    output = model(random_pixels(1, 32, 32))
    assert output.register_tokens.shape == (1, 2, 32)
    assert output.output_mask[0].tolist() == [True, False, False] + [True] * 16
    torch.testing.assert_close(output.register_tokens[:, 0], output.register_tokens[:, 1])  # equal by construction
    model.config.discard_registers = True
    assert model(random_pixels(1, 32, 32)).last_hidden_state.shape == (1, 17, 32)


@pytest.mark.slow
def test_compiles_into_one_graph():
    model = add_test_time_registers(randomized(tiny_model(**TINY)), NEURONS)
    pixels, mask = random_pixels(2, 32, 32), torch.ones(2, 32, 32)
    for kwargs in ({}, {"pixel_mask": mask}):
        compiled = torch.compile(model, fullgraph=not kwargs, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixels, **kwargs)[0], model(pixels, **kwargs)[0])


def test_half_precision():
    model = add_test_time_registers(randomized(tiny_model(**TINY)), NEURONS)
    with torch.no_grad():
        exact = model(random_pixels(2, 32, 32)).patch_tokens
        rough = model.to(torch.bfloat16)(random_pixels(2, 32, 32)).patch_tokens
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.97


def test_training_on_with_checkpointing_and_batch_subsets():
    """A retrofitted model can be trained further: registers and the listed neurons get gradients."""
    plain = randomized(tiny_model(**TINY, drop_path_rate=0.4, drop_path_mode="batch_subset"))
    model = add_test_time_registers(plain, NEURONS, num_register_tokens=2).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.zero_grad()
        model(random_pixels(4, 32, 32), pixel_mask=torch.ones(4, 32, 32)).patch_tokens.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)
    assert gradients[0]["embeddings.register_tokens"].abs().max() > 0
    assert gradients[0]["layers.1.mlp.fc1.weight"][7].abs().max() > 0


def test_pretraining_blocks_refuse_a_part_of_the_tokens():
    model = add_test_time_registers(randomized(tiny_model(**TINY)), NEURONS)
    with pytest.raises(NotImplementedError, match="must compute all tokens"):
        model.layers[-1](torch.randn(1, 18, 32), tokens=torch.tensor([0]))


# --- Configuration, saving ---


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([[3, 0]], r"holds \[3, 0\], expected \[block, neuron\] with a block in \[0, 2\]"),
        ([[0, 128]], r"holds \[0, 128\].*neuron in \[0, 127\]"),
        ([[-1, 0]], r"holds \[-1, 0\]"),
        ([[0, 1, 2]], r"holds \[0, 1, 2\]"),
        ([[0, 1], [0, 1]], r"holds \[0, 1\] more than once"),
    ],
)
def test_neurons_that_do_not_exist_are_refused(neurons, message):
    with pytest.raises(ConfigError, match=message):
        add_test_time_registers(randomized(tiny_model(**TINY)), neurons)


def test_neurons_need_a_register():
    with pytest.raises(ConfigError, match="num_register_tokens=0"):
        RegViTConfig(**TINY, register_neurons=[[0, 0]])
    model = add_test_time_registers(randomized(tiny_model(**TINY)), NEURONS)
    with pytest.raises(ConfigError, match="num_register_tokens=0"):
        model.resize_register_tokens(0)
    assert model.config.num_register_tokens == 1


def test_the_config_is_all_there_is_to_save(tmp_path):
    plain = randomized(tiny_model(**TINY))
    model = add_test_time_registers(plain, NEURONS, num_register_tokens=2)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["register_neurons"] == NEURONS
    loaded, images = RegViTModel.from_pretrained(tmp_path), random_pixels(2, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], model(images)[0])
        assert not torch.allclose(loaded(images).patch_tokens, plain(images).patch_tokens, atol=1e-2)


@pytest.mark.parametrize(
    "cls",
    [RegViTForImageClassification, RegViTForSemanticSegmentation, RegViTForDepthEstimation, RegViTBackbone],
)
def test_models_with_heads(cls):
    model = randomized(tiny_model(cls, **TINY))
    before = copy.deepcopy(model.state_dict())
    made = add_test_time_registers(model, NEURONS, num_register_tokens=2)
    assert type(made) is cls
    assert made.regvit.config.num_register_tokens == 2
    with torch.no_grad():
        ours, theirs = (one(random_pixels(1, 32, 32), return_dict=False)[0] for one in (made, model))
    ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert not torch.allclose(ours, theirs)
    assert model.config.num_register_tokens == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    made.regvit.layers[0].mlp.fc1.weight.data.zero_()
    assert model.regvit.layers[0].mlp.fc1.weight.any()  # nothing is shared


def test_what_cannot_get_registers():
    fields = {"num_register_tokens": 4, "register_neurons": [[0, 1], [1, 2]]}
    with pytest.raises(RetrofitError, match=r"already has test-time registers, which 2 neurons write into"):
        add_test_time_registers(randomized(tiny_model(**TINY | fields)), NEURONS)
    with pytest.raises(TypeError, match=r"model is a Linear.*convert\(\)"):
        add_test_time_registers(torch.nn.Linear(2, 2), NEURONS)


# --- The search, on planted neurons ---

PLANTED = [1, 9]


PLANTED_MODEL = planted_model()


IMAGES = [noise(seed, (64, 64)) for seed in range(64)]


PROCESSOR = default_image_processor(64, resize=64)


def test_scores_equal_a_loop():
    transform = EvaluationTransform.for_model(PLANTED_MODEL, PROCESSOR)
    prepared = prepare_images(IMAGES[:5], transform, batch_size=2)
    rng = np.random.default_rng(0)
    is_outlier = rng.random((5, 64)) < 0.05
    is_outlier[3] = False  # an image without any does not count
    pixels = torch.stack([transform(image) for image in IMAGES[:5]])
    activations = read_tokens(PLANTED_MODEL, pixels, layers="all", site="mlp").values
    for quiet_share, quiet_below in ((0.5, 0.5), (0.98, 0.0), (0.0, 0.0)):
        scores = score_neurons(
            TokenReader(PLANTED_MODEL), prepared, is_outlier, quiet_share=quiet_share, quiet_below=quiet_below
        )
        assert scores.shape == (4, 192)
        for block in range(4):
            for neuron in (0, 9, 100):
                total, counted = 0.0, 0
                for image in range(5):
                    places = np.flatnonzero(is_outlier[image])
                    if not len(places):
                        continue
                    counted += 1
                    values = activations[block][image, :, neuron]  # CLS first
                    if int((values < quiet_below).sum()) >= quiet_share * len(values):
                        total += sum(abs(float(values[1 + place])) for place in places) / len(places)
                assert scores[block, neuron].item() == pytest.approx(total / counted, abs=1e-6)


def test_quiet_goes_by_the_signed_activation_and_half_of_the_tokens_is_enough():
    # Ten tokens, and activations far below zero.
    model = randomized(tiny_model(**TINY | {"image_size": 24, "use_swiglu_ffn": True}))
    transform = EvaluationTransform.for_model(model, default_image_processor(24, resize=24))
    pixels = torch.stack([transform(image) for image in IMAGES[:4]])
    is_outlier = np.random.default_rng(0).random((4, 9)) < 0.3
    is_outlier[:, 0] = True
    scores = score_neurons(TokenReader(model), prepare_images(IMAGES[:4], transform, batch_size=4), is_outlier)
    exactly_half = loud_below = 0
    for block, activations in enumerate(read_tokens(model, pixels, layers="all", site="mlp").values):
        for neuron in range(activations.shape[2]):
            total = 0.0
            for image in range(4):
                values = activations[image, :, neuron].tolist()
                quiet = sum(value < 0.5 for value in values)
                exactly_half += quiet == 5
                loud_below += quiet >= 5 > sum(abs(value) < 0.5 for value in values)
                if quiet >= 5:
                    here = [abs(values[1 + place]) for place in np.flatnonzero(is_outlier[image])]
                    total += sum(here) / len(here)
            assert scores[block, neuron].item() == pytest.approx(total / 4, rel=1e-4)
    assert exactly_half > 0
    assert loud_below > 0


def test_the_planted_neuron_is_found():
    found = find_register_neurons(PLANTED_MODEL, IMAGES, processor=PROCESSOR)
    assert (found.layer, found.emergence, found.num_images) == (2, 2, 64)
    assert found.outlier_share == pytest.approx(2 / 64)
    assert found.best(1) == [PLANTED]
    assert all(block <= 1 for block, _ in found.best(300))  # only blocks before the first outliers
    assert any(block > 1 for block, _ in found.best(300, highest_block=3))
    fixed = find_register_neurons(PLANTED_MODEL, IMAGES, processor=PROCESSOR, cutoff=found.cutoff)
    assert torch.equal(fixed.scores, found.scores)


def test_the_smallest_that_removes_the_outliers_and_changes_little_is_chosen():
    def record(name, share, cls_cosine, patch_cosine):
        return {"name": name, "outlier_share": share, "cls_cosine": cls_cosine, "patch_cosine": patch_cosine}

    left = record("leaves too many", 0.006, 1.0, 1.0)
    few = record("few neurons", 0.005, 0.88, 0.92)
    more = record("more neurons", 0.0, 0.93, 0.8718)  # 0.0009 better on average, which is nothing
    better = record("better", 0.0, 0.93, 0.8724)  # 0.0012 better
    assert _least_change([left, few, more], 0.1)["name"] == "few neurons"
    assert _least_change([left, few, more, better], 0.1)["name"] == "more neurons"
    assert _least_change([left, few, better], 0.1)["name"] == "better"
    none = [record("a", 0.02, 1.0, 1.0), record("b", 0.01, 0.5, 0.5), record("c", 0.03, 1.0, 1.0)]
    assert _least_change(none, 0.1)["name"] == "b"  # none removes them: the one that removes most


def test_what_is_told_of_a_variant_equals_its_loop():
    generator = torch.Generator().manual_seed(0)

    def seen(registers):
        random = partial(torch.rand, generator=generator)
        attention = random((3, 1 + registers + 6)).softmax(dim=-1)
        return _SearchReadings(random((3, 3, 6)), random((3, 4)) - 0.5, random((3, 6, 4)) - 0.5, attention)

    before, after = seen(0), seen(2)
    tally = _Tally(1, 0.6, 2)
    tally.add(before, after, before.norms[1] > 0.6)
    told = tally.row()
    on_outliers, on_registers, cosines, normal = [], [], [], []
    for image in range(3):
        former = [place for place in range(6) if before.norms[1, image, place] > 0.6]
        on_outliers.append(sum(after.attention[image, 3 + place].item() for place in former))
        on_registers.append(after.attention[image, 1].item() + after.attention[image, 2].item())
        cosines.append(torch.cosine_similarity(after.cls[image], before.cls[image], dim=0).item())
        for place in set(range(6)) - set(former):
            pair = after.patches[image, place], before.patches[image, place]
            normal.append(torch.cosine_similarity(*pair, dim=0).item())
    assert 0 < len(normal) < 18
    here = after.norms[1].flatten().tolist()
    expected = {
        "outlier_share": sum(norm > 0.6 for norm in here) / 18,
        "max_norm": max(here),
        "median_norm": np.median(here),
        "last_max_norm": after.norms[2].max().item(),
        "cls_cosine": np.mean(cosines),
        "patch_cosine": np.mean(normal),
        "attention_on_outliers": np.mean(on_outliers),
        "attention_on_registers": np.mean(on_registers),
    }
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, abs=1e-6), name


def test_neurons_are_searched_on_the_images_of_the_search_alone():
    reader = TokenReader(PLANTED_MODEL, PROCESSOR)
    prepared, parts = prepare_images(IMAGES, reader.transform, batch_size=16), _divide(64, 3)
    found = search_neurons(reader, prepared, read_all_norms(reader, prepared), "auto", parts["search"])
    assert sum(mask.astype(int) for mask in parts.values()).tolist() == [1] * 64
    mine = [image for image, here in zip(IMAGES, parts["search"], strict=True) if here]
    alone = find_register_neurons(PLANTED_MODEL, mine, processor=PROCESSOR)
    assert found.num_images == len(mine) == 32
    torch.testing.assert_close(found.scores, alone.scores, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found.scores, find_register_neurons(PLANTED_MODEL, IMAGES, processor=PROCESSOR).scores)


def test_outliers_of_a_given_cutoff_emerge_where_they_stay():
    rng = np.random.default_rng(0)
    norms = {layer: rng.uniform(1, 2, (4, 20)) for layer in range(5)}
    for layer in (1, 3, 4):  # gone again after the second block
        norms[layer][:, 7] = 4.0
    found, layer, emergence = _find_outliers(norms, 3.0)
    assert not found.bimodal
    assert (layer, emergence) == (4, 3)


def test_best_leaves_out_neurons_without_a_score():
    scores = torch.tensor([[0.0, 2.0, 2.0], [3.0, 0.0, 0.0]])
    found = RegisterNeurons(scores, layer=1, cutoff=1.0, emergence=1, outlier_share=0.1, num_images=1)
    assert found.best(5) == [[0, 1], [0, 2]]
    assert found.best(2, highest_block=1) == [[1, 0], [0, 1]]


def test_retrofit_moves_the_outliers_and_says_so(tmp_path):
    before = copy.deepcopy(PLANTED_MODEL.state_dict())
    result = retrofit(PLANTED_MODEL, IMAGES, processor=PROCESSOR, progress=False, max_images=60)
    model, report = result.model, result.report
    assert result.source is PLANTED_MODEL
    assert all(torch.equal(before[name], value) for name, value in PLANTED_MODEL.state_dict().items())
    assert report.neurons[0] == PLANTED
    assert model.config.register_neurons == report.neurons
    assert report.images == {"search": 30, "choice": 15, "judged": 15}
    judged = report.judged
    assert judged["before"]["outlier_share"] == pytest.approx(2 / 64)
    assert judged["before"]["layers_with_outliers"]
    assert judged["after"]["outlier_share"] == 0
    assert judged["after"]["layers_with_outliers"] == []
    assert judged["after"]["max_norm"] < 0.2 * judged["before"]["max_norm"]
    for control in ("registers alone", "random neurons"):
        assert judged[control]["outlier_share"] == pytest.approx(2 / 64)
    assert judged["neurons silenced, no register"]["outlier_share"] == 0
    assert judged["before"]["cls_cosine"] == pytest.approx(1)
    norms = read_tokens(model, random_pixels(2, 64, 64), layers=(2,))
    assert norms.registers().norm(dim=-1).min() > report.cutoff  # where they went
    assert [record["chosen"] for record in report.tried].count(True) == 1
    assert len(report.summary().splitlines()) == 13
    path = report.save(tmp_path)
    assert RetrofitReport(**json.loads(path.read_text())) == report


def test_predictions_of_a_classifier_are_compared():
    config = copy.deepcopy(PLANTED_MODEL.config)
    config.num_labels, config.drop_path_rate = 12, 0.5
    torch.manual_seed(0)
    model = RegViTForImageClassification(config)
    model.regvit.load_state_dict(PLANTED_MODEL.state_dict())
    model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    result = retrofit(model.train(), IMAGES, processor=PROCESSOR, progress=False, top_k=1, num_register_tokens=2)
    assert model.training  # as it was given, although it was measured in eval mode
    tested = [result.transform(image) for image, here in zip(IMAGES, _divide(64, 0)["judged"], strict=True) if here]
    classes = [one.eval()(torch.stack(tested)).logits.argmax(dim=-1) for one in (model, result.model)]
    judged = result.report.judged
    assert judged["after"]["same_class"] == (classes[0] == classes[1]).float().mean().item()
    assert judged["before"]["same_class"] == 1
    assert judged["neurons silenced, no register"]["same_class"] < 1
    assert "| same class |" in result.summary()
    assert f"The predicted class is the same for {judged['after']['same_class']:.1%}." in result.report.card_text


def test_what_is_asked_for_is_not_chosen():
    result = retrofit(PLANTED_MODEL, IMAGES, processor=PROCESSOR, progress=False, top_k=2, num_register_tokens=3)
    assert len(result.report.tried) == 1
    model = result.model
    assert len(model.config.register_neurons) == 2
    assert model.config.num_register_tokens == 3


def test_silenced_neurons_say_nothing():
    silent = silence_neurons(PLANTED_MODEL, [PLANTED])
    assert not silent.layers[1].mlp.fc2.weight[:, 9].any()
    assert PLANTED_MODEL.layers[1].mlp.fc2.weight[:, 9].any()


def test_nothing_to_move():
    clean = silence_neurons(PLANTED_MODEL, [PLANTED])
    with pytest.raises(RetrofitError, match=r"No distinct outlier population \(.*nothing to move"):
        find_register_neurons(clean, IMAGES, processor=PROCESSOR)
    with pytest.raises(RetrofitError, match=r"No patch has a norm above cutoff=1000000\.0"):
        find_register_neurons(clean, IMAGES, processor=PROCESSOR, cutoff=1e6)


def test_outliers_of_the_positions_cannot_be_moved():
    born = silence_neurons(copy.deepcopy(PLANTED_MODEL), [PLANTED])
    with torch.no_grad():
        born.embeddings.position_embeddings[0, [1, 64]] *= 20
    with pytest.raises(RetrofitError, match="before the first block"):
        find_register_neurons(born, IMAGES, processor=PROCESSOR)


def test_neurons_that_do_not_carry_the_outliers():
    with pytest.raises(
        RetrofitError, match=r"do not carry the outliers: 3\.12% of the patches are outliers before, and 3\.12% after"
    ):
        retrofit(PLANTED_MODEL, IMAGES, processor=PROCESSOR, progress=False, highest_block=0)


@pytest.mark.parametrize(
    ("setting", "range_"),
    [
        ({"num_register_tokens": 0}, r"\[1, 1024\]"),
        ({"top_k": 0}, r"\[1, "),
        ({"highest_block": 4}, r"\[0, 3\]"),
        ({"highest_block": -1}, r"\[0, 3\]"),
    ],
)
def test_settings_out_of_range(setting, range_):
    with pytest.raises(RetrofitError, match=f"{next(iter(setting))}=.*out of range.*{range_}"):
        retrofit(PLANTED_MODEL, IMAGES, processor=PROCESSOR, progress=False, **setting)


def test_too_few_images():
    with pytest.raises(RetrofitError, match="31 images can be used"):
        retrofit(PLANTED_MODEL, IMAGES[:31], processor=PROCESSOR, progress=False)


def test_a_figure_needs_both_sides_of_every_image():
    maps = TokenMaps(torch.rand(1, 8, 8), torch.randn(8, 8, 5), torch.rand(8, 8), torch.zeros(0, 5))
    assert len(before_after_figure(IMAGES[:2], [maps] * 2, [maps] * 2).axes) == 14
    with pytest.raises(ValueError, match="2 images, 2 maps before and 1 maps after"):
        before_after_figure(IMAGES[:2], [maps] * 2, [maps])


# --- The command ---


@pytest.mark.slow
def test_the_command_writes_a_checkpoint_and_a_report(tmp_path, capsys):
    save_model(PLANTED_MODEL, tmp_path / "model", PROCESSOR)
    save_images(tmp_path / "images", IMAGES[:40])
    args = ["retrofit", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "images")]
    args += ["--output_dir", str(tmp_path / "out")]
    assert cli.main([*args, "--dry_run"]) == 0
    assert not (tmp_path / "out").exists()
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "block.neuron counted from 0 (mean activation at outliers): 1.9 (" in printed
    assert "Outliers fell from 3.12% to 0.00% of the patches" in printed
    model = RegViTModel.from_pretrained(tmp_path / "out")
    assert model.config.register_neurons[0] == PLANTED
    assert not model.embeddings.register_tokens.any()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "configuration_regvit.py",
        "modeling_regvit.py", "manifest.json", "retrofit_report.json", "before_after.png", "retrofit.html",
    }  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "out" / "retrofit_report.json").read_text()
    assert cli.main(args) == 1
    assert "already contains a checkpoint" in capsys.readouterr().err
    assert cli.main(["retrofit", "--model", str(tmp_path / "out"), *args[3:-1], str(tmp_path / "again")]) == 1
    assert "already has test-time registers" in capsys.readouterr().err


def test_a_published_retrofit_says_what_was_done(tmp_path):
    result = retrofit(PLANTED_MODEL, IMAGES, processor=PROCESSOR, progress=False, top_k=1, num_register_tokens=2)
    result.model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    result.report.save(tmp_path / "model")
    made = bundle(tmp_path / "model", tmp_path / "bundle", card={"license": "apache-2.0"})
    card = (made.folder / "README.md").read_text()
    assert "- retrofitted" in card
    assert "\n| neurons silenced, no register |" in card
    assert "before_after.png" not in card
    assert "1 of the 768 MLP neurons (1.9, as block.neuron counted from 0) write into 2 zero registers" in card
    assert result.report.verdict in card
    copied = json.loads((made.folder / "reports" / "retrofit.json").read_text())
    assert RetrofitReport(**copied) == result.report
    Image.new("RGB", (8, 8)).save(tmp_path / "model" / "before_after.png")
    options = {"card": {"license": "apache-2.0"}, "example_pictures": True}
    shown = bundle(tmp_path / "model", tmp_path / "shown", **options)
    assert "![Test images before and after](figures/before_after.png)" in (shown.folder / "README.md").read_text()
    assert (shown.folder / "figures" / "before_after.png").is_file()


def test_the_name_of_the_source_is_a_whole_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr(retrofit_module, "_open", lambda *args: TokenReader(PLANTED_MODEL, PROCESSOR))
    settings = {"processor": PROCESSOR, "progress": False, "top_k": 1, "num_register_tokens": 1, "max_passes": 1}
    (tmp_path / "deep").mkdir()
    for name, shown in (("owner/vit", "owner/vit"), (tmp_path / "deep", "deep")):
        assert retrofit(name, IMAGES[:40], **settings).report.model["name"] == shown
