"""Move the artifacts of a trained Vision Transformer into registers without training (arXiv 2506.08010).

    python scripts/run_test_time_registers.py --model facebook/dinov2-large --data photos/ --output_dir fixed

Equivalent to `regvit retrofit`. Writes a RegViT with its processor and code files, retrofit_report.json and
before_after.png. `--help` lists all options.
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["retrofit", *sys.argv[1:]]))
