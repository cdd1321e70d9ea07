"""Tasks: the published tables, and user files with one message per mistake."""

import json

import pytest
import yaml

from madm_utils.cli import UserError
from madm_utils.tasks import TASKS, load_task
from madm_utils.train_args import parse_train_args, train_parser

TABLES = {
    "cityscapes_to_deliver_depth": "depth",
    "cityscapes_to_fmb_infrared": "infrared",
    "cityscapes_to_dsec_event": "event",
}
MINIMAL = {
    "name": "mine",
    "source": "cityscapes",
    "target": "deliver",
    "modality": "depth",
    "class_names": ["road", "rest"],
    "palette": [[128, 64, 128], [0, 0, 0]],
}


@pytest.mark.parametrize("name", TABLES)
def test_published_tables(name, fixtures):
    task = TASKS[name]
    table = json.loads((fixtures / "common/class_tables.json").read_text())[TABLES[name]]
    assert list(task.class_names) == table["classes"]
    assert [channel for color in task.palette for channel in color] == table["palette"]
    assert task.source_label_map == dict(table["train_label_map"])
    assert task.target_label_map == (dict(table["test_label_map"]) if table["test_label_map"] else None)
    assert list(task.source_size) == table["source_resize"]
    assert list(task.target_size) == table["target_resize"]


@pytest.mark.parametrize("name", TASKS)
def test_round_trip_and_flags(name, tmp_path):
    """A saved task is the same task, and its hyper-parameters become the defaults of the training flags."""
    (tmp_path / "task.json").write_text(json.dumps(TASKS[name].to_dict()))
    assert load_task(config=tmp_path / "task.json") == TASKS[name]
    flags = ["--task", name, "--data_dir", "d", "--output_dir", "o", "--pretrained_model_name_or_path", "b"]
    [(args, _)] = parse_train_args(train_parser(""), flags)
    for key, value in TASKS[name].hyperparameters.items():
        assert getattr(args, key) == value
    [(args, _)] = parse_train_args(train_parser(""), [*flags, "--dplg_end_step", "7"])
    assert args.dplg_end_step == 7


def test_published_hyperparameters():
    """The table of the released configs."""
    settings = {name: TASKS[name].hyperparameters for name in TABLES}
    assert [s["dplg_timestep"] for s in settings.values()] == [[60, 61], [50, 51], [50, 51]]
    assert [s["dplg_end_step"] for s in settings.values()] == [5000, 8000, 8000]
    assert [s["lplr_loss"] for s in settings.values()] == ["both", "both", "source"]
    assert [s["lplr_weight"][0] for s in settings.values()] == [1.0, 1.0, 20.0]


def test_yaml_file(tmp_path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**MINIMAL, "source_label_map": {0: 0, 1: 1}}))
    task = load_task(config=tmp_path / "t.yaml")
    assert (task.num_classes, task.resolution, task.source_label_map) == (2, 512, {0: 0, 1: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown fields"),
        ({"name": None, "class_names": None}, "wrong form"),
        ({"class_names": ["road", "road"]}, "different names"),
        ({"palette": [[0, 0, 0]]}, "1 colours for 2 classes"),
        ({"palette": [[0, 0, 0], [0, 0, 0]]}, "must differ"),
        ({"palette": [[0, 0, 0], [0, 0, 300]]}, "0..255"),
        ({"source_label_map": {"0": 2}}, "source_label_map maps"),
        ({"resolution": 100}, "multiple of 64"),
        ({"modality": "a.b"}, "modality is made of letters"),
        ({"source": 5}, "source is made of letters"),
        ({"target_size": [256, 1024]}, "target_size"),
    ],
)
def test_mistakes_in_a_file(change, message, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({**MINIMAL, **change}))
    with pytest.raises(UserError, match=message) as error:
        load_task(config=tmp_path / "t.json")
    assert str(tmp_path / "t.json") in str(error.value)


def test_missing_fields(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match="missing fields .*class_names"):
        load_task(config=tmp_path / "t.json")


def test_no_file_no_object_no_yaml(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_task(config=tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="holds list"):
        load_task(config=tmp_path / "list.json")
    (tmp_path / "broken.yaml").write_text("{a: [}")
    with pytest.raises(UserError, match="neither JSON nor YAML"):
        load_task(config=tmp_path / "broken.yaml")


def test_unknown_task_lists_the_tasks():
    with pytest.raises(UserError, match="unknown task 'x'; tasks: cityscapes_to_deliver_depth"):
        load_task("x")
    with pytest.raises(UserError, match="either --task NAME or --task_config FILE"):
        load_task()


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"learning_rte": 1}, "'learning_rte' is no flag"),
        ({"learning_rate": -1}, "learning_rate: expected a positive number"),
        ({"lplr_loss": "all"}, "lplr_loss: all is none of"),
        ({"source_only": 0}, "source_only is a switch: true or false, got 0"),
        ({"learning_rate": [1, 2]}, "learning_rate takes one value"),
        ({"lplr_weight": []}, "lplr_weight takes at least one value"),
    ],
)
def test_mistakes_in_hyperparameters(hyperparameters, message, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({**MINIMAL, "hyperparameters": hyperparameters}))
    flags = ["--task_config", str(tmp_path / "t.json"), "--data_dir", "d", "--output_dir", "o"]
    with pytest.raises(UserError, match=message):
        parse_train_args(train_parser(""), [*flags, "--pretrained_model_name_or_path", "b"])
