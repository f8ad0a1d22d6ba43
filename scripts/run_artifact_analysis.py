"""Find artifact tokens in a vision transformer: norms of all blocks, automatic cut-off, what outliers are like.

    python scripts/run_artifact_analysis.py --model facebook/dinov2-large --data photos/ --output_dir diagnosis
    python scripts/run_artifact_analysis.py --model reg0 --model reg4 --data photos/ --probes

The same as `regvit diagnose`: prints ten lines and writes report.json and report.html; several models also make
comparison.json, with cost and speed. `--help` lists all options.
"""

import sys

from hf_regvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
