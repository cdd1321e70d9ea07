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
from safetensors.torch import save_file
from torch import Tensor

from madm_utils.base_model import read_safetensors
from madm_utils.cli import UserError

STATE_NAME = "training_state"


def publish_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `folder`, then give it its final name, replacing an older one."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    earlier = folder.with_name(f".{folder.name}.tmp-{os.getpid()}-old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def remove_unfinished(output_dir: Path) -> None:
    """Delete what killed processes left half-written in a run folder."""
    for path in output_dir.glob(".*.tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def rotate_checkpoints(newest: Path, limit: int | None) -> None:
    """Delete checkpoints beside `newest` beyond `limit`, oldest first; call it after `newest` is published."""
    if limit is not None:
        others = [path for path in list_checkpoints(newest.parent) if path != newest]
        for path in others[: max(0, len(others) - (limit - 1))]:
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
    return path.resolve()


def save_training_state(
    folder: Path, step: int, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any | None
) -> None:
    """Write everything a run counts besides its model; tensors as safetensors, numbers as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in _flatten(values, f"{index}.").items():
            if isinstance(value, Tensor):
                # Cloned: the quantisation maps of 8-bit AdamW are shared between parameters.
                tensors[key] = value.detach().clone().contiguous()
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


def load_training_state(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any | None) -> int:
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


# Settings that may change when a run goes on; a change of any other would make it another run.
_FREE_SETTINGS = {
    "output_dir", "data_dir", "pretrained_model_name_or_path", "task_config", "max_train_steps",
    "dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "validation_steps", "logging_steps", "report_to", "logging_dir", "push_to_hub", "hub_model_id",
    "gradient_checkpointing", "allow_tf32",
}  # fmt: skip


def check_resume(checkpoint: Path, record: dict[str, Any], config: dict[str, Any], logger: Any) -> None:
    """Compare a checkpoint with the run that wants to go on from it.

    Args:
        checkpoint: finished checkpoint folder.
        record: what `run.json` of the present run will hold.
        config: `MADMModel.config` of the present run.
        logger: told about changed settings that do no harm.

    Raises:
        UserError: the checkpoint is of another task or model, or a setting changed that would make it another run;
            lists each as `key: was -> now`.
    """
    # Through JSON, because tuples and integer keys come back as lists and strings.
    now, flags = (json.loads(json.dumps(values)) for values in (_model_settings(config), _run_settings(record)))
    try:
        before = _model_settings(json.loads((checkpoint / "madm_config.json").read_text(encoding="utf-8")))
        path = checkpoint.parent / "run.json"
        recorded = _run_settings(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint}: its settings cannot be read ({type(error).__name__}: {error})") from None
    if not recorded:
        logger.warning(f"no run.json beside {checkpoint}: only its task and model are compared with this run")
    changed = {key: (recorded[key], flags[key]) for key in flags if key in recorded and recorded[key] != flags[key]}
    changes = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    changes |= {key: values for key, values in changed.items() if key not in _FREE_SETTINGS}
    if changes:
        listed = "; ".join(f"{key}: {was} -> {is_now}" for key, (was, is_now) in changes.items())
        raise UserError(
            f"{checkpoint} belongs to a run with other settings ({listed}); resume with the same ones, or start a new "
            "run in another --output_dir"
        )
    for key, (was, is_now) in changed.items():
        logger.info(f"resuming with another {key}: {was} -> {is_now}")


def _model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of `madm_config.json` decides whether weights fit."""
    task = config["task"]
    fields = ("name", "class_names", "palette", "source_label_map", "target_label_map")
    settings = {f"task {field}": task.get(field) for field in fields}
    return settings | {key: config[key] for key in ("resolution", "unet_tuning", "noise_in_latent_dtype")}


def _run_settings(record: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run, with the precision and the number of processes that came from the launcher."""
    return {**record["settings"], **{key: record[key] for key in ("mixed_precision", "num_processes")}}
