"""What people watch: progress bar, trackers, `training_log.jsonl`, pictures, the banner and the summary.

`training_log.jsonl` has one JSON object per logged step and task: `step`, `name` (of the task, '' for the only one),
the mean of every value over the processes, and under `timing` what depends on the machine and the hour. Numbers are
exact: equal runs write equal lines but for `timing`. A value per class is an object, `null` where it is undefined; a
number that is not finite is the string "nan", "inf" or "-inf". A validation's line has `validation` instead.

`timing.loader_wait` is the fraction (0 to 1) of the time since the last logged step, validation and checkpoints left
out, that the training waited for its data; of several processes, of the one that waited longest.
"""

import json
import math
import os
import resource
import shlex
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import Tensor
from tqdm import tqdm

from madm_utils.cli import UserError
from madm_utils.files import replacing
from madm_utils.loader_wait import LoaderWait
from madm_utils.tasks import Task
from madm_utils.visualization import training_grid

if TYPE_CHECKING:
    from train_madm import Run, State

logger = get_logger(__name__)

LOG_NAME = "training_log.jsonl"
# The first step is slower than the rest (lazy initialisation); the four after it are timed for the estimate.
_TIMED_STEPS = 4


def check_tracker(name: str) -> None:
    """Refuse a tracker that does not exist or is not installed: accelerate would drop the latter and log nothing."""
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name != "none" and name not in known:
        raise UserError(f"--report_to {name} is unknown; one of {', '.join(known)}, or none")
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {name} is not installed: pip install {name}, or use tensorboard or none")


class TrainingLog:
    """Everything a running training shows. Every process calls every method; the main process writes.

    Nothing in it stops a training: what cannot be written (disk full) is reported and left out. Images per second:
    source and target images of all processes and tasks, over all time since the last logged step.

    Args:
        output_dir: of the run; exists.
        accelerator: of the run; made with `log_with`, unless nothing is to be reported.
        settings: of the run, for the trackers.
        max_steps: step at which the run ends.
        step: step at which this start of the run begins; what was logged after it is dropped.
        pairs_per_step: pairs of source and target image per step, over all processes and tasks.
        report_to: name of the tracker, or `none`.
        logging_dir: folder of the trackers inside `output_dir`.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        settings: dict[str, Any],
        max_steps: int,
        step: int,
        pairs_per_step: int,
        report_to: str,
        logging_dir: str,
    ):
        self.accelerator, self.output_dir = accelerator, Path(output_dir)
        self.max_steps, self.first_step, self.step = max_steps, step, step
        self.images_per_step = pairs_per_step * (1 if settings.get("source_only") else 2)
        self.memory_gib = 0.0
        """Largest peak memory of a process at the last logged step."""
        self.losses: dict[str, dict[str, float]] = {}
        """Task -> losses at the last logged step."""
        self.started = time.monotonic()
        self._timed_step, self._timed_at = step, self.started
        self._timing: dict[str, float] = {}
        self._second_step_at = self.started
        self._waited = 0.0
        self.loader = LoaderWait(settings.get("dataloader_num_workers", 0))
        is_main = accelerator.is_main_process
        if is_main:
            _drop_lines_after(self.output_dir / LOG_NAME, step)
        if report_to != "none":
            # A tracker takes scalars only. TensorBoard shows nothing of an earlier start from `purge_step` on.
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("madm", plain, {"tensorboard": {"purge_step": step + 1}})
        if report_to == "tensorboard":
            logger.info(f"curves and pictures: tensorboard --logdir {shlex.quote(str(self.output_dir / logging_dir))}")
        self.progress = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=not is_main)

    def scalars(
        self, step: int, values: dict[str, Tensor | float], name: str = "", class_names: Sequence[str] = ()
    ) -> None:
        """Log the mean of `values` over the processes, with one transfer from the device. Collective.

        Args:
            step: number of the finished step.
            values: numbers, and (K,) tensors with one number per class, NaN where it is undefined; these are averaged
                over the processes that define them.
            name: of the task, '' for the only one.
            class_names: K names.
        """
        means = self._mean_over_processes(values)
        self._measure(step)
        if not self.accelerator.is_main_process:
            return
        self.losses[name] = {key.removesuffix("_loss"): v for key, v in means.items() if key.endswith("_loss")}
        prefix = f"train/{name}/" if name else "train/"
        flat: dict[str, float] = {}
        record: dict[str, Any] = {"step": step, "name": name}
        for key, value in means.items():
            if isinstance(value, float):
                flat[prefix + key] = value
                record[key] = value if math.isfinite(value) else str(value)
            else:
                per_class = dict(zip(class_names, value, strict=True))
                record[key] = {label: None if math.isnan(v) else v for label, v in per_class.items()}
                flat |= {f"{prefix}{key}/{label}": v for label, v in per_class.items() if not math.isnan(v)}
        flat |= {f"train/{key}": value for key, value in self._timing.items()}
        self._write_line({**record, "timing": self._timing})
        self._track(lambda tracker: tracker.log(flat, step=step))
        shown: dict[str, str] = {}
        for task, losses in self.losses.items():
            terms = {task: sum(losses.values())} if task else losses
            shown |= {key: f"{value:.3f}" for key, value in terms.items()}
        if "learning_rate" in means:
            shown["lr"] = f"{means['learning_rate']:.1e}"
        shown |= {"images/s": f"{self._timing['images_per_second']:.1f}"}
        self.progress.set_postfix(shown | {"loader_wait": f"{self._timing['loader_wait']:.0%}"})

    def pictures(self, step: int, pictures: dict[str, Tensor | int], task: Task, name: str = "") -> None:
        """Write `validation/[name/]step-{step}.png` as `training_grid` draws it, and show it in TensorBoard."""
        if not self.accelerator.is_main_process:
            return
        grid = training_grid(pictures, task)
        path = self.output_dir / "validation" / name / f"step-{step}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                grid.save(temporary, format="PNG")
        except OSError as error:
            logger.warning(f"{path} could not be written ({error}); training goes on")
        images = {"/".join(filter(None, ("validation", name, "pictures"))): np.asarray(grid)[None]}

        def show(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images(images, step=step, dataformats="NHWC")
                tracker.writer.flush()

        self._track(show)

    def validation(self, step: int, scores: dict[str, Any], name: str = "") -> None:
        """Log what `evaluation.validate` returned."""
        if not self.accelerator.is_main_process:
            return
        iou = {label: values["iou"] for label, values in scores["per_class"].items()}
        numbers = {key: value for key, value in scores.items() if key != "per_class"}
        self._write_line({"step": step, "name": name, "validation": {**numbers, "iou": iou}})
        prefix = f"validation/{name}/" if name else "validation/"
        flat = {f"{prefix}iou/{label}": value for label, value in iou.items() if value is not None}
        self._track(lambda tracker: tracker.log({f"{prefix}miou": scores["miou"], **flat}, step=step))
        of_task = f" of {name}" if name else ""
        logger.info(f"step {step}: mIoU {scores['miou']:.2f} on the {scores['split']} split{of_task}")

    def advance(self) -> None:
        """Count one step of all tasks; after the first few, say how long the rest takes."""
        self.progress.update()
        self.step += 1
        done, remaining = self.step - self.first_step, self.max_steps - self.step
        if done == 1:
            self._second_step_at = time.monotonic()
        elif done == 1 + _TIMED_STEPS and remaining:
            seconds = (time.monotonic() - self._second_step_at) / _TIMED_STEPS
            logger.info(
                f"estimated time: {timedelta(seconds=round(seconds * remaining))} for {remaining} more steps of "
                f"{seconds:.2f} s, the mean of the last {_TIMED_STEPS}"
            )

    def close(self) -> None:
        """Take the progress bar off the screen's last line, and have the trackers write what they hold."""
        self.progress.close()
        self._track(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()

    def _mean_over_processes(self, values: dict[str, Tensor | float]) -> dict[str, float | list[float]]:
        """Means as Python numbers; also updates `memory_gib` and the time waited for data, the largest of each."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        own = {"memory_gib": _peak_memory_gib(device), "waited": self.loader.waited}
        tensors = {k: torch.as_tensor(v, dtype=dtype, device=device).detach() for k, v in {**values, **own}.items()}
        packed = torch.cat([tensor.reshape(1, -1) for tensor in tensors.values()], dim=1)
        rows = self.accelerator.gather(packed).cpu().double()
        columns = dict(zip(tensors, rows.split([t.numel() for t in tensors.values()], dim=1), strict=True))
        self.memory_gib, self._waited = (columns.pop(key).max().item() for key in own)
        return {
            key: column.nanmean(dim=0).tolist() if tensors[key].ndim else column.mean().item()
            for key, column in columns.items()
        }

    def _measure(self, step: int) -> None:
        """Time per step since the last logged one; several tasks log a step once each."""
        if step > self._timed_step:
            now = time.monotonic()
            passed = max(now - self._timed_at, 1e-9)
            seconds = passed / (step - self._timed_step)
            self._timing = {"images_per_second": self.images_per_step / seconds, "seconds_per_step": seconds}
            # The loaders of several tasks start in the first two intervals.
            starting = self._timed_step <= self.first_step + 1
            self._timing["loader_wait"] = self.loader.fraction(self._waited, passed, starting)
            self._timed_step, self._timed_at = step, now
        self._timing["memory_gib"] = self.memory_gib

    def _write_line(self, record: dict[str, Any]) -> None:
        """Append one line to `training_log.jsonl`, whole or not at all."""
        path = self.output_dir / LOG_NAME
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            logger.warning(f"step {record['step']} is missing in {path} ({error}); training goes on")

    def _track(self, write: Callable[[GeneralTracker], None]) -> None:
        """Let every tracker write; one that cannot is left out from then on."""
        for tracker in list(self.accelerator.trackers):
            try:
                write(tracker)
            except OSError as error:
                # The thread that writes TensorBoard's file does not survive an error.
                self.accelerator.trackers.remove(tracker)
                logger.warning(
                    f"{tracker.name} cannot write ({error}) and shows nothing more until the run is resumed; training "
                    f"goes on, and so does {LOG_NAME}"
                )


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove lines of later steps, and what a killed process left of its last line."""
    if not path.exists():
        return

    def kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError):
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(line for line in lines if kept(line)), encoding="utf-8")


def _peak_memory_gib(device: torch.device) -> float:
    """Peak so far: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def banner(runs: Sequence["Run"], args: Namespace, accelerator: Accelerator) -> None:
    """Log what is about to be trained."""
    processes, accumulated = accelerator.num_processes, args.gradient_accumulation_steps
    for run in runs:
        data, only = run.batches.dataset, run.args.source_only
        target = "none" if only else f"{data.num_target} ({run.task.target})"
        groups = _trainable_by_group(run, accelerator)
        listed = ", ".join(f"{name} {count:,}" for name, count in groups.items())
        logger.info(f"***** {'source-only' if only else 'MADM'} training: {run.task.name} *****")
        logger.info(f"  examples: source {data.num_source} ({run.task.source}), target {target}")
        logger.info(f"  trainable parameters: {groups.total():,} ({listed})")
    logger.info(f"  steps: {runs[0].step} to {args.max_train_steps}, {args.resolution} x {args.resolution} pixels")
    logger.info(
        f"  effective batch: {args.train_batch_size * processes * accumulated}{' per task' if len(runs) > 1 else ''} "
        f"({args.train_batch_size} {'images' if args.source_only else 'pairs'} x {processes} processes x "
        f"{accumulated} accumulated)"
    )
    logger.info(f"  device: {processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}")


def _trainable_by_group(run: "Run", accelerator: Accelerator) -> Counter[str]:
    """Part of the model -> number of trained parameters. Adapters of other tasks on the same UNet do not count."""
    groups: Counter[str] = Counter()
    lora = run.args.unet_tuning == "lora"
    for name, parameter in accelerator.unwrap_model(run.model).named_parameters():
        part = name.split(".")
        if part[0] == "segmenter":
            groups[part[1]] += parameter.numel()
        elif any(f".lora_{x}.{run.task.modality}." in name for x in "AB") if lora else parameter.requires_grad:
            groups["UNet LoRA" if lora else "UNet"] += parameter.numel()
    return groups


def summary(runs: Sequence["Run"], log: TrainingLog, state: "State", accelerator: Accelerator) -> None:
    """Print how the training went, where the models are, and what to do next.

    Args:
        runs: the tasks.
        log: of the run.
        state: holds the best validation of each task, where there was one.
        accelerator: of the run.
    """
    if not accelerator.is_main_process:
        return
    steps, seconds = runs[0].step - log.first_step, time.monotonic() - log.started
    earlier = f" after {log.first_step} of an earlier start" if log.first_step else ""
    print(
        f"{steps} steps{earlier} in {timedelta(seconds=round(seconds))}, "
        f"{steps * log.images_per_step / seconds:.1f} images/s, peak memory {log.memory_gib:.1f} GiB"
    )
    for run in runs:
        folder = Path(run.args.output_dir) / run.name
        task = f" ({run.name})" if run.name else ""
        if run.name in log.losses:
            print(f"last losses{task}: " + ", ".join(f"{k} {v:.4f}" for k, v in log.losses[run.name].items()))
        if run.name in state.best:
            best = state.best[run.name]
            print(f"best validation{task}: mIoU {best['miou']:.2f} at step {best['step']}")
        print(f"trained model{task}: {folder}")
        command = ("eval_madm.py", "--model_path", folder, "--data_dir", run.args.data_dir)
        command += ("--output_dir", folder / "evaluation", *(["--streaming"] if run.args.streaming else []))
        print(f"next{task}: python " + shlex.join(map(str, command)))
