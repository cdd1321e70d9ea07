"""The written commands: every one in the README, the docs and the recipes is understood by its script."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import convert_original_madm
import eval_madm
import export_madm
import predict_madm
from madm_utils.prepare_args import parse_prepare_args
from madm_utils.tasks import load_task, task_from_dict
from madm_utils.train_args import parse_train_args, train_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("recipes/*.sh"))]
PARSERS = {
    "train_madm.py": lambda flags: parse_train_args(train_parser(""), flags),
    "eval_madm.py": eval_madm.parse_args,
    "predict_madm.py": predict_madm.parse_args,
    "prepare_datasets.py": lambda flags: parse_prepare_args("", flags),
    "convert_original_madm.py": convert_original_madm.parse_args,
    "export_madm.py": export_madm.parse_args,
}
VARIABLES = {"TASK": "cityscapes_to_deliver_depth", "RAW": "raw", "DATA": "data", "OUT": "out"} | {
    "SLURM_ARRAY_TASK_ID": "3"
}


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, script, flags) of every command line that names one of the scripts."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for line in text.splitlines():
            command = re.match(r"\s*(?:python|accelerate launch)\s.*?(\w+\.py)\b(.*)", line)
            if command and command[1] in PARSERS and not command[2].rstrip().endswith("..."):
                flags = re.sub(r"\$\{?(\w+)\}?", lambda m: VARIABLES[m[1]], command[2])
                found.append((page.name, command[1], shlex.split(flags)))
    return found


@pytest.mark.parametrize(("page", "script", "flags"), commands())
def test_command_parses(page, script, flags, tmp_path, monkeypatch):
    task = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/tasks.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "thermal.yaml").write_text(task)
    monkeypatch.chdir(tmp_path)
    PARSERS[script](flags)


def test_commands_are_found():
    """All six scripts are shown, in more than one place."""
    assert {script for _, script, _ in commands()} == set(PARSERS)
    assert len(commands()) >= 15


def test_examples_of_own_tasks_are_valid(tmp_path):
    """The YAML and the JSON example of docs/tasks.md describe the same task, but for a hyper-parameter."""
    text = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    tasks = []
    for kind in ("yaml", "json"):
        path = tmp_path / f"task.{kind}"
        path.write_text(re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1])
        tasks.append(load_task(config=path))
    assert tasks[0].source_label_map == tasks[1].source_label_map
    assert tasks[0].class_names == tasks[1].class_names
    assert task_from_dict(tasks[0].to_dict(), "round trip") == tasks[0]


def test_file_tree_of_the_readme():
    """One line per file: nothing missing, nothing that is not there."""
    tree = re.search(r"## Files\n+```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    named = set(re.findall(r"[\w./*<>]+\.(?:py|sh)\b", tree))
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("madm_utils/*.py"),
        *ROOT.glob("recipes/*"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        if path.name != "__init__.py" and path.is_file():
            assert path.name in tree, path
    # Not the environments and results beside them, which hold a hundred thousand files.
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "outputs"]
    there = {path.name for folder in [ROOT.glob("*"), *(folder.rglob("*") for folder in folders)] for path in folder}
    for name in named:
        if not set(name) & set("*<>"):
            assert Path(name).name in there, name


@pytest.mark.parametrize("path", sorted(ROOT.glob("accelerate_configs/*.yaml")), ids=lambda p: p.name)
def test_every_key_of_an_accelerate_config_is_explained_and_known(path):
    from accelerate.commands.config.config_args import load_config_from_file

    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert "#" in line, line
    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
