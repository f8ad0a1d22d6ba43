r"""Fine-tune a vision transformer to estimate the depth of every pixel in metres.

    python scripts/run_depth_estimation.py --model_name_or_path runs/mine/backbone --dataset_name rooms \
        --output_dir runs/depth

Data: parquet files or a Hub data set with an image and a depth column, or a folder with `images/` and `depth/`.
Options are those of `regvit finetune`; `--config` reads a recipe. Several processes:
`accelerate launch` or `torchrun` before the script.
"""

import sys

from hf_regvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--task", "depth-estimation", *sys.argv[1:]]))
