"""Run `regvit demo` as a Space that compares a model with registers and one without.

The variables `REGVIT_MODEL` and `REGVIT_COMPARE` of the Space choose the models.
"""

import os

from hf_regvit.app.demo import build_app, launch_options

WITH = os.environ.get("REGVIT_MODEL", "facebook/dinov2-with-registers-small")
WITHOUT = os.environ.get("REGVIT_COMPARE", "facebook/dinov2-small")

app = build_app({name: name for name in (WITHOUT, WITH)}, compare=WITH)

if __name__ == "__main__":
    # A proxy forwards requests to the Space, so the app has to listen on all addresses of its container.
    app.launch(**launch_options(port=7860) | {"server_name": "0.0.0.0"})
