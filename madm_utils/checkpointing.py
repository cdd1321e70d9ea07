"""Checkpoints of a run: written whole under a temporary name, then renamed; old ones deleted afterwards.

output_dir/
    run.json                            merged settings, versions
    checkpoint-{step}/                  a model that loads like the final one (`modeling_madm`), and
        training_state.safetensors      tensors of the optimizer
        training_state.json             step, scheduler, gradient scaler, the optimizer's numbers
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from madm_utils.cli import UserError

STATE_NAME = "training_state"


def publish_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `folder`, then give it its final name, replacing an older one."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def rotate_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; call it after the new one is published."""
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


def resolve_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder for `--resume_from_checkpoint`: `latest`, or any path.

    Raises:
        UserError: there is none, or it cannot be resumed.
    """
    if name == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise UserError(
                f"--resume_from_checkpoint latest: no checkpoint-* in {output_dir}; start without the flag"
            )
        path = checkpoints[-1]
    else:
        path = Path(name) if Path(name).is_dir() else output_dir / name
    if not (path / f"{STATE_NAME}.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {name}: {path} is no training checkpoint (it lacks {STATE_NAME}.json); found "
            f"checkpoints: {', '.join(p.name for p in list_checkpoints(output_dir)) or 'none'}"
        )
    return path


def save_training_state(
    folder: Path, step: int, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any | None
) -> None:
    """Write everything a run counts besides its model; tensors as safetensors, numbers as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                numbers[f"{index}.{key}"] = value
    save_file(tensors, folder / f"{STATE_NAME}.safetensors")
    content = {
        "step": step,
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "optimizer": {"param_groups": state["param_groups"], "numbers": numbers},
    }
    (folder / f"{STATE_NAME}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_training_state(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any | None) -> int:
    """Restore what `save_training_state` wrote; returns the step to go on with."""
    content = json.loads((folder / f"{STATE_NAME}.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    entries = {**load_file(folder / f"{STATE_NAME}.safetensors"), **content["optimizer"]["numbers"]}
    for name, value in entries.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = content["optimizer"]["param_groups"]
    found, expected = ([len(g["params"]) for g in x] for x in (groups, optimizer.state_dict()["param_groups"]))
    if found != expected:
        raise UserError(
            f"{folder}: the optimizer has parameter groups of {found} tensors, this run has {expected}; resume with "
            "the same --unet_tuning, --rank and model settings"
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(content["scheduler"])
    if scaler is not None and content["scaler"] is not None:
        scaler.load_state_dict(content["scaler"])
    return content["step"]
