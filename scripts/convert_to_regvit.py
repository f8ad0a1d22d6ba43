"""Convert a DINOv2, timm or transformers ViT: `convert_to_regvit.py --model SOURCE --output_dir FOLDER`."""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
