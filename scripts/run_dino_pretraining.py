"""Pretrain a Vision Transformer with registers on unlabeled images with the DINOv2 losses.

    python scripts/run_dino_pretraining.py --data path/to/images --output_dir runs/mine --max_steps 20000
    python scripts/run_dino_pretraining.py --config examples/photos_cpu.yaml --output_dir runs/photos

Options on the command line override those of the recipe; `--help` lists all options.

To use several processes, run the script with `accelerate launch` or `torchrun`. On SIGTERM and SIGUSR1 the script
saves a checkpoint and exits with status 85, so that a scheduler can queue the job again. `--resume_from_checkpoint
last` resumes from the newest intact checkpoint, or starts a new run if there is none. `torchrun --max_restarts` does
the same after a crash (with gloo, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or the new processes wait for the old
ones).
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
