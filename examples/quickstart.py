"""Quick start: a model with registers, dense features, a converted model, and a figure of its attention.

    python examples/quickstart.py

Runs in half a minute on a CPU without a network: the images come from scikit-image, and the weights are random. Pass
the id of a real checkpoint to `convert` for a meaningful figure.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel

import hf_regvit
from hf_regvit.data.builtin import builtin_images
from hf_regvit.figures.maps import fit_to_patches, overview_figure, read_token_maps, save_figure
from hf_regvit.models.processing import default_image_processor

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="regvit_"))

# 1. Create a model with four registers. Image sides are multiples of the patch size, with any aspect ratio.
config = hf_regvit.RegViTConfig.from_preset("tiny", num_register_tokens=4, num_hidden_layers=4)
model = hf_regvit.RegViTModel(config).eval()
picture = fit_to_patches(builtin_images()["chelsea"], patch=config.patch_shape, short_side=224)
processor = default_image_processor(224)
pixels = processor(images=picture, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    output = model(pixels)
rows, columns = (side // patch for side, patch in zip(pixels.shape[-2:], config.patch_shape))
print("CLS            ", tuple(output.pooler_output.shape))
print("registers      ", tuple(output.register_tokens.shape))
print("dense features ", tuple(output.patch_tokens.unflatten(1, (rows, columns)).shape), "without the registers")

# 2. Save and load it like any model of transformers.
model.save_pretrained(folder / "regvit")
processor.save_pretrained(folder / "regvit")
again = AutoModel.from_pretrained(folder / "regvit").eval()
AutoImageProcessor.from_pretrained(folder / "regvit")
with torch.inference_mode():
    assert torch.equal(again(pixels).last_hidden_state, output.last_hidden_state)

# 3. Convert a plain ViT (random weights here; a Hub id works as well) with the same outputs, then add registers.
vit = ViTModel(ViTConfig(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192))
converted = hf_regvit.convert(vit)
converted.resize_register_tokens(4)
print("converted      ", type(converted).__name__, "with", converted.config.num_register_tokens, "registers")

# 4. Draw the attention maps of CLS and of each register, the PCA of the patch tokens, and their norms.
(maps,) = read_token_maps(model, pixels)
save_figure(overview_figure(picture, maps), folder / "overview.png")
print("figure         ", folder / "overview.png")
