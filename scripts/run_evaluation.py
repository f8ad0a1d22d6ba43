"""Evaluate frozen backbones: `run_evaluation.py --model A --model B --tasks knn linear --data FOLDER`."""

import sys

from hf_regvit_cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
