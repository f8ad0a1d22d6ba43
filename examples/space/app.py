"""Run `regvit demo` as a Space that compares a model with registers and one without.

The variables `REGVIT_MODEL` and `REGVIT_COMPARE` of the Space choose the models.
"""

import os
import sys

WITH = os.environ.get("REGVIT_MODEL", "facebook/dinov2-with-registers-small")
WITHOUT = os.environ.get("REGVIT_COMPARE", "facebook/dinov2-small")

if __name__ == "__main__":
    command = [sys.executable, "-m", "hf_regvit", "demo", "--model", WITHOUT, "--compare", WITH, "--port", "7860"]
    # A proxy forwards requests to the Space, so the app has to listen on all addresses of its container.
    os.execve(sys.executable, command, {**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0"})
