r"""Fine-tune a vision transformer on labelled images.

    python scripts/run_image_classification.py --model_name_or_path runs/mine/backbone --train_dir photos/train \\
        --validation_dir photos/validation --output_dir runs/classifier

Options are those of `regvit finetune` and of the example script of transformers where both have one; `--config` reads
a recipe. Several processes: `accelerate launch` or `torchrun` before the script.
"""

import sys

from hf_regvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--task", "image-classification", *sys.argv[1:]]))
