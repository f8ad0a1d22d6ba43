"""RegViT and composite models: backbone of DPT and UperNet, encoder of a captioning model, tower of LLaVA and CLIP."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DPTConfig,
    DPTForDepthEstimation,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
)

from builders import in_fresh_memory, pixels, randomized, tiny_config, tiny_model
from hf_regvit import (
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
    convert,
    convert_back,
)

SIZES = [(32, 32), (32, 48), (64, 16)]  # the native square, wide, tall: height and width in pixels


def backbone_config(**overrides) -> RegViTConfig:
    # The default layerscale_value would leave the blocks of an untrained model without effect.
    fields = {"num_hidden_layers": 4, "num_attention_heads": 4, "layerscale_value": 1.0, "out_indices": [1, 2, 3, 4]}
    return tiny_config(**fields | overrides)


def build_dpt(**overrides) -> DPTForDepthEstimation:
    config = DPTConfig(
        backbone_config=backbone_config(reshape_hidden_states=False, **overrides),
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        head_in_index=-1,
        patch_size=8,
        readout_type="project",
    )
    return DPTForDepthEstimation(config)


def build_upernet(**overrides) -> UperNetForSemanticSegmentation:
    config = UperNetConfig(
        backbone_config=backbone_config(**overrides), hidden_size=16, auxiliary_channels=16, num_labels=5
    )
    return UperNetForSemanticSegmentation(config)


def outputs_of(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = in_fresh_memory(model)(pixel_values)
    return output.predicted_depth if "predicted_depth" in output else output.logits


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("build", [build_dpt, build_upernet])
def test_dense_model_builds_runs_and_reloads(build, size, tmp_path):
    torch.manual_seed(0)
    model = build()
    assert isinstance(model.backbone, RegViTBackbone)
    pixel_values = torch.randn(2, 3, *size)
    expected = outputs_of(model, pixel_values)
    if build is build_dpt:  # the neck of DPT enlarges the grid 16 times, whatever the patch
        assert expected.shape == (2, 2 * size[0], 2 * size[1])
    else:
        assert expected.shape == (2, 5, *size)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again.config.backbone_config) is RegViTConfig
    fields = again.config.backbone_config.to_diff_dict()
    assert {**model.config.backbone_config.to_diff_dict(), "dtype": fields["dtype"]} == fields
    assert torch.equal(outputs_of(again, pixel_values), expected)


@pytest.mark.parametrize("build", [build_dpt, build_upernet])
def test_dense_model_trains_through_the_backbone(build):
    torch.manual_seed(0)
    model = build().train()
    output = model(torch.randn(2, 3, 32, 48))
    (output.predicted_depth if "predicted_depth" in output else output.logits).square().mean().backward()
    for name in ("register_tokens", "cls_token", "position_embeddings"):
        assert getattr(model.backbone.regvit.embeddings, name).grad.abs().sum() > 0, name


def test_dense_model_takes_a_pretrained_backbone(tmp_path):
    torch.manual_seed(0)
    backbone = RegViTBackbone(backbone_config())
    backbone.save_pretrained(tmp_path)
    model = build_upernet()
    model.backbone = RegViTBackbone.from_pretrained(tmp_path, out_indices=[1, 2, 3, 4])
    for name, parameter in backbone.named_parameters():
        assert torch.equal(model.backbone.get_parameter(name), parameter), name
    assert outputs_of(model, torch.randn(1, 3, 32, 48)).shape == (1, 5, 32, 48)


def test_backbone_drops_registers_unless_asked():
    # DPT takes exactly one token in front of the patches for granted.
    torch.manual_seed(0)
    model = RegViTBackbone(backbone_config(reshape_hidden_states=False, out_indices=[4])).eval()
    pixel_values = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        (without,) = model(pixel_values).feature_maps
        model.config.return_register_tokens = True
        (whole,) = model(pixel_values).feature_maps
    assert (without.shape, whole.shape) == ((1, 1 + 24, 32), (1, 1 + 4 + 24, 32))
    assert torch.equal(without, torch.cat([whole[:, :1], whole[:, 5:]], dim=1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_are_rows_and_columns(size):
    """An image that changes along one axis only gives maps that vary along that axis, more than along the other."""
    torch.manual_seed(0)
    model = AutoBackbone.from_config(backbone_config(out_indices=[0, 4], image_size=[48, 64])).eval()
    rows, columns = size[0] // 8, size[1] // 8
    along_height = torch.linspace(-1, 1, size[0]).view(1, 1, -1, 1).expand(1, 3, *size)
    along_width = torch.linspace(-1, 1, size[1]).view(1, 1, 1, -1).expand(1, 3, *size)
    with torch.no_grad():
        model.regvit.embeddings.position_embeddings.zero_()  # or the maps vary with the place whatever the image shows
        for image, changing, constant in ((along_height, 2, 3), (along_width, 3, 2)):
            maps = model(image).feature_maps
            assert [m.shape for m in maps] == [(1, 32, rows, columns)] * 2
            for feature_map in maps:
                assert feature_map.std(changing).mean() > 0.1
                assert feature_map.std(constant).max() < 1e-4


def test_maps_are_the_patch_tokens_in_row_major_order():
    torch.manual_seed(0)
    model = RegViTBackbone(backbone_config(out_indices=[2, 4])).eval()
    pixel_values = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        maps = model(pixel_values).feature_maps
        states = model.regvit(pixel_values, output_hidden_states=True).hidden_states
        for feature_map, block in zip(maps, (2, 4)):
            tokens = model.regvit.layernorm(states[block])
            for row in range(4):
                for column in range(6):
                    token = tokens[:, 1 + model.config.num_register_tokens + 6 * row + column]
                    torch.testing.assert_close(feature_map[:, :, row, column], token, atol=1e-6, rtol=1e-6)


# --- As the encoder of a captioning model ---


def build_captioner(**overrides) -> VisionEncoderDecoderModel:
    torch.manual_seed(0)
    encoder = tiny_model(**{"layerscale_value": 1.0, **overrides})
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    return model


def train_captioner(folder, *, scales_loss: bool = False, **options) -> VisionEncoderDecoderModel:
    """One step of plain SGD on four captions of the same length."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": torch.randint(2, 20, (5,), generator=generator),
        }
        for _ in range(4)
    ]
    arguments = TrainingArguments(
        folder, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    model = build_captioner()
    if not scales_loss:
        # VisionEncoderDecoderModel takes `num_items_in_batch` and ignores it, with every encoder. Without this line,
        # Trainer would trust it to divide the loss, and two accumulated batches would make a step twice as long.
        model.accepts_loss_kwargs = False
    Trainer(model, arguments, train_dataset=rows).train()
    return model


@pytest.mark.slow
def test_a_captioning_model_trains_under_trainer_with_exact_accumulation(tmp_path):
    before = build_captioner()
    whole = train_captioner(tmp_path / "a", scales_loss=True, per_device_train_batch_size=4)
    pieces = train_captioner(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    moved = 0.0
    for (name, one), other, start in zip(whole.named_parameters(), pieces.parameters(), before.parameters()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=name)
        moved = max(moved, (one - start).abs().max().item())
    assert moved > 1e-2  # the step is far larger than the tolerance


def test_a_captioning_model_reloads_and_generates(tmp_path):
    model, pixels = build_captioner().eval(), torch.randn(2, 3, 32, 48)
    model.save_pretrained(tmp_path)
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    tokens = model.generate(pixels, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(pixels, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize(
    "model_class",
    [
        RegViTModel, RegViTForImageClassification, RegViTForSemanticSegmentation, RegViTForDepthEstimation,
        RegViTBackbone,
    ],
)  # fmt: skip
def test_keywords_of_other_models_are_ignored(model_class):
    """Callers of ViT, and Trainer through composite models, pass these; Dinov2Model ignores them, too."""
    model, pixels = tiny_model(model_class), torch.randn(1, 3, 32, 48)
    expected = model(pixels)
    output = model(pixels, interpolate_pos_encoding=True, num_items_in_batch=torch.tensor(3))
    assert type(output) is type(expected)
    assert torch.equal(output[0] if model_class is not RegViTBackbone else output[0][0],
                       expected[0] if model_class is not RegViTBackbone else expected[0][0])  # fmt: skip
    assert isinstance(model(pixels, return_dict=False, interpolate_pos_encoding=False), tuple)
    assert model.accepts_loss_kwargs is False


# --- As the vision tower of a larger model, and back ---

TOWER = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip


def build_llava(vision) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    without_cls = vision.model_type == "siglip_vision_model"
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=5, vision_feature_layer=-2,
        vision_feature_select_strategy="full" if without_cls else "default",
    )  # fmt: skip
    return randomized(LlavaForConditionalGeneration(config))


def fine_tuned(tower: RegViTModel) -> RegViTModel:
    """The same model after three steps, which change every parameter that the features of LLaVA depend on."""
    tower = tower.train()
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        output = tower(pixels(4, 32, 32, seed=step), output_hidden_states=True)
        (output.hidden_states[-2].square().mean() + output.pooler_output.square().mean()).backward()
        optimizer.step()
    return tower.eval()


@pytest.mark.parametrize(
    "vision",
    [CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER), SiglipVisionConfig(**TOWER, vision_use_head=False)],
    ids=["CLIP", "SigLIP", "SigLIP without a head"],
)
def test_a_fine_tuned_tower_goes_back_into_llava(vision, tmp_path):
    llava = build_llava(vision)
    llava.save_pretrained(tmp_path / "llava")
    tower = convert(tmp_path / "llava")  # finds the tower inside, and compares the outputs
    before = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    tower = fine_tuned(tower)
    llava.load_state_dict(convert_back(tower, like=llava))
    is_changed = {name.split(".")[1] for name, tensor in llava.state_dict().items() if not tensor.equal(before[name])}
    assert is_changed == {"vision_tower"}  # the projector and the language model are as they were

    images = pixels(2, 32, 32, seed=9)
    prompt = torch.tensor([[1, *[5] * 16, 7, 8]] * 2)  # one token for each of the 16 patches
    with torch.no_grad():
        tokens = tower(images, output_hidden_states=True).hidden_states[-2][:, -16:]
        expected = llava.model.multi_modal_projector(tokens)
        found = torch.stack(list(llava.get_image_features(images).pooler_output))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        logits = llava(input_ids=prompt, pixel_values=images).logits
        embedded = llava.get_input_embeddings()(prompt)
        embedded[:, 1:17] = expected
        torch.testing.assert_close(llava(inputs_embeds=embedded).logits, logits, atol=2e-5, rtol=0)
    llava.save_pretrained(tmp_path / "again")
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        logits_of_saved = in_fresh_memory(saved)(input_ids=prompt, pixel_values=images).logits
    torch.testing.assert_close(logits_of_saved, logits, atol=2e-5, rtol=0)


def test_a_fine_tuned_tower_goes_back_into_clip():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=12)))
    tower = fine_tuned(convert(clip))
    clip.load_state_dict(convert_back(tower, like=clip))
    images = pixels(2, 32, 32, seed=9)
    with torch.no_grad():
        features = clip.get_image_features(images).pooler_output
        torch.testing.assert_close(features, tower(images).image_embeds, atol=2e-5, rtol=0)
        output = clip.vision_model(images)
        torch.testing.assert_close(output.last_hidden_state, tower(images).last_hidden_state, atol=2e-5, rtol=0)
