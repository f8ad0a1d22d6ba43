"""Find artifact tokens in a Vision Transformer: patch norms of all blocks, automatic cut-off, outlier statistics.

    python scripts/run_artifact_analysis.py --model facebook/dinov2-large --data photos/ --output_dir diagnosis
    python scripts/run_artifact_analysis.py --model reg0 --model reg4 --data photos/ --probes

Equivalent to `regvit diagnose`. Prints a summary and writes report.json and report.html; for several models, it also
writes comparison.json with cost and speed. `--help` lists all options.
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
