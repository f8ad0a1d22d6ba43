r"""Train a Vision Transformer with registers on images with texts, as CLIP and SigLIP do.

    python scripts/run_image_text_training.py --data photos_with_texts --output_dir runs/a
    python scripts/run_image_text_training.py --config examples/image_text_cpu.yaml --data photos --output_dir runs/a

The vision model is a new RegViT or any ViT that `regvit convert` reads (`--init_from`); the text encoder is new, or a
pretrained one (`--text_model`). The result is a `VisionTextDualEncoderModel` of transformers with its processor, and
the vision model alone in `backbone/`. Options on the command line override those of the recipe; `--help` lists all.

To use several processes, run the script with `accelerate launch` or `torchrun`. On SIGTERM and SIGUSR1 the script
saves a checkpoint and exits with status 85; `--resume_from_checkpoint last` continues.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_regvit.app.recipes import RecipeParser
from hf_regvit.image_text.arguments import ImageTextArguments
from hf_regvit.image_text.run import train_image_text
from hf_regvit.models.results import markdown_table
from hf_regvit.models.saving import read_json


def tables(report: Mapping[str, Any]) -> str:
    """Return the content of `result.json` as Markdown tables: accuracy, and artifacts before and after."""
    found = []
    if "zero_shot" in report:
        rows: list[Sequence[object]] = [("on held-out images", "top-1", "95 % interval", "images")]
        for name in ("zero_shot", "linear_probe"):
            one = report[name]
            low, high = one["interval"]
            rows.append((name.replace("_", " "), f"{one['top1']:.1%}", f"{low:.1%} to {high:.1%}", one["images"]))
        rows.append(("chance", f"{report['zero_shot']['chance']:.1%}", "", ""))
        found.append(markdown_table(rows))
    before, after = report["artifacts"]["before"], report["artifacts"]["after"]
    if before is not None:
        shown = [name for name in before if name != "register_norms"]
        found.append(markdown_table([("artifacts", "before", "after"), *((n, before[n], after[n]) for n in shown)]))
    return "\n\n".join(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    name = Path(__file__).name
    parser = RecipeParser(ImageTextArguments, prog=name, usage=f"{name} [--config RECIPE.yaml] [--option value ...]")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    level = "INFO" if os.environ.get("RANK", "0") == "0" else "WARNING"
    logging.basicConfig(level=os.environ.get("REGVIT_LOG", level), format="%(message)s", stream=sys.stderr)
    try:
        (args,) = parser.parse(argv)
        train_image_text(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1
    if args.should_save:
        print(tables(read_json(args.folder / "result.json")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
