r"""Fine-tune a vision transformer to name the class of every pixel.

    python scripts/run_semantic_segmentation.py --model_name_or_path runs/mine/backbone --dataset_name streets \
        --output_dir runs/segmenter

Data: parquet files or a Hub data set with an image and a mask column, or a folder with `images/` and `masks/`. Options
are those of `regvit finetune` and of the example script of transformers where both have one; `--config` reads recipes.
Several processes: `accelerate launch` or `torchrun` before the script.
"""

import sys

from hf_regvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--task", "semantic-segmentation", *sys.argv[1:]]))
