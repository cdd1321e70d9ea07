"""Several target modalities in one run: each adapter ends as if it had been trained alone, and they swap by name."""

import json

import numpy as np
import pytest
import torch
from test_train_madm import RESOLUTION, data, script, train_flags  # noqa: F401 (data is a fixture)
from tiny_model import new_model

from madm_utils import MADMPipeline
from madm_utils.cli import UserError
from madm_utils.model_folder import adapter_folders
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import TASKS
from madm_utils.train_args import parse_train_args, train_parser

RATE = ("--learning_rate", "0.01", "--head_lr_multiplier", 1, "--lora_lr_multiplier", 1)
BOTH = ("--task", "synthetic_to_infrared", *RATE, "--checkpointing_steps", 1)


def files(folder) -> dict[str, bytes]:
    """The weights of one modality."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):  # noqa: F811
    """Depth and infrared, stopped after two steps and resumed to three."""
    out = tmp_path_factory.mktemp("several") / "out"
    script("train_madm.py", *train_flags(data, out, *BOTH))
    resume = ("--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    done = script("train_madm.py", *train_flags(data, out, *BOTH, *resume))
    assert "at step 2" in done.stdout
    return out


def test_one_folder_per_modality(together):
    for name in ("depth", "infrared"):
        for folder in (together / name, together / "checkpoint-2" / name):
            config = json.loads((folder / "madm_config.json").read_text())
            assert config["task"]["name"] == f"synthetic_to_{name}"
        assert json.loads((together / name / "run.json").read_text())["task"]["modality"] == name
        assert f"synthetic_to_{name}" in (together / name / "README.md").read_text()


def test_an_adapter_trained_beside_another_equals_one_trained_alone(together, data, tmp_path):  # noqa: F811
    script("train_madm.py", *train_flags(data, tmp_path / "alone", *RATE))
    alone = files(tmp_path / "alone/checkpoint-2")
    assert alone == files(together / "checkpoint-2/depth")
    assert "pytorch_lora_weights.safetensors" in alone and len(alone) == 4


def test_two_processes_give_the_same_adapters_as_one_task_alone(data, tmp_path):  # noqa: F811
    """Two DDP wrappers around one UNet, whose adapters take turns."""
    done = script("train_madm.py", *train_flags(data, tmp_path / "both", *BOTH), processes=2)
    script("train_madm.py", *train_flags(data, tmp_path / "alone", *RATE), processes=2)
    assert "2 x cpu" in done.stdout
    assert files(tmp_path / "alone/checkpoint-2") == files(tmp_path / "both/checkpoint-2/depth")


def test_adapters_swap_by_name(together):
    """One base in memory; after any number of swaps each modality predicts what its own folder predicts."""
    pipe = MADMPipeline.from_pretrained(together)
    assert pipe.adapter_names == ("depth", "infrared")
    unet, vae = pipe.unet, pipe.vae
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    logits = {}
    for name in ("depth", "infrared", "depth", "infrared"):
        pipe.set_adapters(name)
        with torch.no_grad():
            alone = MADMModel.from_pretrained(together / name)(images).logits
            found = pipe.forward(images)
        assert pipe.modality == name and pipe.unet is unet and pipe.vae is vae
        assert torch.equal(found, alone)
        logits[name] = found
    assert logits["depth"].shape[1] == 11 and logits["infrared"].shape[1] == len(pipe.class_names) == 9
    label_map = pipe(np.zeros((40, 50, 3), np.uint8)).label_maps[0]
    assert label_map.shape == (40, 50)
    with pytest.raises(UserError, match="no adapter 'event'; this pipeline has depth, infrared"):
        pipe.set_adapters("event")


def test_a_single_model_is_a_pipeline_of_one_adapter(together):
    assert adapter_folders(together / "depth") == {"": together / "depth"}
    assert MADMPipeline.from_pretrained(together / "depth").adapter_names == ("depth",)


def test_memory_grows_by_the_adapter_alone():
    """VAE and UNet are the same objects; what a second modality adds is its LoRA and its segmenter."""
    first = new_model(TASKS["synthetic_to_depth"], "lora")
    before = {id(p) for p in first.parameters()}
    second = new_model(TASKS["synthetic_to_event"], "lora", shared=first)
    added = [name for name, p in second.named_parameters() if id(p) not in before]
    assert added and all(".event." in name or name.startswith("segmenter.") for name in added)
    assert {name for name, p in second.named_parameters() if p.requires_grad} == set(added)


def test_gradients_of_tasks_that_take_turns():
    """Backward before the next forward: each adapter gets its own gradients, the other's stay untouched."""
    first = new_model(TASKS["synthetic_to_depth"], "lora").train()
    second = new_model(TASKS["synthetic_to_event"], "lora", shared=first).train()
    images = torch.rand(1, 3, RESOLUTION, RESOLUTION)
    for model, other in ((first, "event"), (second, "depth"), (first, "event")):
        model.zero_grad()
        model(images).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (f".{other}." not in name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "synthetic_to_depth", "--unet_tuning", "full", "--task", "synthetic_to_event"), "one frozen UNet"),
        (("--task", "synthetic_to_depth", "--task", "cityscapes_to_deliver_depth"), "different modalities"),
        (("--task", "synthetic_to_depth", "--task", "cityscapes_to_dsec_event"), "disagree about --max_train_steps"),
    ],
)
def test_tasks_that_do_not_go_together(flags, message, capsys):
    paths = ("--data_dir", "d", "--output_dir", "o", "--pretrained_model_name_or_path", "b")
    with pytest.raises(SystemExit):
        parse_train_args(train_parser(""), [*flags, *paths])
    assert message in capsys.readouterr().err


def test_each_task_keeps_its_own_hyperparameters(tmp_path):
    """What a task sets holds for it alone; a flag holds for all."""
    paths = ("--data_dir", "d", "--output_dir", "o", "--pretrained_model_name_or_path", "b")
    names = ("--task", "cityscapes_to_deliver_depth", "--task", "cityscapes_to_fmb_infrared")
    settings = parse_train_args(train_parser(""), [*names, *paths, "--max_train_steps", "7"])
    assert [args.max_train_steps for args, _ in settings] == [7, 7]
    for args, task in settings:
        for key, value in task.hyperparameters.items():
            assert getattr(args, key) == value or key == "max_train_steps"
