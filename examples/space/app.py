"""A Space that shows a model with registers beside one without. Two variables of the Space choose the models."""

import os

from hf_regvit.demo import build_app, launch_options
from hf_regvit.features import load_model

WITH = os.environ.get("REGVIT_MODEL", "facebook/dinov2-with-registers-small")
WITHOUT = os.environ.get("REGVIT_COMPARE", "facebook/dinov2-small")

app = build_app({name: load_model(name) for name in (WITHOUT, WITH)}, compare=WITH)

if __name__ == "__main__":
    # A Space is reached through its own proxy, so it has to listen on all addresses of its container.
    app.launch(**launch_options(port=7860) | {"server_name": "0.0.0.0"})
