"""Write CLS, register and patch tokens of many images to safetensors shards, with one or more processes.

    python scripts/run_feature_extraction.py --model facebook/dinov2-small --images photos --output_dir features
    accelerate launch --num_processes 2 scripts/run_feature_extraction.py --config extract.yaml

After an interruption, the same command continues. Several processes write exactly the same files as one process.
The report is printed as JSON. `--help` lists all options.
"""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", "--json", *sys.argv[1:]]))
