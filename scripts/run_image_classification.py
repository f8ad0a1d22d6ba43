r"""Fine-tune a Vision Transformer on labeled images.

    python scripts/run_image_classification.py --model_name_or_path runs/mine/backbone --train_dir photos/train \\
        --validation_dir photos/validation --output_dir runs/classifier

The options are those of `regvit finetune`, which share their names with the example script of transformers; `--config`
reads a recipe. To use several processes, run the script with `accelerate launch` or `torchrun`.
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--task", "image-classification", *sys.argv[1:]]))
