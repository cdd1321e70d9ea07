"""Which models an evaluation is about: their folders, names, tasks, all checked before any image is looked at."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madm_utils.base_model import local_folder
from madm_utils.cli import UserError
from madm_utils.model_folder import CONFIG_NAME, adapter_folders, built_in_approximations, read_config
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import Task, task_from_dict

FILES = ("confusion_matrix.csv", "confusion_matrix.png", "comparison.md", "comparison.csv", "report.html")
MARKS = ("metrics.json", "comparison.json")
PICTURE_FOLDERS = ("pictures", "worst")
RESERVED = frozenset((*FILES, *MARKS, *PICTURE_FOLDERS))
"""What else lies in the folder of results, where a model's sub-folder cannot have the same name."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One row of a comparison: a model, or several that answer together."""

    name: str
    """Of its row and of its folder in the results."""
    paths: tuple[str, ...]
    """What was asked for; several are an ensemble. The adapter of a run over several modalities is appended."""
    folders: tuple[Path, ...]
    task: Task
    resolution: int

    def load(self, weights: str, base: str | None, vae_decoder: str | None = None) -> list[MADMModel]:
        """The networks, on the CPU; all as `MADMModel.from_pretrained` takes it, `vae_decoder` where there is one."""
        decoders = [vae_decoder if read_config(folder).vae_decoder else None for folder in self.folders]
        return [
            MADMModel.from_pretrained(folder, weights, base=base, vae_decoder=decoder)
            for folder, decoder in zip(self.folders, decoders, strict=True)
        ]

    def built_in_approximations(self) -> dict[str, Any]:
        """See `model_folder`; of an ensemble with differing networks, each one's value."""
        each = [built_in_approximations(folder) for folder in self.folders]
        values = {key: [one[key] for one in each] for key in each[0]}
        return {key: found[0] if len(set(found)) == 1 else found for key, found in values.items()}


def find_models(model_paths: Sequence[str], names: Sequence[str] = (), ensemble: bool = False) -> list[EvaluatedModel]:
    """Look at the folders, or Hub ids, that `--model_path` names.

    A run over several modalities counts as its adapters.

    Args:
        model_paths: in the order of the rows.
        names: one per row; default: what tells the paths apart.
        ensemble: take all of them as one.

    Raises:
        UserError: no model there, one given twice (also by another path), names that do not fit or are those of
            result files, or models that cannot be an ensemble.
    """
    found: dict[str, Path] = {}
    resolved: set[Path] = set()
    for path in model_paths:
        adapters = adapter_folders(path)
        for adapter, folder in (adapters or {"": local_folder(path, expected=CONFIG_NAME)}).items():
            key = f"{path.rstrip('/')}/{adapter}" if adapter else path
            if folder.resolve() in resolved:
                raise UserError(f"--model_path names {key} twice; a model is compared with others")
            resolved.add(folder.resolve())
            found[key] = folder
    models = [
        EvaluatedModel(name, (path,), (folder,), *_stored_settings(folder))
        for (path, folder), name in zip(found.items(), distinct_names(list(found)), strict=True)
    ]
    if ensemble:
        models = [_as_one(models)]
    if not names:
        return models
    if len(names) != len(models):
        raise UserError(
            f"--names needs one name for each of {', '.join(model.name for model in models)}; got {len(names)}: "
            f"{', '.join(names)}"
        )
    if len({_safe(name).lower() for name in names}) < len(names):
        raise UserError(f"--names must differ, also as names of folders; got {', '.join(names)}")
    reserved = [name for name in names if _safe(name).lower() in RESERVED]
    if reserved:
        raise UserError(
            f"--names: {', '.join(reserved)} would be the folder of a model's results, and the results have a file or "
            "folder of that name; give another name"
        )
    return [dataclasses.replace(model, name=name) for name, model in zip(names, models, strict=True)]


def folder_name(model: EvaluatedModel) -> str:
    """Name of the sub-folder with the model's results."""
    return _safe(model.name)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Per path the shortest ending that no other path has, numbered where it cannot be the name of a folder.

    It cannot where another ending gives the same name, or where results have that name (`RESERVED`).
    """
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..")] or [path] for path in paths]
    names = []
    for own in parts:
        endings = ("/".join(own[-count:]) for count in range(1, len(own) + 1))
        shared = ["/".join(other) for other in parts if other is not own]
        names.append(next((e for e in endings if not any(f"/{o}".endswith(f"/{e}") for o in shared)), "/".join(own)))
    safe = [_safe(name).lower() for name in names]
    taken = RESERVED.union(safe)
    for k, name in enumerate(names):
        if safe.count(safe[k]) > 1 or safe[k] in RESERVED:
            numbered = (f"{name} ({number})" for number in itertools.count(1))
            names[k] = next(candidate for candidate in numbered if _safe(candidate).lower() not in taken)
            taken |= {_safe(names[k]).lower()}
    return names


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _stored_settings(folder: Path) -> tuple[Task, int]:
    """Task and training resolution of a model folder; everything else is checked when it is loaded."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return task_from_dict(config["task"], where=str(path)), int(config["resolution"])
    except UserError:
        raise  # a `ValueError` too, but it says already what is wrong
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); download or train again") from None


def _as_one(models: Sequence[EvaluatedModel]) -> EvaluatedModel:
    """The ensemble of models of one task."""
    first = models[0]
    if len(models) < 2:
        raise UserError(f"--ensemble needs at least two models, got {first.name}")
    for model in models[1:]:
        for what in ("name", "class_names", "target", "target_label_map"):
            if getattr(model.task, what) != getattr(first.task, what):
                raise UserError(
                    f"--ensemble needs models of one task: {first.name} is of '{first.task.name}', {model.name} of "
                    f"'{model.task.name}' (another {what}); leave --ensemble out to compare them"
                )
        if model.resolution != first.resolution:
            raise UserError(
                f"--ensemble needs models of one resolution: {first.name} has {first.resolution}, {model.name} "
                f"{model.resolution}"
            )
    paths, folders = (tuple(getattr(model, key)[0] for model in models) for key in ("paths", "folders"))
    return EvaluatedModel(f"ensemble of {len(models)}", paths, folders, first.task, first.resolution)
