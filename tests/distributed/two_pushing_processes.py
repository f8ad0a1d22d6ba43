"""What two processes over gloo do when they push; `test_push_two_processes.py` looks at what the Hub has then.

The second process has a token of its own, so that the Hub can tell who asked it for something.
"""

import logging
import os
from logging.handlers import BufferingHandler
from pathlib import Path

from two_processes import COMMON, IMAGES, PER_PROCESS, sharding

import tiny_finetune
import tiny_run
from fake_hub import READ_TOKEN
from hf_regvit.hub import upload
from hf_regvit.models.processing import default_image_processor
from hf_regvit.pretraining.run import pretrain

SECOND_TOKEN = "hf_" + "s" * 34
QUICK = upload.RetryPolicy(attempts=2, first_wait=0.01, longest_wait=1.0, timeout=5.0)


def pushed(folder: Path, name: str, **overrides) -> dict:
    """Four steps with a checkpoint after every second one, everything sent to `someone/NAME`."""
    args = tiny_run.arguments(
        folder / name, per_device_train_batch_size=PER_PROCESS, push_to_hub=True, hub_model_id=f"someone/{name}",
        hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=2, ddp_backend="gloo",
        **COMMON, **overrides,
    )  # fmt: skip
    heard = BufferingHandler(capacity=10**6)
    heard.setLevel(logging.WARNING)
    logging.getLogger("hf_regvit").addHandler(heard)
    try:
        teacher = pretrain(args, train_dataset=tiny_run.Crops(IMAGES), image_processor=default_image_processor(16))
    except upload.PermanentPushError as error:
        return {"refused": str(error)}
    finally:
        logging.getLogger("hf_regvit").removeHandler(heard)
    return {"state": teacher.state_dict(), "log": [record.getMessage() for record in heard.buffer]}


def scenarios(folder: Path) -> dict:
    """Name and result of everything that two processes are asked to push."""
    if os.environ["RANK"] == "1":
        os.environ["HF_TOKEN"] = SECOND_TOKEN
    upload.RetryPolicy = lambda: QUICK
    results = {"whole": pushed(folder, "whole"), "broken": pushed(folder, "broken")}
    with sharding() as fsdp:
        results["sharded"] = pushed(folder, "sharded", **fsdp)
        pieces = {**fsdp, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
        results["pieces"] = pushed(folder, "pieces", **pieces)
    finetuned, _ = tiny_finetune.run(
        folder / "finetuned", push_to_hub=True, hub_model_id="someone/finetuned", hub_strategy="every_save",
        hub_always_push=True, num_train_epochs=1, save_strategy="epoch", ddp_backend="gloo",
    )  # fmt: skip
    results["finetuned"] = {"state": dict(finetuned.state_dict())}
    results["refused"] = pushed(folder, "refused", hub_token=READ_TOKEN)
    return results
