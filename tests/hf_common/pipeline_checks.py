"""What the suite's pipeline tests ask of a pipeline; the source distribution lacks upstream's own modules for it."""

import numpy as np
import pytest
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline

from builders import noise

# Three images of different sizes: color, upright color, gray.
EXAMPLES = [noise(0, (64, 48)), noise(1, (40, 70)), noise(2, (50, 50)).convert("L")]


class FeatureExtractionChecks:
    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **unused):
        pipeline = ImageFeatureExtractionPipeline(model=model, image_processor=image_processor, dtype=dtype)
        return pipeline, EXAMPLES

    def run_pipeline_test(self, pipeline, examples):
        config = pipeline.model.config
        tokens = config.num_prefix_tokens + config.grid[0] * config.grid[1]
        features = pipeline(examples[0])
        assert np.shape(features) == (1, tokens, config.hidden_size)
        assert np.isfinite(features).all()
        pooled = pipeline(examples[0], pool=True)
        assert np.shape(pooled) == (1, config.hidden_size)
        np.testing.assert_array_equal(pooled[0], features[0][0])  # the pooled feature is the normalised CLS token
        several = pipeline(examples)
        assert np.shape(several) == (len(examples), 1, tokens, config.hidden_size)
        np.testing.assert_allclose(several[0], features, atol=1e-6)
        assert not np.allclose(several[0], several[1])
        assert pipeline(examples[0], return_tensors=True).shape == (1, tokens, config.hidden_size)


class ClassificationChecks:
    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **unused):
        pipeline = ImageClassificationPipeline(model=model, image_processor=image_processor, dtype=dtype, top_k=2)
        return pipeline, EXAMPLES

    def run_pipeline_test(self, pipeline, examples):
        labels = set(pipeline.model.config.id2label.values())
        for result in pipeline(examples):
            assert len(result) == 2
            assert {entry["label"] for entry in result} <= labels
            assert result[0]["score"] >= result[1]["score"] > 0
        everything = pipeline(examples[0], top_k=len(labels))
        assert {entry["label"] for entry in everything} == labels
        assert sum(entry["score"] for entry in everything) == pytest.approx(1, abs=2e-3)  # float16 comes here too
        with pytest.raises(ValueError, match="unknown is not a valid"):
            pipeline(examples[0], function_to_apply="unknown")


CHECKS = {"image-feature-extraction": FeatureExtractionChecks, "image-classification": ClassificationChecks}
