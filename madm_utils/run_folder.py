"""What a training run writes where, besides its checkpoints and logs.

output_dir/
    run.json, README.md                 merged settings, data, versions; model card
    madm_config.json, segmenter/, ...   the trained model (`modeling_madm`)
    checkpoint-{step}/                  (`checkpointing`)
    logs/, training_log.jsonl, validation/  (`tracking`)

A run over several modalities has run.json, README.md and the model in one sub-folder per modality.
"""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from madm_utils.checkpointing import (
    SAVE_ERRORS,
    list_checkpoints,
    publish_checkpoint,
    resolve_checkpoint,
    rotate_checkpoints,
    save_training_state,
)
from madm_utils.cli import UserError
from madm_utils.files import check_writable, replacing
from madm_utils.hub import HubUpload, device_name, versions
from madm_utils.model_card import write_model_card
from madm_utils.model_folder import CONFIG_NAME
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import Task

if TYPE_CHECKING:
    from train_madm import Run, State

logger = get_logger(__name__)


def check_output_dir(args: Namespace) -> Path | None:
    """Refuse a folder that holds another run or cannot be written, before anything is loaded.

    Returns:
        The checkpoint to resume from; None for a new run.
    """
    output_dir = Path(args.output_dir)
    check_writable(output_dir)
    # A run that ended before its first checkpoint left a record and logs, nothing to lose.
    models = [output_dir / CONFIG_NAME, *output_dir.glob(f"[!.]*/{CONFIG_NAME}")]
    holds_run = any(path.exists() for path in models) or bool(list_checkpoints(output_dir))
    if args.resume_from_checkpoint:
        checkpoint = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
        if holds_run and checkpoint.parent != output_dir.resolve():
            raise UserError(
                f"--output_dir {output_dir} already holds a run, and {checkpoint} belongs to another one; give a new "
                "--output_dir to branch off from that checkpoint"
            )
        return checkpoint
    if holds_run:
        go_on = ", or go on with it: --resume_from_checkpoint latest" if list_checkpoints(output_dir) else ""
        raise UserError(
            f"--output_dir {output_dir} already holds a run; give another folder, or delete this one{go_on}"
        )
    return None


def run_record(args: Namespace, task: Task, fingerprints: dict[str, str], accelerator: Accelerator) -> dict:
    """What `run.json` holds.

    Args:
        args: the merged settings of a task.
        task: the task.
        fingerprints: of what the run starts from: split of the data, `base model` -> digest.
        accelerator: of the run.
    """
    return {
        "settings": public_settings(args),
        "task": task.to_dict(),
        "data": fingerprints,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "engine": accelerator.distributed_type.value,
        "device": device_name(accelerator.device),
        "versions": versions(),
    }


def public_settings(args: Namespace) -> dict:
    """The settings without the token."""
    return {key: value for key, value in vars(args).items() if key != "hub_token"}


def write_record(folder: Path, record: dict) -> None:
    """Write `run.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(runs: Sequence["Run"], state: "State", upload: HubUpload | None, accelerator: Accelerator) -> None:
    """Publish `checkpoint-{step}`, then delete old ones. Call it on every rank; the main one writes.

    One that cannot be written (disk full) is given up with a warning: the earlier ones stay, training goes on.
    """
    args, step = runs[0].args, runs[0].step
    weights = [trained_weights(run, accelerator) for run in runs]
    moments = [run.optimizer_state.state_dict(keep=accelerator.is_main_process) for run in runs]

    def write(folder: Path) -> None:
        for run, tensors, values in zip(runs, weights, moments, strict=True):
            accelerator.unwrap_model(run.model).save_pretrained(folder / run.name, run.teacher, tensors)
            save_training_state(
                folder / run.name, run.step, run.optimizer_state, run.scheduler, accelerator.scaler, values
            )

    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        records = {run.name: record(run, accelerator) for run in runs}
        try:
            checkpoint = publish_checkpoint(output_dir, step, records, vars(state), write)
        except SAVE_ERRORS as error:
            logger.warning(
                f"checkpoint-{step} could not be written ({error}); the next one is tried at its time; checkpoints "
                f"kept: {', '.join(path.name for path in list_checkpoints(output_dir)) or 'none'}"
            )
        else:
            rotate_checkpoints(checkpoint, args.checkpoints_total_limit)
            if upload is not None:
                upload.checkpoint(checkpoint)
    accelerator.wait_for_everyone()


def save_final_model(runs: Sequence["Run"], accelerator: Accelerator) -> None:
    """Write the trained models and their cards into the run folder. Call it on every rank; the main one writes."""
    accelerator.wait_for_everyone()
    weights = [trained_weights(run, accelerator) for run in runs]
    if not accelerator.is_main_process:
        return
    output_dir = Path(runs[0].args.output_dir)
    for run, tensors in zip(runs, weights, strict=True):
        student: MADMModel = accelerator.unwrap_model(run.model)
        publish_model(output_dir / run.name, partial(student.save_pretrained, teacher=run.teacher, state=tensors))
    scores = {r.name: {"task": r.task.name, "protocol": "paper", **r.scores} for r in runs if r.scores}
    try:
        write_model_card(output_dir, {run.name: record(run, accelerator) for run in runs}, scores)
    except OSError as error:
        logger.warning(f"the model is complete, its card README.md could not be written ({error})")


def trained_weights(run: "Run", accelerator: Accelerator) -> dict[str, dict[str, Tensor]]:
    """Whole tensors of what a task trains, on the main process. Call it on every rank."""
    student: MADMModel = accelerator.unwrap_model(run.model)
    return student.trained_state(keep=accelerator.is_main_process)


def record(run: "Run", accelerator: Accelerator) -> dict:
    """What `run.json` of a task holds."""
    return run_record(run.args, run.task, run.fingerprints, accelerator)


def publish_model(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a temporary folder, then move each part of the model to the top of `folder`.

    Raises:
        UserError: it cannot be written, e.g. because the disk is full.
    """
    staging = folder / f".final.tmp-{os.getpid()}"
    try:
        save(staging)
        # The configuration goes first and comes last: a folder that has it has everything.
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            path.replace(folder / path.name)
    except SAVE_ERRORS as error:
        checkpoints = list_checkpoints(folder) or list_checkpoints(folder.parent)
        go_on = "finish with the same command and --resume_from_checkpoint latest" if checkpoints else "start again"
        raise UserError(
            f"the trained model could not be written to {folder} ({error}); make room, then {go_on}"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
