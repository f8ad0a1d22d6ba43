"""Quick start: a model with registers, dense features, a converted model, and a figure of its attention.

    python examples/quickstart.py

Runs in half a minute on a CPU without a network: the image is built in, and the weights are random. Pass the id of a
real checkpoint to `open_model` for a meaningful figure.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModel, BitImageProcessor, ViTConfig, ViTModel

import hf_regvit

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="regvit_"))

# 1. Create a model with four registers. Image sides are multiples of the patch size, with any aspect ratio.
config = hf_regvit.RegViTConfig.from_preset("tiny", num_register_tokens=4, num_hidden_layers=4)
model = hf_regvit.RegViTModel(config).eval()
image = hf_regvit.load_images("builtin:photos")[0].image.resize((336, 224))
processor = BitImageProcessor(do_resize=False, do_center_crop=False)
pixels = processor(images=image, return_tensors="pt")["pixel_values"]
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
with torch.inference_mode():
    assert torch.equal(again(pixels).last_hidden_state, output.last_hidden_state)

# 3. Convert a plain ViT (random weights here; a Hub id works as well) with the same outputs, then add registers.
vit = ViTModel(ViTConfig(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192))
converted = hf_regvit.convert(vit)
converted.resize_register_tokens(4)
print("converted      ", type(converted).__name__, "with", converted.config.num_register_tokens, "registers")

# 4. Read the vector of an image and draw the attention of CLS and of each register, the mean over the heads.
reader = hf_regvit.open_model(folder / "regvit")  # with the image processor that was saved beside it
print("one vector     ", reader.embed(image).shape)
figure, axes = plt.subplots(1, 6, figsize=(12, 2), layout="constrained")
axes[0].imshow(image)
for axis, query in zip(axes[1:], ["cls", *(("register", number) for number in range(4))]):
    axis.imshow(reader.attention_maps(image, query=query)[0].mean(axis=0))
    axis.set_title("CLS" if query == "cls" else f"register {query[1]}")
for axis in axes:
    axis.set_axis_off()
figure.savefig(folder / "attention.png")
print("figure         ", folder / "attention.png")
