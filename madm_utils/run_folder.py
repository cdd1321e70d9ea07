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
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from madm_utils.checkpointing import SAVE_ERRORS, list_checkpoints, resolve_checkpoint
from madm_utils.cli import UserError
from madm_utils.files import check_writable, replacing
from madm_utils.hub import device_name, versions
from madm_utils.modeling_madm import CONFIG_NAME
from madm_utils.tasks import Task


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
    """What `run.json` holds: the merged settings, the task, the data (split -> fingerprint), and the versions."""
    return {
        "settings": public_settings(args),
        "task": task.to_dict(),
        "data": fingerprints,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
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


def publish_model(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a temporary folder, then move each part of the model to the top of `folder`.

    Raises:
        UserError: it cannot be written, e.g. because the disk is full.
    """
    staging = folder / f".final.tmp-{os.getpid()}"
    try:
        save(staging)
    except SAVE_ERRORS as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"the trained model could not be written to {folder} ({error}); make room, then finish with the same "
            "command and --resume_from_checkpoint latest"
        ) from None
    # The configuration goes first and comes last: a folder that has it has everything.
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".json"):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)
    staging.rmdir()
