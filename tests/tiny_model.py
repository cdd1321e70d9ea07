"""A trained-model folder of real classes at tiny widths, and prepared data of its task."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

import prepare_datasets
from madm_utils.base_model import BaseModelReference
from madm_utils.modeling_madm import MADMModel
from madm_utils.small_model import build_small_stable_diffusion
from madm_utils.tasks import TASKS, Task

RESOLUTION = 64
WIDTHS = {"projection_channels": 32, "bottleneck_channels": 32, "head_channels": 16}

# Threads gain nothing on tiny tensors, and those that wait disturb whatever else runs on the machine.
torch.set_num_threads(1)


@functools.cache
def base_folder() -> Path:
    """A Stable Diffusion of real classes, built once per test process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-sd-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_small_stable_diffusion(folder, (16, 32, 32, 32), (8, 16, 16), norm_groups=4)


def new_model(task: Task, unet_tuning: str = "full", **options) -> MADMModel:
    """An untrained model on `base_folder()`."""
    base = BaseModelReference(str(base_folder()))
    return MADMModel.from_base(base, task, RESOLUTION, unet_tuning, **{**WIDTHS, **options})


def write_model(folder: Path, task_name: str = "synthetic_to_depth", unet_tuning: str = "full") -> Path:
    """Save a model with a teacher of other weights; BatchNorm statistics are not those of a fresh layer."""
    torch.manual_seed(0)
    student, other = (new_model(TASKS[task_name], unet_tuning) for _ in "12")
    for segmenter in (student.segmenter, other.segmenter):
        for module in segmenter.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    student.save_pretrained(folder, other.segmenter)
    return folder


def write_data(folder: Path, num_test: int = 5, side: int = 96) -> Path:
    """Synthetic scenes, larger than `RESOLUTION` so that the two evaluation protocols differ."""
    numbers = ("--num_train", 1, "--num_test", num_test, "--resolution", side)
    prepare_datasets.main([str(a) for a in ("--dataset", "synthetic", "--output_dir", folder, *numbers)])
    return folder
