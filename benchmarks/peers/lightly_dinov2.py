"""Train DINOv2 with lightly-train on a folder of images, for comparison in `benchmarks/compare_pretraining.py`.

This script runs in a separate environment with lightly-train and does not import hf_regvit. It reads a JSON object
from the command line and writes the teacher's weights under the official DINOv2 names for every saved step.
"""

import json
import sys
import time
from pathlib import Path

import lightly_train
import pytorch_lightning
import torch
from lightly_train._commands import train_helpers
from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
from safetensors.torch import save_file


class SaveTeacher(pytorch_lightning.Callback):
    """Save the teacher at given steps, and record processor and wall seconds without the time for saving."""

    def __init__(self, folder: Path, steps: set[int]) -> None:
        self.folder, self.steps, self.saved = folder, steps, {}
        self.seconds = self.wall_seconds = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self.clocks = time.process_time(), time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in self.steps:
            self.seconds += time.process_time() - self.clocks[0]
            self.wall_seconds += time.perf_counter() - self.clocks[1]
            weights = pl_module.teacher_embedding_model.wrapped_model.get_model().state_dict()
            file = self.folder / f"teacher_{trainer.global_step:06d}.safetensors"
            save_file({name: value.contiguous() for name, value in weights.items()}, file)
            self.saved[trainer.global_step] = {
                "file": file.name, "seconds": self.seconds, "wall_seconds": self.wall_seconds
            }  # fmt: skip
            self.clocks = time.process_time(), time.perf_counter()


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    model = DinoVisionTransformer(
        img_size=settings["global_size"],
        patch_size=settings["patch_size"],
        embed_dim=settings["width"],
        depth=settings["depth"],
        num_heads=settings["heads"],
        init_values=1.0,
        block_chunks=0,
        num_register_tokens=settings["registers"],
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    out = Path(settings["output"])
    steps = settings["steps"]
    blur = {"sigmas": tuple(settings["blur_sigma"]), "blur_limit": settings["blur"]}
    save = SaveTeacher(out, set(settings["save_at"]))
    # Replace the default callbacks, which write checkpoints and logs, so that the comparison excludes this cost.
    make_trainer = train_helpers.Trainer
    train_helpers.Trainer = lambda **options: make_trainer(**{**options, "callbacks": [save]})
    lightly_train.pretrain(
        out=out,
        data=settings["data"],
        model=model,
        method="dinov2",
        epochs=1000,  # an upper bound; `max_steps` ends the run
        batch_size=settings["batch_size"],
        num_workers=0,
        devices=1,
        accelerator="cpu",
        precision="32-true",
        seed=settings["seed"],
        overwrite=True,
        loggers={"tensorboard": None},
        trainer_args={"max_steps": steps, "enable_progress_bar": False},
        optim_args={"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]},
        transform_args={
            "image_size": (settings["global_size"], settings["global_size"]),
            "random_resize": {"min_scale": settings["global_scale"][0], "max_scale": settings["global_scale"][1]},
            "color_jitter": {"prob": 0.8, "strength": 1.0, **settings["jitter"]},
            "random_gray_scale": 0.2,
            "gaussian_blur": None,
            "global_view_1": {
                "gaussian_blur": {"prob": 0.9, **blur},
                "solarize": None,
            },
            "local_view": {
                "num_views": settings["locals"],
                "view_size": (settings["local_size"], settings["local_size"]),
                "random_resize": {"min_scale": settings["local_scale"][0], "max_scale": settings["local_scale"][1]},
                "gaussian_blur": {"prob": 0.5, **blur},
            },
        },
        method_args={
            "output_dim": settings["prototypes"],
            "hidden_dim": settings["head_width"],
            "dino_bottleneck_dim": settings["bottleneck"],
            "ibot_separate_head": False,
            "student_freeze_last_layer_steps": max(steps // 100, 1),
            "warmup_steps": max(steps // 10, 1),
            "teacher_temp_start": 0.04,
            "teacher_temp_end": 0.04,
            "teacher_temp_warmup_steps": 1,
            "momentum_start": settings["momentum"],
            "momentum_end": 1.0,
            "weight_decay_end": settings["weight_decay_end"],
            "layerwise_decay": 1.0,
            "patch_embed_lr_multiplier": 1.0,
            "reference_batch_size": settings["batch_size"],  # so that the learning rate is not scaled
        },
    )
    (out / "peer.json").write_text(json.dumps({"saved": save.saved, "version": lightly_train.__version__}))


if __name__ == "__main__":
    main()
