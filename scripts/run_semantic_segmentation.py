r"""Fine-tune a Vision Transformer to predict the class of every pixel.

    python scripts/run_semantic_segmentation.py --model_name_or_path runs/mine/backbone --dataset_name streets \
        --output_dir runs/segmenter

The data are parquet files or a Hub data set with an image and a mask column, or a folder with `images/` and `masks/`.
The options are those of `regvit finetune`, which share their names with the example script of transformers; `--config`
reads a recipe. To use several processes, run the script with `accelerate launch` or `torchrun`.
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--task", "semantic-segmentation", *sys.argv[1:]]))
