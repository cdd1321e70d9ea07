#!/usr/bin/env python
"""Write docs/evidence.md, its plots and pictures, from the result files of `ablation.py`.

    python benchmarks/evidence.py
    python benchmarks/evidence.py --results outputs/ablation --output docs/evidence.md

Every number in it is read or computed here from result-test.json files; nothing is typed by hand. Rows, modalities and
seeds that were not run are named as missing; a goal that needs them is "not measured", or has "too few seeds".
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablation import ASSET, MODALITIES, ROWS, Row, base_digest
from benchmarks.common import ROOT, markdown_table
from madm_utils.args import formatter
from madm_utils.cli import UserError, quiet_libraries, run
from madm_utils.files import replacing

TEMPLATE = Path(__file__).with_suffix(".template.md")
LEAST_SEEDS = 3
"""With fewer there is no verdict on a goal."""
CEILING_GOAL = 60.0
ADAPTATION_GOAL, AVERAGE_GOAL = 8.0, 12.0
PRETRAINING_GOAL, LORA_MARGIN = 5.0, 2.0
COLORS = dict(zip(ROWS, ("#888888", "#c58b00", "#2b8cbe", "#7b3294", "#d7301f", "#fb8072", "#4d9221", "#000000"),
                  strict=True))  # fmt: skip


@dataclass(frozen=True)
class Results:
    """All records: (modality, row) -> seed -> content of result.json, with its folder under `folder`."""

    records: dict[tuple[str, str], dict[int, dict]]

    def scores(self, modality: str, row: str) -> list[float]:
        """mIoU in percent of every seed, in the order of the seeds."""
        return [record["miou"] for _, record in sorted(self.records.get((modality, row), {}).items())]

    def gains(self, row: str, reference: str, modalities: Sequence[str]) -> list[float]:
        """mIoU of `row` above `reference`, mean over `modalities`; one value per seed that all of these have."""
        pairs = [(self.records.get((m, row), {}), self.records.get((m, reference), {})) for m in modalities]
        shared = set.intersection(*(set(seeds) for pair in pairs for seeds in pair))
        return [mean(own[seed]["miou"] - other[seed]["miou"] for own, other in pairs) for seed in sorted(shared)]


def load(folder: Path) -> Results:
    """Read every result below `folder`.

    Raises:
        UserError: there is none, or they were made with different settings.
    """
    records: dict[tuple[str, str], dict[int, dict]] = {}
    for path in sorted(folder.glob("*/*/seed-*/result-test.json")):
        record = json.loads(path.read_text(encoding="utf-8")) | {"folder": path.parent}
        records.setdefault((record["modality"], record["row"]), {})[record["seed"]] = record
    if not records:
        raise UserError(f"{folder} holds no result-test.json; run benchmarks/ablation.py first")
    check_common_settings([record for seeds in records.values() for record in seeds.values()])
    return Results(records)


def check_common_settings(records: Sequence[dict]) -> None:
    """Raise `UserError` where results differ in more than the row's own flags and what belongs to the task."""
    for record in records:
        own, now = record["settings"]["row_flags"], list(ROWS[record["row"]].flags)
        if own != now:
            raise UserError(f"{record['folder']} was trained with the row's flags {own}, which now are {now}")
    check_equal(records, ("steps", "more_flags", "num_train", "num_eval", "validations", "base_model", "scenes"))
    for modality in MODALITIES:
        check_equal([record for record in records if record["modality"] == modality], ("flags", "hyperparameters"))
    check_equal([{**r, "settings": {"flags": common_flags(r)}} for r in records], ("flags",))


def check_equal(records: Sequence[dict], keys: Sequence[str]) -> None:
    """Raise `UserError` where settings of these names are not those of the first record."""
    for record in records[1:]:
        first, other = records[0]["settings"], record["settings"]
        for key in keys:
            if first[key] != other[key]:
                raise UserError(
                    f"{records[0]['folder']} and {record['folder']} differ in {key}: {first[key]} and {other[key]}; "
                    "a table needs results of one suite"
                )


def common_flags(record: dict) -> list[str]:
    """Flags of every row, without the end of DPLG, which is in proportion to the task's."""
    flags = list(record["settings"]["flags"])
    where = flags.index("--dplg_end_step")
    return flags[:where] + flags[where + 2 :]


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard deviation, the mean as `form` says, with the number of seeds where it is not three."""
    if not values:
        return "not run"
    text = f"{mean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")
    return text if len(values) == 3 else f"{text} ({len(values)} seed{'s' * (len(values) > 1)})"


def main_table(results: Results) -> str:
    """mIoU per row and modality, and the average over the modalities."""
    rows = []
    for name, row in ROWS.items():
        scores = [results.scores(modality, name) for modality in MODALITIES]
        complete = all(len(seeds) >= LEAST_SEEDS for seeds in scores)
        average = f"{mean(map(mean, scores)):.1f}" if complete else "-"
        rows.append([row.title, *map(spread, scores), average])
    return markdown_table(["", *MODALITIES, "average"], rows)


def goals(results: Results) -> str:
    """Every goal, what was measured, and whether it is met; values of too few seeds are shown without verdict."""
    rows = []

    def goal(text: str, measured: list[list[float]], least: float | None, form: str = "+.2f") -> None:
        """Met where the mean over the seeds of each of `measured` is at least `least`, or, for `None`, above zero."""
        if not all(measured):
            verdict = "not measured"
        elif any(len(seeds) < LEAST_SEEDS for seeds in measured):
            verdict = "too few seeds"
        else:
            met = all(value > 0 if least is None else value >= least for value in map(mean, measured))
            verdict = "met" if met else "**missed**"
        rows.append([text, ", ".join(spread(seeds, form) for seeds in measured), verdict])

    def each(row: str, reference: str) -> list[list[float]]:
        return [results.gains(row, reference, [modality]) for modality in MODALITIES]

    def average(row: str, reference: str) -> list[list[float]]:
        return [results.gains(row, reference, MODALITIES)]

    ceiling = [results.scores(modality, "supervised") for modality in MODALITIES]
    goal(f"supervised on the target: at least {CEILING_GOAL:g} mIoU on each", ceiling, CEILING_GOAL, ".1f")
    gains = each("madm", "source-only")
    goal(f"MADM above source-only by at least {ADAPTATION_GOAL:g} on each", gains, ADAPTATION_GOAL)
    goal(f"and by at least {AVERAGE_GOAL:g} on average", average("madm", "source-only"), AVERAGE_GOAL)
    goal("MADM above plain self-training on each", each("madm", "self-training"), None)
    goal("DPLG alone positive on average", average("dplg", "self-training"), None)
    goal("LPLR alone positive on average", average("lplr", "self-training"), None)
    goal("DPLG beside LPLR positive on average", average("madm", "lplr"), None)
    goal("LPLR beside DPLG positive on average", average("madm", "dplg"), None)
    pretrained = average("madm", "madm-random")
    goal(f"pre-trained above random UNet by at least {PRETRAINING_GOAL:g} on average", pretrained, PRETRAINING_GOAL)
    goal(f"LoRA within {LORA_MARGIN:g} of full tuning on each", each("madm-lora", "madm"), -LORA_MARGIN)
    header = ["goal", f"measured on {', '.join(MODALITIES)}, or their average", ""]
    return markdown_table(header, rows)


def class_table(results: Results, modality: str) -> str:
    """IoU per class, means over the seeds."""
    names = [name for name in ROWS if results.scores(modality, name)]
    classes = list(next(iter(results.records[modality, names[0]].values()))["iou"])
    rows = []
    for label in classes:
        cells = []
        for name in names:
            values = [record["iou"][label] for record in results.records[modality, name].values()]
            cells.append(f"{mean(values):.0f}" if None not in values else "-")
        rows.append([label, *cells])
    return markdown_table(["IoU in %", *names], rows)


def cost_table(results: Results) -> str:
    """Minutes of a training, by row; of those that were not interrupted, whose record is whole."""
    rows = []
    for name, row in ROWS.items():
        records = [r for m in MODALITIES for r in results.records.get((m, name), {}).values() if is_whole(r)]
        if records:
            wall, cpu = (
                mean(record[key] for record in records) / 60 for key in ("train_seconds", "train_cpu_seconds")
            )
            rows.append([row.title, str(records[0]["settings"]["steps"]), f"{wall:.1f}", f"{cpu:.1f}"])
    return markdown_table(["one training, with its validations", "steps", "minutes", "CPU minutes"], rows)


def is_whole(record: dict) -> bool:
    """Whether the cost is that of the whole training: of what was interrupted, the seconds until then are lost."""
    return record["starts"] == 1 and record["train_seconds"] > 0


def task_table(results: Results) -> str:
    """Hyper-parameters that the synthetic tasks set, by modality."""
    tasks = {}
    for (modality, _), seeds in results.records.items():
        tasks[modality] = next(iter(seeds.values()))["settings"]["hyperparameters"]
    names = [name for name in next(iter(tasks.values())) if name != "dplg_end_step"]  # of the task's own length
    rows = [
        [f"`{name}`", *(json.dumps(tasks[m].get(name)).strip('"') for m in MODALITIES if m in tasks)] for name in names
    ]
    return markdown_table(["", *(m for m in MODALITIES if m in tasks)], rows)


def plot_curves(results: Results, path: Path) -> None:
    """Validation mIoU over the steps of every row, mean and deviation over the seeds, one plot per modality."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, modality in zip(figure.subplots(1, len(MODALITIES)), MODALITIES, strict=True):
        for name in ROWS:
            curves = [dict(r["curve"]) for r in results.records.get((modality, name), {}).values()]
            shared = sorted(set.intersection(*map(set, curves))) if curves else []
            if shared:
                scores = [[curve[step] for curve in curves] for step in shared]
                errors = [stdev(seeds) if len(seeds) > 1 else 0 for seeds in scores]
                axes.errorbar(shared, [*map(mean, scores)], errors, marker=".", color=COLORS[name], linewidth=1.2,
                              elinewidth=0.6, capsize=2, label=ROWS[name].title)  # fmt: skip
        axes.set(title=modality, xlabel="step", ylabel="mIoU of validation scenes, %")
        axes.grid(alpha=0.3)
    named = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    handles, labels = list(named.values()), list(named)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, format="png", dpi=90)


def copy_pictures(results: Results, images: Path) -> str:
    """Pictures of the first and last validation without and with DPLG, of one seed; returns their Markdown.

    Where the trainings that drew them are gone, the copies that an earlier call made of them stay.
    """
    parts = []
    for modality in MODALITIES:
        rows = [results.records.get((modality, name), {}) for name in ("self-training", "dplg")]
        seeds = [
            [picture for row in rows for picture in pictures_of(row[seed], images)]
            for seed in sorted(set.intersection(*map(set, rows)))
        ]
        for _, drawn, copy in next((p for p in seeds if p and all(drawn.exists() for _, drawn, _ in p)), ()):
            shutil.copy(drawn, copy)
        for title, _, copy in next((p for p in seeds if p and all(copy.exists() for _, _, copy in p)), ()):
            parts.append(f"{title}:\n\n![{title}](images/{copy.name})\n")
    return "\n".join(parts)


def pictures_of(record: dict, images: Path) -> list[tuple[str, Path, Path]]:
    """Title, drawn file and copy of the first and last picture of a training; empty where it had no validations."""
    pictures = []
    for when, index in (("early", 0), ("late", -1)) if record["curve"] else ():
        step, _ = record["curve"][index]
        title = f"{record['modality']}, {ROWS[record['row']].title}, seed {record['seed']}, step {step}"
        copy = images / f"evidence_{record['modality']}_{record['row']}_seed-{record['seed']}_{when}.png"
        pictures.append((title, record["folder"] / "training" / "validation" / f"step-{step}.png", copy))
    return pictures


def document(results: Results, folder: Path, pictures: str) -> str:
    """The whole file, from `evidence.template.md`; `folder` is where the results lie."""
    import jinja2

    everything = [record for seeds in results.records.values() for record in seeds.values()]
    settings = everything[0]["settings"]
    dates = sorted({record["date"] for record in everything})
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return template.render(
        results=folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder,
        base_model=base_model_name(settings["base_model"]),
        is_own_suite=settings["base_model"] == base_digest(ASSET) and not settings["more_flags"],
        main_table=main_table(results),
        goals=goals(results),
        class_tables={m: class_table(results, m) for m in MODALITIES if _has(results, m)},
        pictures=pictures,
        cost_table=cost_table(results),
        num_trainings=len(everything),
        machines=", ".join(sorted({record["machine"] for record in everything})),
        dates=dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        num_train=settings["num_train"],
        num_eval=settings["num_eval"],
        flags=shlex.join(common_flags(everything[0])),
        more_flags=shlex.join(settings["more_flags"]),
        task_table=task_table(results),
        row_settings={row.title: row_settings(row) for row in ROWS.values()},
        parallel=", ".join(sorted({str(record["parallel"]) for record in everything})),
        threads=", ".join(sorted({str(record["num_threads"]) for record in everything})),
    )


def row_settings(row: Row) -> str:
    """What a row adds to the settings of all, in words and flags."""
    parts = ["the base model with a UNet of random weights"] if row.base == "random" else []
    parts += ["trained on the labelled target"] if row.on_target else []
    parts += [f"`{shlex.join(row.flags)}`"] if row.flags else []
    return ", ".join(parts) or "nothing"


def base_model_name(digest: str) -> str:
    """The pre-trained model in words: the one in the repository, or another."""
    if digest == base_digest(ASSET):
        return f"the small pre-trained model `{ASSET.relative_to(ROOT)}`"
    return f"a pre-trained model that is not in the repository (digest of its weights: {digest})"


def _has(results: Results, modality: str) -> bool:
    return any(found == modality for found, _ in results.records)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=Path("outputs/ablation"), help="of ablation.py")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "evidence.md", help="pictures go to images/ beside"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the document and its pictures."""
    args = parse_args(argv)
    quiet_libraries()
    results = load(args.results)
    images = args.output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot_curves(results, images / "evidence_curves.png")
    text = document(results, args.results.resolve(), copy_pictures(results, images))
    with replacing(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    run(main)
