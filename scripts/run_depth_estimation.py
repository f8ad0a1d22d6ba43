r"""Fine-tune a Vision Transformer to estimate the depth of every pixel in meters.

    python scripts/run_depth_estimation.py --model_name_or_path runs/mine/backbone --dataset_name rooms \
        --output_dir runs/depth

The data are parquet files or a Hub data set with an image and a depth column, or a folder with `images/` and `depth/`.
The options are those of `regvit finetune`; `--config` reads a recipe. To use several processes, run the script with
`accelerate launch` or `torchrun`.
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--task", "depth-estimation", *sys.argv[1:]]))
