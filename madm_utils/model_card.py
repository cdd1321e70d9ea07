"""Model card of a run: `README.md` with Hub metadata, rendered from `model_card_template.md`."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madm_utils.cli import UserError
from madm_utils.files import replacing
from madm_utils.tasks import Task, task_from_dict

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_SAMPLE = "sample.png"
_SEVERAL = "multi-adapter"
"""Tag of the card above several adapters; tells it from a README of somebody else."""
_METRICS = {
    "miou": ("mean_iou", "mIoU"),
    "macc": ("mean_accuracy", "mAcc"),
    "pacc": ("overall_accuracy", "pAcc"),
    "fwiou": ("frequency_weighted_iou", "fwIoU"),
}
_BASE_LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
}
_DATA_TERMS = {
    "cityscapes": "research use only; neither the data nor modified versions of it may be passed on",
    "deliver": "no licence of the data is stated; its owners ask to be contacted about commercial use",
    "fmb": "no licence is stated; the data may not be passed on",
    "dsec": "the terms on dsec.ifi.uzh.ch",
}
_SYNTHETIC = "synthetic_"
_UNET = {True: "a LoRA of the UNet", False: "the tuned UNet"}


def write_model_card(
    folder: Path, records: Mapping[str, dict[str, Any]], metrics: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Write `README.md` with Hub metadata, and a copy of the newest validation picture as `sample.png`.

    The picture is left out where the terms of the data forbid passing its images on, or are unknown, unless the
    repository is to be private.

    Args:
        folder: run folder.
        records: what `run.json` holds, by name of the run's model: "" for a single one; with several, each name's
            sub-folder gets a card of its own and the run folder one that lists them.
        metrics: what `metrics.json` of an evaluation holds, by the same names.
    """
    several = len(records) > 1
    for name, record in records.items():
        _write_card(folder / name, record, (metrics or {}).get(name), adapter=name if several else "")
    if several:
        _write_overview(folder, records)


def write_pipeline_card(folder: Path, repo: str, settings: Mapping[str, dict[str, Any]]) -> None:
    """Write the card of a model of which no more is known than how it works: not how it was trained.

    Args:
        folder: holds the model; with several adapters, its sub-folders do, and each gets a card of its own.
        repo: id on the Hub.
        settings: what `madm_config.json` holds, by name of the adapter.
    """
    from huggingface_hub import ModelCardData

    several = len(settings) > 1
    rows = []
    for name, config in settings.items():
        task = task_from_dict(config["task"], where=repo)
        lora = config["unet_tuning"] == "lora"
        hub_id, base = _base(config["base_model"])
        data = ModelCardData(**_metadata(hub_id, lora, [task.modality]), license="other")
        _render(
            folder / name if several else folder, data, title=f"MADM: {task.name}", task=task, source_only=None,
            base=base, weights=f"{_UNET[lora]}, the segmentation head and the conditioning", sample=False,
            shareable=True, classes=task.class_names, repo=repo, adapter=name if several else "",
            base_is_on_hub=bool(hub_id), lora=lora, licences=_licences(hub_id, base, task),
        )  # fmt: skip
        row = {"name": name, "source": task.source, "target": task.target, "miou": _percent(None)}
        rows.append(row | {"num_classes": task.num_classes})
    if several:
        data = ModelCardData(**_metadata(hub_id, True, [_SEVERAL, *settings]), license="other")
        _render(
            folder, data, title=f"MADM: {', '.join(settings)}", adapters=rows, base=base,
            base_is_on_hub=bool(hub_id), repo=repo, adapter=next(iter(settings)), lora=True,
        )  # fmt: skip


def update_model_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Write the scores of an evaluation into the card of a finished run.

    Args:
        folder: run folder, or the sub-folder of one modality (the card above it follows).
        metrics: what `metrics.json` holds.

    Raises:
        UserError: no run folder, or scores of another task.
    """
    record = _read_record(folder)
    if metrics["task"] != record["task"]["name"]:
        raise UserError(
            f"{folder} was trained for '{record['task']['name']}', the scores are of '{metrics['task']}'; evaluate "
            "the model of this folder"
        )
    above = folder.resolve().parent
    several = _is_overview(above / "README.md")
    _write_card(folder, record, metrics, adapter=folder.resolve().name if several else "")
    if several:
        names = sorted(path.parent.name for path in above.glob("[!.]*/run.json"))
        _write_overview(above, {name: _read_record(above / name) for name in names})


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"settings", "task", "mixed_precision", "num_processes", "versions"} - record.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give the --output_dir of a finished training run") from None
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; give the --output_dir of a finished training run")
    return record


def _is_overview(path: Path) -> bool:
    from huggingface_hub import ModelCard

    try:
        return _SEVERAL in (ModelCard.load(path).data.tags or ())
    except (OSError, ValueError, TypeError):  # absent, or a README of somebody else
        return False


def _write_card(folder: Path, record: dict[str, Any], metrics: dict[str, Any] | None, adapter: str) -> None:
    from huggingface_hub import ModelCardData

    settings, task = record["settings"], task_from_dict(record["task"], where=str(folder / "run.json"))
    lora, source_only = settings["unet_tuning"] == "lora", settings["source_only"]
    hub_id, base = _base(settings)
    synthetic = task.source.startswith(_SYNTHETIC) and task.target.startswith(_SYNTHETIC)
    shareable = synthetic or bool(settings.get("hub_private_repo"))
    repo = settings.get("hub_model_id") or (folder.resolve().parent if adapter else folder.resolve()).name
    pictures = folder.resolve().parent / "validation" / adapter if adapter else folder / "validation"
    data = ModelCardData(
        **_metadata(hub_id, lora, [task.modality]),
        license=_BASE_LICENCES.get(hub_id, "other") if synthetic else "other",
        model_name=repo.split("/")[-1],
        eval_results=_eval_results(task, metrics) if metrics else None,
    )
    _render(
        folder, data, title=f"MADM: {task.name}", task=task, source_only=source_only, base=base,
        weights=f"{_UNET[lora]}, the segmentation head and the conditioning",
        sample=_copy_sample(folder, pictures, shareable), shareable=shareable, classes=task.class_names,
        repo=repo, adapter=adapter, base_is_on_hub=bool(hub_id), lora=lora, metrics=metrics,
        measured=_measured(metrics) if metrics else None, overall=_overall(metrics or {}),
        per_class=_per_class(metrics or {}), settings=_shown_settings(record, task),
        record={"device": "unknown device", **record}, licences=_licences(hub_id, base, task),
        software=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )  # fmt: skip


def _write_overview(folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Write the card above several adapters; their scores come from the cards of the sub-folders."""
    from huggingface_hub import ModelCard, ModelCardData

    settings = next(iter(records.values()))["settings"]
    hub_id, base = _base(settings)
    results: list[EvalResult] = []
    rows = []
    for name, record in records.items():
        own = ModelCard.load(folder / name / "README.md").data.eval_results or []
        score = next((result.metric_value for result in own if result.metric_name == "mIoU"), None)
        task = record["task"]
        row = {"name": name, "source": task["source"], "target": task["target"], "miou": _percent(score)}
        rows.append(row | {"num_classes": len(task["class_names"])})
        results += own
    repo = settings.get("hub_model_id") or folder.resolve().name
    data = ModelCardData(
        **_metadata(hub_id, True, [_SEVERAL, *records]),
        license="other",
        model_name=repo.split("/")[-1],
        eval_results=results or None,
    )
    _render(
        folder, data, title=f"MADM: {', '.join(records)}", adapters=rows, base=base, base_is_on_hub=bool(hub_id),
        repo=repo, adapter=next(iter(records)), lora=True,
    )  # fmt: skip


def _render(folder: Path, data: "ModelCardData", **values: Any) -> None:
    from huggingface_hub import ModelCard

    with replacing(folder / "README.md") as temporary:
        ModelCard.from_template(data, template_path=str(_TEMPLATE), **values).save(temporary)


def _metadata(hub_id: str | None, lora: bool, tags: Sequence[str]) -> dict[str, Any]:
    """Fields that every card has."""
    return {
        "library_name": "diffusers",
        "pipeline_tag": "image-segmentation",
        "tags": ["madm", "domain-adaptation", "semantic-segmentation", *tags, *(["lora"] if lora else [])],
        "base_model": hub_id,
        "base_model_relation": ("adapter" if lora else "finetune") if hub_id else None,
    }


def _base(settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """Hub id of the base model (None for a local folder), and its name without the place on this machine."""
    base = settings["pretrained_model_name_or_path"]
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).exists()
    return (base, base) if on_hub else (None, Path(base).name)


def _eval_results(task: Task, metrics: Mapping[str, Any]) -> list["EvalResult"] | None:
    """The scores as `model-index` metadata; scores that are not defined are left out."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=task.target,
            dataset_name=f"{task.target} ({task.modality})",
            dataset_split=metrics["split"],
            dataset_args={**_measured(metrics), "num_images": metrics["num_images"]},
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics[key], 2),
        )
        for key, (kind, name) in _METRICS.items()
        if metrics[key] is not None
    ] or None


def _measured(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Protocol, and which weights were measured; during training it is the student."""
    return {"protocol": metrics["protocol"], "weights": metrics.get("settings", {}).get("weights", "student")}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "\\|")


def _overall(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _percent(metrics[key])) for key, (_, name) in _METRICS.items() if key in metrics]


def _per_class(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = metrics.get("per_class", {}).items()
    return [{"name": _cell(name), "iou": _percent(row["iou"]), "acc": _percent(row["acc"])} for name, row in rows]


def _shown_settings(record: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """The settings that a reader asks for first."""
    s = record["settings"]
    pairs = s["train_batch_size"] * s["gradient_accumulation_steps"] * record["num_processes"]
    low, high = s["dplg_timestep"][0], s["dplg_timestep"][-1]
    tuning = f"LoRA, rank {s['rank']}, alpha {s['lora_alpha'] or s['rank']}" if s["unet_tuning"] == "lora" else "full"
    if s["unet_tuning"] == "lora" and s.get("lora_layers"):
        tuning += f", on {', '.join(s['lora_layers'])}"
    multipliers = {"head": s.get("head_lr_multiplier", 1)}
    if s["unet_tuning"] == "lora":
        multipliers["LoRA"] = s.get("lora_lr_multiplier", 1)
    other_rates = "".join(f", x{factor:g} for the {part}" for part, factor in multipliers.items() if factor != 1)
    rows = {
        "UNet tuning": tuning,
        "steps": s["max_train_steps"],
        "images per step": f"{pairs} pairs of {s['resolution']} x {s['resolution']} pixels",
        "learning rate": f"{s['learning_rate']}{other_rates}, {s['lr_scheduler']}",
        "precision": record["mixed_precision"],
        "adaptation": "none (source only)",
    }
    if s.get("head_resolution", 1) != 1:
        rows["head (approximation)"] = f"at 1/{s['head_resolution']} of the image"
    if s.get("vae_decoder"):
        rows["VAE decoder (approximation)"] = _base({"pretrained_model_name_or_path": s["vae_decoder"]})[1]
    if not s["source_only"]:
        rows["adaptation"] = f"mean teacher, decay {s['ema_decay']}, threshold {s['pseudo_label_threshold']}"
        rows["DPLG"] = f"timestep {low} to {high}, decayed to 0 at step {s['dplg_end_step']}"
        rows["LPLR"] = f"{s['lplr_loss']}, weights {', '.join(map(str, s['lplr_weight']))}"
    return [(name, _cell(str(value))) for name, value in (rows | {"seed": s["seed"]}).items()]


def _licences(hub_id: str | None, base: str, task: Task) -> list[str]:
    notes = [f"Base model `{base}`: {_BASE_LICENCES.get(hub_id, 'see its own model card')}."]
    for role, name in (("Source", task.source), ("Target", task.target)):
        terms = "drawn by the MADM suite, free to use" if name.startswith(_SYNTHETIC) else "ask its owners"
        notes.append(f"{role} data `{name}`: {_DATA_TERMS.get(name, terms)}.")
    return notes


def _copy_sample(folder: Path, pictures: Path, shareable: bool) -> bool:
    """Copy the newest validation picture beside the card; returns whether there is one to show."""
    sample = folder / _SAMPLE
    if not shareable:
        sample.unlink(missing_ok=True)
        return False
    steps = {int(m[1]): p for p in pictures.glob("*.png") if (m := re.fullmatch(r"step-(\d+)", p.stem))}
    if steps:
        with replacing(sample) as temporary:
            shutil.copyfile(steps[max(steps)], temporary)
    return sample.exists()
