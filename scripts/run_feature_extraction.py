"""Write CLS, register and patch tokens of many images to safetensors shards, with one or more processes.

    python scripts/run_feature_extraction.py --model facebook/dinov2-small --images photos --output_dir features
    accelerate launch --num_processes 2 scripts/run_feature_extraction.py --config extract.yaml

After an interruption, the same command continues. Several processes write exactly the same files as one process.
`--help` lists all options.
"""

import json
import logging
import sys
from collections.abc import Sequence

from hf_regvit.app.arguments import ExtractArguments
from hf_regvit.app.recipes import RecipeError, RecipeParser
from hf_regvit.evaluation.extraction import extract_to_folder


def main(argv: Sequence[str]) -> int:
    parser = RecipeParser(ExtractArguments, description=__doc__.splitlines()[0])
    try:
        (args,) = parser.parse(argv)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    report = extract_to_folder(args.model_name_or_path, args.images(), args.output_dir, settings=args.settings())
    if report.complete:  # true only in the process that finished last
        print(json.dumps(report.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
