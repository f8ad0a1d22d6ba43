"""Entry point of `python -m hf_regvit`, which is the `regvit` command."""

import sys

from hf_regvit_cli import main

sys.exit(main())
