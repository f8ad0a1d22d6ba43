"""Pretrain a vision transformer with registers on unlabelled images, the DINOv2 way.

    python scripts/run_dino_pretraining.py --data path/to/images --output_dir runs/mine --max_steps 20000
    python scripts/run_dino_pretraining.py --config examples/photos_cpu.yaml --output_dir runs/photos

Defaults come from the recipe, options on the command line override it; `--help` lists all of them.
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
    logging.basicConfig(level=args.get_process_log_level(), format="%(asctime)s %(name)s: %(message)s")
    pretrain(args)
    print(f"The backbone is in {Path(args.output_dir) / 'backbone'}; AutoModel.from_pretrained loads it.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
