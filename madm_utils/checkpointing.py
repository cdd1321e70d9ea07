"""Checkpoints of a run: written whole under a temporary name, then renamed; old ones deleted afterwards.

output_dir/
    checkpoint-{step}/
        checkpoint.json                 marker, written last: step, settings and data of the run, sizes of all files
        madm_config.json, ...           a model that loads like the final one (`modeling_madm`), and
        training_state.safetensors      tensors of the optimizer
        training_state.json             step, scheduler, gradient scaler, the optimizer's numbers

In a run over several modalities everything but the marker is in one sub-folder per modality. A folder without marker
is not finished: nothing resumes from it, and rotation neither counts nor deletes it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from madm_utils.base_model import read_safetensors
from madm_utils.cli import UserError
from madm_utils.files import publish_folder
from madm_utils.run_identity import SIDE_EFFECTS, identity, may_change

if TYPE_CHECKING:
    from madm_utils.engines import OptimizerState

logger = logging.getLogger(__name__)

MARKER_NAME = "checkpoint.json"
STATE_NAME = "training_state"
FORMAT = 1
_WRITTEN = ("checkpoint-*", "final", "upload", "run.json", "README.md", "training_log.jsonl", "step-*.png")
"""What a training writes under temporary names; others may be those of an evaluation beside it."""
SAVE_ERRORS = (OSError, SafetensorError)
"""What writing a checkpoint raises when the disk is full or fails."""


# --- writing ---------------------------------------------------------------------------------------------------------


def publish_checkpoint(
    output_dir: Path,
    step: int,
    records: dict[str, dict[str, Any]],
    state: dict[str, Any],
    write: Callable[[Path], None],
) -> Path:
    """Write `checkpoint-{step}` so that it is there completely or not at all.

    Args:
        output_dir: run folder.
        step: optimiser steps done.
        records: what `run.json` holds, by name of the run's model ("" for a single one).
        state: small state of the whole run, plain JSON values.
        write: fills the (temporary) folder that it is given.

    Raises:
        OSError, SafetensorError: (`SAVE_ERRORS`) it could not be written; nothing is left of it.
    """
    folder = output_dir / f"checkpoint-{step}"

    def write_marked(temporary: Path) -> None:
        write(temporary)
        files = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
        marker = {
            "format": FORMAT,
            "step": step,
            "records": records,
            "state": state,
            "files": {name: path.stat().st_size for name, path in sorted(files.items())},
        }
        (temporary / MARKER_NAME).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")

    publish_folder(folder, write_marked)
    return folder


def rotate_checkpoints(newest: Path, limit: int | None) -> None:
    """Delete finished checkpoints beside `newest` beyond `limit`, oldest first; call it after `newest` is published.

    One that cannot be deleted stays, with a warning.
    """
    if limit is None:
        return
    others = [path for path in list_checkpoints(newest.parent) if path != newest]
    for path in others[: max(0, len(others) - (limit - 1))]:
        doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            # Renamed first, because a kill in the middle of deleting would leave a damaged checkpoint.
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning(f"{path} could not be deleted ({error})")


def remove_unfinished(output_dir: Path) -> None:
    """Delete what killed processes left half-written in a run folder and in those of its modalities."""
    _restore_replaced(output_dir)
    for path in [path for name in _WRITTEN for path in output_dir.glob(f"**/.{name}.tmp-*")]:
        remove = shutil.rmtree if path.is_dir() else os.unlink
        remove(path)


def _restore_replaced(output_dir: Path) -> None:
    """Give a checkpoint its name back that was set aside for a newer version when the process was killed."""
    for path in output_dir.glob(".checkpoint-*.tmp-*-old"):
        final = output_dir / re.fullmatch(r"\.(checkpoint-\d+)\.tmp-\d+-old", path.name)[1]
        if not final.exists():
            with suppress(FileNotFoundError):  # another process of this run was quicker
                path.rename(final)


# --- finding and checking --------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return [path for path in _checkpoint_folders(output_dir) if (path / MARKER_NAME).is_file()]


def _checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders named like checkpoints, finished or not, oldest first."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def resolve_checkpoint(output_dir: Path, name: str) -> Path:
    """The undamaged checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: run folder.
        name: `latest`, the newest finished one; `latest-valid`, the newest that is not damaged; or a path, also one
            inside `output_dir`.

    Raises:
        UserError: there is none, or it is damaged; the message names the file and what to do.
    """
    flag = f"--resume_from_checkpoint {name}"
    _restore_replaced(output_dir)
    checkpoints = list_checkpoints(output_dir)
    found = ", ".join(path.name for path in checkpoints) or "none"
    if name not in ("latest", "latest-valid"):
        path = Path(name) if Path(name).is_dir() else output_dir / name
        if not (path / MARKER_NAME).is_file():
            raise UserError(
                f"{flag}: {path} is no training checkpoint (it lacks {MARKER_NAME}, which is written last); found "
                f"checkpoints: {found}"
            )
        verify_checkpoint(path)
        return path.resolve()

    unfinished = [path.name for path in _checkpoint_folders(output_dir) if path not in checkpoints]
    if not checkpoints:
        lacking = f" that holds {MARKER_NAME}, only unfinished {', '.join(unfinished)}" if unfinished else ""
        raise UserError(f"{flag}: no checkpoint-* in {output_dir}{lacking}; start without the flag")
    if unfinished:
        logger.warning(f"passing over {', '.join(unfinished)} in {output_dir}: unfinished, without {MARKER_NAME}")
    damages = []
    for path in reversed(checkpoints):
        try:
            verify_checkpoint(path)
        except UserError as error:
            if name == "latest":
                others = "--resume_from_checkpoint latest-valid goes on from the newest undamaged one"
                raise UserError(f"{error}; {others if len(checkpoints) > 1 else 'there is no other one'}") from None
            damages.append(str(error))
            continue
        if damages:
            logger.warning(f"resuming from {path.name}, passing over damaged ones: {'; '.join(damages)}")
        return path.resolve()
    raise UserError(f"{flag}: every checkpoint is damaged: {'; '.join(damages)}; start again in another --output_dir")


def read_marker(folder: Path) -> dict[str, Any]:
    """Content of a checkpoint's marker: `step`, `records`, `state`, `files` (relative path -> bytes).

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    path = folder / MARKER_NAME
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        fits = marker["format"] == FORMAT
        kinds = {"step": int, "records": dict, "state": dict, "files": dict}
        if fits and not all(isinstance(marker[key], kind) for key, kind in kinds.items()):
            raise TypeError(f"expected {', '.join(f'{key} {kind.__name__}' for key, kind in kinds.items())}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {path.name}: {type(error).__name__}: {error}") from None
    if not fits:
        raise UserError(f"{path} has format {marker['format']}, this version reads {FORMAT}; update the suite")
    return marker


def verify_checkpoint(folder: Path) -> None:
    """Check that every file of a finished checkpoint is there, has its size, and begins as it should.

    Raises:
        UserError: naming the first damaged file.
    """
    for name, size in read_marker(folder)["files"].items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise ValueError(f"{found} bytes instead of {size}")
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # reads the header and compares it with the size
                    pass
        except (*SAVE_ERRORS, ValueError) as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else error
            raise UserError(f"checkpoint {folder} is damaged: {name}: {reason}") from None


# --- what a run counts besides its model -----------------------------------------------------------------------------


def save_training_state(
    folder: Path,
    step: int,
    optimizer: "torch.optim.Optimizer | OptimizerState",
    scheduler: Any,
    scaler: Any | None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write everything a run counts besides its model; tensors as safetensors, numbers as JSON.

    Args:
        folder: of the task.
        step: optimiser steps done.
        optimizer, scheduler, scaler: whose state it is.
        state: the optimizer's, where it takes all processes to gather it.
    """
    state = state or optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in _flatten(values, f"{index}.").items():
            if isinstance(value, Tensor):
                # Cloned: the quantisation maps of 8-bit AdamW are shared between parameters.
                # To the CPU, because a second set of moments may not fit on the GPU.
                tensors[key] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[key] = value
    save_file(tensors, folder / f"{STATE_NAME}.safetensors")
    content = {
        "step": step,
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "optimizer": {"class": _class_name(optimizer), "param_groups": state["param_groups"], "numbers": numbers},
    }
    (folder / f"{STATE_NAME}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_training_state(
    folder: Path, optimizer: "torch.optim.Optimizer | OptimizerState", scheduler: Any, scaler: Any | None
) -> int:
    """Restore what `save_training_state` wrote; returns the step to go on with.

    Raises:
        UserError: damaged files, or a state of another optimizer or of other parameters.
    """
    path = folder / f"{STATE_NAME}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved = content["optimizer"]
        groups, numbers, saved_class = saved["param_groups"], saved["numbers"], saved["class"]
        step, scheduler_state, scaler_state = content["step"], content["scheduler"], content["scaler"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); resume from an earlier checkpoint"
        ) from None
    found = [saved_class, *(len(group["params"]) for group in groups)]
    expected = [_class_name(optimizer), *(len(group["params"]) for group in optimizer.state_dict()["param_groups"])]
    if found != expected:
        raise UserError(
            f"{folder}: the state belongs to {found[0]} with groups of {found[1:]} tensors, this run has "
            f"{expected[0]} with {expected[1:]}; resume with the settings of the checkpoint's run"
        )
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**read_safetensors(folder / f"{STATE_NAME}.safetensors"), **numbers}.items():
        index, *outer, key = name.split(".")
        values = state.setdefault(int(index), {})
        for part in outer:
            values = values.setdefault(part, {})
        values[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(scheduler_state)
    if scaler is not None and scaler_state is not None:
        scaler.load_state_dict(scaler_state)
    return step


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Nested dictionaries as one, keys joined with dots."""
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    """Class of the optimizer inside accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def check_resume(checkpoint: Path, name: str, record: dict[str, Any], config: dict[str, Any], logger: Any) -> None:
    """Compare a checkpoint with the run that wants to go on from it.

    Args:
        checkpoint: finished checkpoint folder.
        name: of the run's model ("" for a single one).
        record: what `run.json` of the present run will hold.
        config: `MADMModel.config` of the present run.
        logger: told about changed settings that do no harm.

    Raises:
        UserError: the checkpoint is of another task, model or data, or a setting changed that would make it another
            run; lists each as `key: was -> now`.
    """
    records = read_marker(checkpoint)["records"]
    if name not in records:
        held, wanted = (", ".join(filter(None, names)) or "a single task" for names in (records, [name]))
        raise UserError(f"{checkpoint} holds {held}, this run trains {wanted}; resume with the same --task flags")
    # Through JSON, because tuples and integer keys come back as lists and strings.
    now = json.loads(json.dumps(identity(config, record)))
    try:
        config = json.loads((checkpoint / name / "madm_config.json").read_text(encoding="utf-8"))
        before = identity(config, records[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint}: its settings cannot be read ({type(error).__name__}: {error})") from None
    # A setting that only one of them has came or went with a version of the suite; a part of the data did not.
    keys = [key for key in {**before, **now} if key.startswith("data ") or (key in before and key in now)]
    changes = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)}
    harmful = [text for key, text in changes.items() if not may_change(key)]
    if harmful:
        raise UserError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(harmful)}); resume with the same ones, or "
            "start a new run in another --output_dir"
        )
    for key, text in changes.items():
        logger.info(f"resuming with another {text}{SIDE_EFFECTS.get(key, '')}")
