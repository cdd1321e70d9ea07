"""Checkpoints without a training: published whole or not at all, verified, found, rotated, compared with a run."""

import copy
import json
import logging
import os
import resource
import shutil

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import save_file

from madm_utils.checkpointing import (
    SAVE_ERRORS,
    check_resume,
    list_checkpoints,
    load_training_state,
    publish_checkpoint,
    read_marker,
    remove_unfinished,
    resolve_checkpoint,
    rotate_checkpoints,
    save_training_state,
    verify_checkpoint,
)
from madm_utils.cli import UserError
from madm_utils.engines import OptimizerState
from madm_utils.optimization import build_adamw
from madm_utils.tasks import TASKS

TASK = TASKS["synthetic_to_depth"]
CONFIG = {"task": TASK.to_dict(), "resolution": 64, "unet_tuning": "lora", "noise_in_latent_dtype": False}
RECORD = {
    "settings": {"train_batch_size": 2, "seed": 1, "max_train_steps": 9, "lplr_weight": [1.0, 1.0], "rank": 4},
    "task": json.loads(json.dumps(TASK.to_dict())),
    "data": {"synthetic_rgb/train": "abc", "synthetic_depth/train": "def"},
    "mixed_precision": "no",
    "num_processes": 1,
    "device": "cpu",
    "engine": "NO",
    "versions": {"torch": "2.13.0"},
}
WEIGHTS = {"w": torch.arange(500.0)}


def write(folder):
    (folder / "segmenter").mkdir()
    save_file(WEIGHTS, folder / "segmenter/model.safetensors")
    (folder / "madm_config.json").write_text(json.dumps(CONFIG))


def publish(out, *steps, state=None, write=write):
    for step in steps:
        publish_checkpoint(out, step, {"": RECORD}, state or {}, write)
    return out


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_a_marker_with_all_sizes(tmp_path):
    state = {"best": {"miou": 3.5}, "corrupt_samples": ["a"]}
    folder = publish_checkpoint(tmp_path / "new/run", 7, {"": RECORD}, state, write)
    assert folder == tmp_path / "new/run/checkpoint-7" and names(folder.parent) == ["checkpoint-7"]
    assert names(folder) == ["checkpoint.json", "madm_config.json", "segmenter"]
    marker = read_marker(folder)
    assert (marker["step"], marker["state"], marker["records"]) == (7, state, {"": RECORD})
    assert marker["files"] == {
        name: (folder / name).stat().st_size for name in ("madm_config.json", "segmenter/model.safetensors")
    }
    verify_checkpoint(folder)


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    """The order that survives a power failure: files, folders, rename, the parent's list of names."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b, **k: (events.append("rename"), rename(a, b, **k)))
    publish(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    flushed = {path.split("tmp-")[1].partition("/")[2] for path in before}
    assert flushed == {"", "segmenter", "segmenter/model.safetensors", "madm_config.json", "checkpoint.json"}
    assert after == [str(tmp_path)]


def test_a_failing_write_leaves_the_older_version_and_nothing_else(tmp_path):
    def fail(folder):
        write(folder)
        raise KeyboardInterrupt

    publish(tmp_path, 1)
    content = (tmp_path / "checkpoint-1/checkpoint.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 1, write=fail)
    assert names(tmp_path) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1/checkpoint.json").read_bytes() == content
    publish(tmp_path, 1, state={"new": 1})
    assert read_marker(tmp_path / "checkpoint-1")["state"] == {"new": 1} and names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("part", ["safetensors", "json"])
def test_no_room(part, tmp_path):
    """Files beyond a limit of the system: the error is one of `SAVE_ERRORS`, and nothing is left."""

    def too_large(folder):
        if part == "json":
            (folder / "x.json").write_text("0" * 10**6)
        save_file({"w": torch.zeros(10**6)}, folder / "x.safetensors")

    publish(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        with pytest.raises(SAVE_ERRORS):
            publish(tmp_path, 2, write=too_large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-1"]


def test_killed_between_setting_the_older_version_aside_and_naming_the_newer(tmp_path):
    for clean in (lambda: resolve_checkpoint(tmp_path, "latest"), lambda: remove_unfinished(tmp_path)):
        publish(tmp_path, 1, 2)
        (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.tmp-77-old")
        clean()
        assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
        verify_checkpoint(tmp_path / "checkpoint-2")


def test_what_killed_processes_left_is_removed(tmp_path):
    publish(tmp_path, 1)
    for name in (".checkpoint-2.tmp-7", "depth/.final.tmp-8", ".checkpoint-1.tmp-9-old"):
        (tmp_path / name / "part").mkdir(parents=True)
    (tmp_path / "depth/.run.json.tmp-7").write_text("{")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "depth"] and names(tmp_path / "depth") == []
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_rotation_keeps_the_newest_written(tmp_path):
    """Also where a run that was resumed earlier passes behind older results."""
    publish(tmp_path, 2, 4, 5, 6)
    rotate_checkpoints(tmp_path / "checkpoint-5", None)
    assert len(names(tmp_path)) == 4
    rotate_checkpoints(tmp_path / "checkpoint-5", 2)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    rotate_checkpoints(tmp_path / "checkpoint-5", 1)
    assert names(tmp_path) == ["checkpoint-5"]


def test_rotation_counts_finished_checkpoints_only(tmp_path):
    publish(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-1/checkpoint.json").unlink()
    (tmp_path / ".checkpoint-9.tmp-7").mkdir()
    rotate_checkpoints(tmp_path / "checkpoint-3", 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    rotate_checkpoints(tmp_path / "checkpoint-3", 1)
    assert names(tmp_path) == [".checkpoint-9.tmp-7", "checkpoint-1", "checkpoint-3"]


# --- finding and verifying -------------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": (
        lambda c: os.truncate(c / "segmenter/model.safetensors", 900),
        r"segmenter/model.safetensors: 900 bytes instead of \d+",
    ),
    "missing": (lambda c: (c / "madm_config.json").unlink(), "madm_config.json: missing"),
    "not JSON": (
        lambda c: (c / "madm_config.json").write_text("{" * (c / "madm_config.json").stat().st_size),
        "madm_config.json: Expecting property name",
    ),
    "no header": (
        lambda c: (c / "segmenter/model.safetensors").write_bytes(
            bytes((c / "segmenter/model.safetensors").stat().st_size)
        ),
        "segmenter/model.safetensors: .*header",
    ),
    "marker": (lambda c: (c / "checkpoint.json").write_text("{"), "checkpoint.json: JSONDecodeError"),
    "marker without files": (
        lambda c: (c / "checkpoint.json").write_text('{"format": 1, "step": 2, "records": {}, "state": {}}'),
        "checkpoint.json: KeyError: 'files'",
    ),
    "marker of another form": (
        lambda c: (c / "checkpoint.json").write_text(
            '{"format": 1, "step": 2, "records": [], "state": {}, "files": {}}'
        ),
        "checkpoint.json: TypeError: expected step int, records dict",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_named(kind, tmp_path, caplog):
    damage, message = DAMAGES[kind]
    publish(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint-2")
    where = f"checkpoint {tmp_path}/checkpoint-2 is damaged: {message}"
    with pytest.raises(UserError, match=where):
        verify_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=where + ".*; --resume_from_checkpoint latest-valid goes on from"):
        resolve_checkpoint(tmp_path, "latest")
    with pytest.raises(UserError, match=where):
        resolve_checkpoint(tmp_path, "checkpoint-2")
    assert not caplog.records
    assert resolve_checkpoint(tmp_path, "latest-valid") == (tmp_path / "checkpoint-1").resolve()
    assert "resuming from checkpoint-1, passing over damaged ones" in caplog.text and "checkpoint-2 is" in caplog.text


def test_nothing_undamaged(tmp_path):
    publish(tmp_path, 1)
    (tmp_path / "checkpoint-1/madm_config.json").unlink()
    with pytest.raises(UserError, match="missing; there is no other one$"):
        resolve_checkpoint(tmp_path, "latest")
    with pytest.raises(UserError, match="every checkpoint is damaged: .*checkpoint-1 .*; start again in another"):
        resolve_checkpoint(tmp_path, "latest-valid")


def test_a_checkpoint_of_a_later_version(tmp_path):
    publish(tmp_path, 1)
    path = tmp_path / "checkpoint-1/checkpoint.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads 1; update"):
        resolve_checkpoint(tmp_path, "latest")


def test_finding(tmp_path, caplog, monkeypatch):
    publish(tmp_path, 9, 10)
    for name in ("latest", "latest-valid", "checkpoint-10", str(tmp_path / "checkpoint-10")):
        assert resolve_checkpoint(tmp_path, name) == (tmp_path / "checkpoint-10").resolve()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(tmp_path / "elsewhere", "checkpoint-9") == (tmp_path / "checkpoint-9").resolve()
    assert not caplog.records


def test_unfinished_ones_are_not_picked(tmp_path, caplog):
    publish(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-3.tmp-7")
    (tmp_path / "checkpoint-2/segmenter").mkdir(parents=True)
    assert resolve_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-1").resolve()
    assert "passing over checkpoint-2" in caplog.text and "unfinished, without checkpoint.json" in caplog.text


def test_messages_when_there_is_none(tmp_path):
    for flag in ("latest", "latest-valid"):
        with pytest.raises(UserError, match=f"{flag}: no checkpoint-. in {tmp_path}; start without the flag"):
            resolve_checkpoint(tmp_path, flag)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(UserError, match="that holds checkpoint.json, only unfinished checkpoint-2; start without"):
        resolve_checkpoint(tmp_path, "latest")
    publish(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"no training checkpoint \(it lacks checkpoint.json, .* checkpoints: checkpoi"
    ):
        resolve_checkpoint(tmp_path, "checkpoint-2")


# --- the same run? ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return publish(tmp_path, 1) / "checkpoint-1"


def changed(values, path, value):
    """A copy of nested dictionaries with one entry replaced."""
    copy = json.loads(json.dumps(values))
    *outer, last = path.split("/")
    inner = copy
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("settings/seed", 2, "seed: 1 -> 2"),
        ("settings/lplr_weight", [1.0, 2.0], r"lplr_weight: \[1.0, 1.0\] -> \[1.0, 2.0\]"),
        ("settings/train_batch_size", 4, "train_batch_size: 2 -> 4; world size x batch: 2 -> 4"),
        ("num_processes", 2, "num_processes: 1 -> 2; world size x batch: 2 -> 4"),
        ("mixed_precision", "bf16", "mixed_precision: no -> bf16"),
        ("data", {**RECORD["data"], "synthetic_depth/train": "xyz"}, "data synthetic_depth/train: def -> xyz"),
        ("data", {**RECORD["data"], "base model": "123"}, "data base model: None -> 123"),
        ("data", {**RECORD["data"], "VAE decoder": "123"}, "data VAE decoder: None -> 123"),
        ("settings/head_resolution", 4, "head_resolution: 1 -> 4"),
        ("settings/lora_lr_multiplier", 10.0, "lora_lr_multiplier: 1.0 -> 10.0"),
        ("data", {"synthetic_rgb/train": "abc"}, "data synthetic_depth/train: def -> None"),
    ],
)
def test_a_run_that_would_be_another(path, value, message, checkpoint):
    with pytest.raises(UserError, match=rf"run with other settings \({message}\); resume with the same"):
        check_resume(checkpoint, "", changed(RECORD, path, value), CONFIG, logging.getLogger())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("resolution", 128, "resolution: 64 -> 128"),
        ("unet_tuning", "full", "unet_tuning: lora -> full"),
        ("noise_in_latent_dtype", True, "noise_in_latent_dtype: False -> True"),
        ("task/name", "other", "task name: synthetic_to_depth -> other"),
        ("task/target", "elsewhere", "task target: synthetic_depth -> elsewhere"),
        ("task/source_size", [64, 64], r"task source_size: \[128, 128\] -> \[64, 64\]"),
        ("task/source_label_map", {"3": 1}, r"task source_label_map: None -> \{'3': 1\}"),
    ],
)
def test_a_model_that_would_be_another(path, value, message, checkpoint):
    with pytest.raises(UserError, match=message):
        check_resume(checkpoint, "", RECORD, changed(CONFIG, path, value), logging.getLogger())


def test_a_run_from_before_the_rate_of_the_lora_goes_on_without_a_lora(tmp_path):
    """The flag that came later means nothing to a run of the whole UNet."""
    config = changed(CONFIG, "unet_tuning", "full")
    checkpoint = publish(tmp_path, 1) / "checkpoint-1"
    (checkpoint / "madm_config.json").write_text(json.dumps(config))
    check_resume(checkpoint, "", changed(RECORD, "settings/lora_lr_multiplier", 10.0), config, logging.getLogger())


def test_harmless_changes_are_logged(checkpoint, caplog):
    caplog.set_level(logging.INFO)
    check_resume(checkpoint, "", RECORD, CONFIG, logging.getLogger())
    assert not caplog.records
    now = changed(changed(RECORD, "settings/max_train_steps", 20), "versions/torch", "2.14.0")
    now["settings"]["flag_of_a_later_version"] = 3
    check_resume(checkpoint, "", changed(now, "device", "cuda"), CONFIG, logging.getLogger())
    assert [record.getMessage().removeprefix("resuming with another ") for record in caplog.records] == [
        "max_train_steps: 9 -> 20; schedules that depend on the length of the training are stretched",
        "device: cpu -> cuda", "versions torch: 2.13.0 -> 2.14.0",
    ]  # fmt: skip


def test_other_modalities(checkpoint, tmp_path):
    with pytest.raises(UserError, match="holds a single task, this run trains depth; resume with the same --task"):
        check_resume(checkpoint, "depth", RECORD, CONFIG, logging.getLogger())

    def write_both(folder):
        for name in ("depth", "event"):
            (folder / name).mkdir()
            write(folder / name)

    several = publish_checkpoint(tmp_path / "b", 1, {"depth": RECORD, "event": RECORD}, {}, write_both)
    verify_checkpoint(several)
    check_resume(several, "event", RECORD, CONFIG, logging.getLogger())
    with pytest.raises(UserError, match="holds depth, event, this run trains infrared"):
        check_resume(several, "infrared", RECORD, CONFIG, logging.getLogger())


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_unreadable_model_settings(content, checkpoint):
    (checkpoint / "madm_config.json").write_text(content)
    with pytest.raises(UserError, match="its settings cannot be read"):
        check_resume(checkpoint, "", RECORD, CONFIG, logging.getLogger())


# --- what a run counts besides its model -----------------------------------------------------------------------------


class Training:
    """Some steps of a layer large enough that 8-bit AdamW quantises its moments."""

    def __init__(self, optimizer=torch.optim.AdamW):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(80, 80)
        self.optimizer = optimizer(self.layer.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=2)

    def steps(self, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            self.scaler.scale(self.layer(torch.randn(3, 80)).square().mean()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def save(self, folder):
        folder.mkdir()
        save_training_state(folder, 3, self.optimizer, self.scheduler, self.scaler)
        return folder

    def load(self, folder):
        return load_training_state(folder, self.optimizer, self.scheduler, self.scaler)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW8bit])
def test_training_goes_on_bit_for_bit(optimizer, tmp_path):
    whole, first, second = Training(optimizer).steps(0, 6), Training(optimizer).steps(0, 3), Training(optimizer)
    folder = first.save(tmp_path / "state")
    assert names(folder) == ["training_state.json", "training_state.safetensors"]
    second.layer.load_state_dict(first.layer.state_dict())
    assert second.load(folder) == 3
    second.steps(3, 6)
    assert torch.equal(second.layer.weight, whole.layer.weight) and second.scaler.get_scale() > 1024
    for name in names(second.save(tmp_path / "second")):
        whole_folder = tmp_path / "whole" if (tmp_path / "whole").exists() else whole.save(tmp_path / "whole")
        assert (tmp_path / "second" / name).read_bytes() == (whole_folder / name).read_bytes()


def test_a_state_of_an_unfused_adamw_goes_on_fused():
    """How a step is computed belongs to the run that goes on: a gradient scaler hands a fused step its own checks."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    plain = torch.optim.AdamW(layers[0].parameters(), lr=0.1, fused=False)
    fused = build_adamw([{"params": list(layers[1].parameters()), "lr": 0.1}], (0.9, 0.999), 1e-8, False)
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]
    images = torch.randn(4, 3)

    def step(index: int, optimizer: torch.optim.Optimizer) -> None:
        scalers[index].scale(layers[index](images).square().sum()).backward()
        scalers[index].step(optimizer)
        scalers[index].update()
        optimizer.zero_grad()

    step(0, plain)
    layers[1].load_state_dict(layers[0].state_dict())
    OptimizerState(fused, [list(layers[1].parameters())]).load_state_dict(copy.deepcopy(plain.state_dict()))
    assert fused.param_groups[0]["fused"] is True
    step(0, plain)
    step(1, fused)
    torch.testing.assert_close(layers[1].weight, layers[0].weight)


def test_a_state_of_another_optimizer(tmp_path):
    folder = Training().steps(0, 1).save(tmp_path / "state")
    with pytest.raises(UserError, match=r"belongs to AdamW with groups of \[2\] .*this run has AdamW8bit with \[2\]"):
        Training(AdamW8bit).load(folder)


@pytest.mark.parametrize("name", ["training_state.json", "training_state.safetensors"])
def test_a_damaged_state(name, tmp_path):
    folder = Training().steps(0, 1).save(tmp_path / "state")
    (folder / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Training().load(folder)
