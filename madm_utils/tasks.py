"""Adaptation tasks: which data, which classes and colours, which sizes, which published hyper-parameters.

The six built-in tasks are listed in `TASKS`. A user's own task is a JSON or YAML file with the fields of `Task`
(`docs/tasks.md`), read and checked by `load_task`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from madm_utils.cli import UserError
from madm_utils.label_spaces import (
    IGNORE_INDEX,
    STREET_CLASSES,
    STREET_CLASSES_WITHOUT_WALL_AND_FENCE,
    STREET_PALETTE,
)

LabelMap = dict[int, int]


@dataclass(frozen=True)
class Task:
    """One adaptation task.

    Sizes are (height, width) in pixels, before the random crop of `resolution` x `resolution`, and belong to this
    `resolution`: training at another `--resolution` scales them in proportion.
    """

    name: str
    source: str
    """Folder of the labelled source dataset in the prepared data, e.g. `cityscapes`."""
    target: str
    """Folder of the unlabelled target dataset in the prepared data, e.g. `deliver`."""
    modality: str
    """Name of the target modality; also the name of the LoRA adapter."""
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """One RGB colour per class, all different: label palette and latent regression regresses to them."""
    source_label_map: LabelMap | None = None
    """Class id of the prepared source dataset -> class id of this task; `None`: they are the same."""
    target_label_map: LabelMap | None = None
    """Class id of the labelled target splits -> class id of this task; `None`: they are the same."""
    resolution: int = 512
    source_size: tuple[int, int] = (512, 1024)
    target_size: tuple[int, int] = (512, 512)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Defaults of `train_madm.py` flags for this task, by flag name without the dashes."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def scaled_size(self, size: tuple[int, int], resolution: int) -> tuple[int, int]:
        """`size` of this task at another training resolution, never below `resolution`."""
        return tuple(max(resolution, round(side * resolution / self.resolution)) for side in size)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; `load_task` reads it back."""
        return dataclasses.asdict(self)


_CITYSCAPES_TO_STREET = {
    0: 5, 1: 6, 2: 1, 3: 9, 4: 2, 5: 4, 6: 10, 7: 10, 8: 7, 9: 7,
    10: 0, 11: 3, 12: 3, 13: 8, 14: 8, 15: 8, 16: 8, 17: 8, 18: 8,
}  # fmt: skip
_CITYSCAPES_TO_STREET_9 = {
    0: 4, 1: 5, 2: 1, 3: 255, 4: 255, 5: 3, 6: 8, 7: 8, 8: 6, 9: 6,
    10: 0, 11: 2, 12: 2, 13: 7, 14: 7, 15: 7, 16: 7, 17: 7, 18: 7,
}  # fmt: skip
_DELIVER_TO_STREET = {
    0: 1, 1: 2, 2: 255, 3: 3, 4: 4, 5: 5, 6: 5, 7: 6, 8: 7, 9: 8, 10: 9, 11: 10, 12: 0, 13: 255, 14: 255, 15: 255,
    16: 255, 17: 10, 18: 255, 19: 255, 20: 255, 21: 7, 22: 8, 23: 8, 24: 8,
}  # fmt: skip
_FMB_TO_STREET_9 = {
    0: 255, 1: 4, 2: 5, 3: 1, 4: 8, 5: 8, 6: 6, 7: 0, 8: 2, 9: 7, 10: 7, 11: 7, 12: 7, 13: 7, 14: 3,
}  # fmt: skip
_STREET_TO_STREET_9 = {
    i: STREET_CLASSES_WITHOUT_WALL_AND_FENCE.index(name)
    if name in STREET_CLASSES_WITHOUT_WALL_AND_FENCE
    else IGNORE_INDEX
    for i, name in enumerate(STREET_CLASSES)
}

_STREET = {"class_names": STREET_CLASSES, "palette": tuple(STREET_PALETTE[name] for name in STREET_CLASSES)}
_STREET_9 = {
    "class_names": STREET_CLASSES_WITHOUT_WALL_AND_FENCE,
    "palette": tuple(STREET_PALETTE[name] for name in STREET_CLASSES_WITHOUT_WALL_AND_FENCE),
}
# Published settings per modality (specs of the released configs): DPLG range and end, LPLR loss and weights.
_DEPTH = {"dplg_timestep": [60, 61], "dplg_end_step": 5000, "lplr_loss": "both", "lplr_weight": [1.0, 1.0]}
_INFRARED = {"dplg_timestep": [50, 51], "dplg_end_step": 8000, "lplr_loss": "both", "lplr_weight": [1.0, 1.0]}
_EVENT = {"dplg_timestep": [50, 51], "dplg_end_step": 8000, "lplr_loss": "source", "lplr_weight": [20.0, 20.0]}
# The published schedules take 10,000 steps with one learning rate. These fit the small model of this repository: a
# pre-trained UNet keeps what it knows at a low rate, a head from scratch needs a high one; one weight for all pixels
# carries wrong labels of thin classes along; event gains from regressing mixed images too (docs/experiments.md).
_SYNTHETIC = {"max_train_steps": 800, "learning_rate": 1e-4, "head_lr_multiplier": 30, "ema_decay": 0.99,
              "max_grad_norm": 1.0, "rare_class_min_pixels": 20, "pseudo_label_weight": "pixel",
              "lplr_loss": "both", "lplr_weight": [1.0, 1.0], "lplr_mask": "mixed"}  # fmt: skip

TASKS = {
    task.name: task
    for task in (
        Task("cityscapes_to_deliver_depth", "cityscapes", "deliver", "depth", **_STREET,
             source_label_map=_CITYSCAPES_TO_STREET, target_label_map=_DELIVER_TO_STREET,
             target_size=(712, 712), hyperparameters=_DEPTH),
        Task("cityscapes_to_fmb_infrared", "cityscapes", "fmb", "infrared", **_STREET_9,
             source_label_map=_CITYSCAPES_TO_STREET_9, target_label_map=_FMB_TO_STREET_9,
             target_size=(512, 683), hyperparameters=_INFRARED),
        Task("cityscapes_to_dsec_event", "cityscapes", "dsec", "event", **_STREET,
             source_label_map=_CITYSCAPES_TO_STREET, target_size=(512, 768), hyperparameters=_EVENT),
        Task("synthetic_to_depth", "synthetic_rgb", "synthetic_depth", "depth", **_STREET,
             resolution=128, source_size=(128, 128), target_size=(128, 128),
             hyperparameters={**_DEPTH, **_SYNTHETIC, "dplg_end_step": 400}),
        Task("synthetic_to_infrared", "synthetic_rgb", "synthetic_infrared", "infrared", **_STREET_9,
             source_label_map=_STREET_TO_STREET_9, target_label_map=_STREET_TO_STREET_9,
             resolution=128, source_size=(128, 128), target_size=(128, 128),
             hyperparameters={**_INFRARED, **_SYNTHETIC, "dplg_end_step": 640}),
        Task("synthetic_to_event", "synthetic_rgb", "synthetic_event", "event", **_STREET,
             resolution=128, source_size=(128, 128), target_size=(128, 128),
             hyperparameters={**_EVENT, **_SYNTHETIC, "dplg_end_step": 640, "lplr_weight": [3.0, 3.0]}),
    )
}  # fmt: skip


def load_task(name: str | None = None, config: str | Path | None = None) -> Task:
    """Return the built-in task `name`, or the user's task in the JSON or YAML file `config`.

    Raises:
        UserError: unknown name, both or neither given, unreadable file, or a field that does not fit.
    """
    if (name is None) == (config is None):
        raise UserError(f"give either --task NAME or --task_config FILE; tasks: {', '.join(TASKS)}")
    if name is not None:
        if name not in TASKS:
            raise UserError(
                f"unknown task '{name}'; tasks: {', '.join(TASKS)}. For your own task use --task_config FILE."
            )
        return TASKS[name]
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"task file {path} cannot be read ({error.strerror}); give a JSON or YAML file") from None
    import yaml  # JSON is YAML, so one reader serves both; imported here to keep start-up quick

    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"task file {path} is neither JSON nor YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(fields, dict):
        raise UserError(f"task file {path} holds {type(fields).__name__}; expected an object with fields of a task")
    return task_from_dict(fields, where=str(path))


def task_from_dict(fields: Mapping[str, Any], where: str) -> Task:
    """Build and validate a `Task` from plain JSON values; `where` names their origin in error messages."""
    known = {f.name: f for f in dataclasses.fields(Task)}
    required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    unknown, missing = sorted(set(fields) - set(known)), [n for n in required if n not in fields]
    if unknown or missing:
        raise UserError(
            f"{where}: " + "; ".join(
                ([f"unknown fields {unknown}"] if unknown else []) + ([f"missing fields {missing}"] if missing else [])
            ) + f". A task has {', '.join(known)}."
        )  # fmt: skip
    try:
        values = dict(fields)
        values["class_names"] = tuple(str(n) for n in values["class_names"])
        values["palette"] = tuple(tuple(int(c) for c in color) for color in values["palette"])
        for key in ("source_label_map", "target_label_map"):
            if values.get(key) is not None:
                values[key] = {int(k): int(v) for k, v in values[key].items()}
        for key in ("source_size", "target_size"):
            if key in values:
                values[key] = tuple(int(side) for side in values[key])
        values["resolution"] = int(values.get("resolution", 512))
        values["hyperparameters"] = dict(values.get("hyperparameters") or {})
        task = Task(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: a field has the wrong form ({error}); see docs/tasks.md") from None
    _validate(task, where)
    return task


def _validate(task: Task, where: str) -> None:
    classes = task.num_classes
    problems = []
    for key in ("name", "source", "target", "modality"):
        # They become folder names, and the modality the name of an adapter, in which a dot would mean a sub-module.
        if not isinstance(getattr(task, key), str) or not re.fullmatch(r"[A-Za-z0-9_-]+", getattr(task, key)):
            problems.append(f"{key} is made of letters, digits, _ and -, got {getattr(task, key)!r}")
    if not 2 <= classes <= 254 or len(set(task.class_names)) != classes:
        problems.append(f"class_names needs 2 to 254 different names, got {list(task.class_names)}")
    if len(task.palette) != classes:
        problems.append(f"palette has {len(task.palette)} colours for {classes} classes")
    if any(len(color) != 3 or not all(0 <= c <= 255 for c in color) for color in task.palette):
        problems.append("every palette colour is [red, green, blue] with values 0..255")
    if len(set(task.palette)) != len(task.palette):
        problems.append("palette colours must differ: latent regression tells classes apart by colour")
    for key in ("source_label_map", "target_label_map"):
        bad = [v for v in (getattr(task, key) or {}).values() if not (0 <= v < classes or v == IGNORE_INDEX)]
        bad += [k for k in getattr(task, key) or {} if not 0 <= k <= 255]
        if bad:
            problems.append(
                f"{key} maps 0..255 to 0..{classes - 1} or {IGNORE_INDEX} (ignore), got {sorted(set(bad))}"
            )
    if task.resolution < 64 or task.resolution % 64:
        problems.append(f"resolution is a multiple of 64, got {task.resolution}")
    for key in ("source_size", "target_size"):
        size = getattr(task, key)
        if len(size) != 2 or min(size) < task.resolution:
            problems.append(f"{key} is [height, width], both at least resolution {task.resolution}, got {list(size)}")
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))
