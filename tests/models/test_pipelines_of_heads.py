"""Pipelines of transformers on every head, as a person with `import hf_regvit` uses them."""

import pytest
from PIL import Image
from transformers import DPTImageProcessor, pipeline
from transformers.pipelines import base

from builders import tiny_model
from hf_regvit import (
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
)
from hf_regvit.models.processing import default_image_processor

HEADS = {
    "image-classification": RegViTForImageClassification,
    "image-segmentation": RegViTForSemanticSegmentation,
    "depth-estimation": RegViTForDepthEstimation,
}


@pytest.mark.parametrize("task", HEADS)
def test_a_pipeline_takes_batches_and_does_not_call_its_model_unsupported(task, monkeypatch):
    told = []
    monkeypatch.setattr(base.logger, "error", told.append)
    model = tiny_model(HEADS[task], image_size=16, num_register_tokens=2)
    processor = default_image_processor(16, resize=16)
    if task != "image-classification":  # as fine-tuning on masks and depths writes it
        processor = DPTImageProcessor(size={"height": 16, "width": 16})
    pipe = pipeline(task, model=model, image_processor=processor, device="cpu")
    pictures = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 40), "blue"), Image.new("RGB", (9, 9))]
    assert len(pipe(pictures, batch_size=2)) == 3
    assert not told
