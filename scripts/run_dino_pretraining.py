"""Pretrain a vision transformer with registers on unlabelled images, the DINOv2 way.

    python scripts/run_dino_pretraining.py --data path/to/images --output_dir runs/mine --max_steps 20000
    python scripts/run_dino_pretraining.py --config examples/photos_cpu.yaml --output_dir runs/photos

Defaults come from the recipe, options on the command line override it; `--help` lists all of them.

Several processes: `accelerate launch` or `torchrun` before the script. SIGTERM and SIGUSR1 save a checkpoint and end
the process with status 85, for a scheduler that queues the job again; `--resume_from_checkpoint last` goes on from the
newest checkpoint that verifies, or starts where there is none. `torchrun --max_restarts` does the same after a crash
(over gloo with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or the new processes look for the old ones).
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_regvit.arguments import RecipeError, RecipeParser
from hf_regvit.pretraining import PretrainingArguments, pretrain


def main(argv: Sequence[str]) -> int:
    parser = RecipeParser(PretrainingArguments, description=__doc__.splitlines()[0])
    try:
        (args,) = parser.parse(argv)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    pretrain(args)
    print(f"The backbone is in {Path(args.output_dir) / 'backbone'}; AutoModel.from_pretrained loads it.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
