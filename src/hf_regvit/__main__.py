"""`python -m hf_regvit` is the `regvit` command."""

import sys

from .cli import main

sys.exit(main())
