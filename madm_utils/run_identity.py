"""What makes a run that goes on from a checkpoint the same run."""

from typing import Any

_FREE_SETTINGS = {
    "output_dir", "data_dir", "streaming", "pretrained_model_name_or_path", "task_config", "max_train_steps",
    "dry_run", "dataloader_num_workers", "max_corrupt_samples", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "preempt_signal", "validation_steps", "validate_on", "logging_steps", "report_to",
    "logging_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "gradient_checkpointing",
    "allow_tf32", "compile", "vae_decoder", "device", "engine", "versions",
}  # fmt: skip

SIDE_EFFECTS = {"max_train_steps": "; schedules that depend on the length of the training are stretched"}
"""What to know about a free setting that has changed."""


def identity(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides about a run's numbers, flat.

    Args:
        config: what `madm_config.json` holds.
        record: what `run.json` holds.
    """
    task = config["task"]
    values = {f"task {field}": value for field, value in task.items() if field != "hyperparameters"}
    values |= {key: config[key] for key in ("resolution", "unet_tuning", "noise_in_latent_dtype")}
    # What held before there was a flag, then the flags, and what came from the launcher and the machine.
    before_flags = {"head_resolution": 1} | ({"lora_lr_multiplier": 1.0} if config["unet_tuning"] == "lora" else {})
    values |= (
        before_flags
        | record["settings"]
        | {key: record[key] for key in ("mixed_precision", "num_processes", "device", "engine")}
    )
    values["world size x batch"] = record["num_processes"] * record["settings"]["train_batch_size"]
    for group in ("data", "versions"):
        values |= {f"{group} {key}": value for key, value in record[group].items()}
    return values


def may_change(key: str) -> bool:
    """Whether a run stays the same when this entry of its `identity` changes."""
    return key.split(" ")[0] in _FREE_SETTINGS
