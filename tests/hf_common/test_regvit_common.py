"""The common tests of transformers (models, backbones, configurations, pipelines) on every RegViT class."""

import copy
import dataclasses
import functools
import pathlib
import tempfile
import unittest
from unittest import mock

import hf_suite
import pytest
import safetensors.torch
import skip_reasons
import torch
from hf_suite import MODEL_CLASSES, PIPELINES
from transformers.testing_utils import torch_device

from hf_regvit import CheckpointError, RegViTBackbone, RegViTConfig, RegViTForDepthEstimation, RegViTModel
from hf_regvit.models import modeling_regvit
from hf_regvit.models.modeling_regvit import RegViTEmbeddings, RegViTPreTrainedModel

hf_suite.stop_without_suite()

_tiny_models = tempfile.TemporaryDirectory()  # removed when the interpreter ends; the suite wants its path at import
TINY_MODELS = pathlib.Path(_tiny_models.name)
suite = hf_suite.import_suite(TINY_MODELS)


@pytest.fixture(autouse=True, scope="module")
def _regvit_is_known():
    torch.manual_seed(0)
    hf_suite.save_tiny_models(TINY_MODELS, RegViTModelTester().get_config())
    with hf_suite.registered_by_name():
        yield


class RegViTModelTester:
    """A tiny model and its inputs, with the attributes that the common tests read from their tester."""

    def __init__(self, parent=None, **fields):
        self.parent = parent
        self.fields = fields
        self.batch_size = 3
        self.image_size = 32
        self.patch_size = 8
        self.num_channels = 3
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.num_labels = 5
        self.is_training = True
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.num_masks = self.num_patches // 2
        self.mask_length = self.num_patches  # bool_masked_pos has an entry per patch, none for CLS and registers
        self.seq_length = fields.get("use_cls_token", True) + 3 + self.num_patches

    def get_config(self):
        return RegViTConfig(
            num_register_tokens=3,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_depth_bins=8,
            num_labels=self.num_labels,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape, generator=generator).to(torch_device)}


class ModelChecks(suite.ModelTesterMixin):
    """The common tests of models, for the configuration in `fields`."""

    all_model_classes = MODEL_CLASSES
    test_resize_embeddings = False  # there is no vocabulary
    fields = {}

    def setUp(self):
        self.model_tester = RegViTModelTester(self, **self.fields)
        # The customary hidden_size=37 of these tests does not divide into heads, which our configuration refuses.
        self.config_tester = suite.ConfigTester(
            self, config_class=RegViTConfig, has_text_modality=False, hidden_size=36, num_attention_heads=4
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # Extended: the suite knows no depth estimators and would train ours without labels.
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is RegViTForDepthEstimation:
            batch_size, _, height, width = inputs["pixel_values"].shape
            meters = torch.linspace(1, 5, height * width, device=inputs["pixel_values"].device)
            inputs["labels"] = meters.view(1, height, width).repeat(batch_size, 1, 1)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("RegViT takes pixel_values, not inputs_embeds")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        # Overridden: the input embedding makes tokens of pixels; upstream's test expects nn.Embedding.
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config))
            base = getattr(model, model.base_model_prefix, model)
            assert model.get_input_embeddings() is base.embeddings
            assert model.get_output_embeddings() is None

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # Wrapped: upstream reads `weight` of the input embedding, passes over models whose embedding has none, and
        # skips if that leaves no model. Ours is in the convolution two levels below.
        weight = property(lambda embeddings: embeddings.patch_embeddings.projection.weight)
        with mock.patch.object(RegViTEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_model_outputs_equivalence(self):
        # Wrapped: upstream's message subtracts the two outputs, which torch refuses for our bool masks.
        forward = RegViTModel.forward

        @functools.wraps(forward)
        def with_float_masks(*args, **kwargs):
            output = forward(*args, **kwargs)
            if isinstance(output, tuple):
                return tuple(x.float() if getattr(x, "dtype", None) == torch.bool else x for x in output)
            return dataclasses.replace(
                output, output_mask=output.output_mask.float(), patch_mask=output.patch_mask.float()
            )

        with mock.patch.object(RegViTModel, "forward", with_float_masks):
            super().test_model_outputs_equivalence()

    def test_model_weights_reload_no_missing_tied_weights(self):
        # Wrapped: upstream loads a file with none of the model's tensors and reads the list of missing ones; we refuse
        # such a file. First that we do, then upstream's test with the refusal off.
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__), tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                safetensors.torch.save_file({"tensor": torch.ones(1)}, f"{folder}/model.safetensors", {"format": "pt"})
                with pytest.raises(CheckpointError, match=r"patch_embeddings\.projection\.bias is missing"):
                    model_class.from_pretrained(folder)
        with mock.patch.object(RegViTPreTrainedModel, "_check_loaded", return_value=None):
            super().test_model_weights_reload_no_missing_tied_weights()


class RegViTModelTest(ModelChecks, suite.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = PIPELINES


class RegViTRotaryTest(ModelChecks, unittest.TestCase):
    fields = {"use_position_embeddings": False, "rope_theta": 100, "key_bias": False, "pos_embed_rescale": 2.0}


class RegViTWithoutCLSTest(ModelChecks, unittest.TestCase):
    fields = {"use_cls_token": False, "attention_pooler": True, "pooling": "cls", "embedding_norm": True}


class RegViTBackboneTest(suite.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (RegViTBackbone,)
    config_class = RegViTConfig
    has_attentions = False  # sdpa, the default, computes none; test_attention_outputs above covers eager

    def setUp(self):
        self.model_tester = RegViTModelTester(self)


def test_suite_covers_every_class():
    classes = {getattr(modeling_regvit, name) for name in modeling_regvit.__all__}
    models = {c for c in classes if issubclass(c, RegViTPreTrainedModel)} - {RegViTPreTrainedModel}
    assert models == set(MODEL_CLASSES)


def test_unknown_skips_are_not_allowed():
    known = skip_reasons.group_of("test_inputs_embeds", "RegViT takes pixel_values, not inputs_embeds")
    assert known == "another modality, task or kind of model"
    assert skip_reasons.group_of("test_sdpa_can_dispatch_composite_models", "RegViTModel does not support SDPA")
    # The same words from any other test would mean that a capability of ours has gone.
    assert skip_reasons.group_of("test_eager_matches_sdpa_inference", "RegViTModel does not support SDPA") is None
    assert skip_reasons.group_of("test_training", "ModelTester is not configured to run training tests") is None
    assert skip_reasons.group_of("test_training", "") is None
