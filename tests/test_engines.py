"""The accelerate configs as users launch them, and what the engines make of a run.

`cpu.yaml` trains for real with two processes; FSDP2 and (where it is installed) DeepSpeed go on from its checkpoint
and have to arrive where it does. The other configs are launched up to the first step.
"""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_madm import train_flags
from tiny_model import write_data

from madm_utils.cli import UserError
from madm_utils.engines import check_engine
from madm_utils.modeling_madm import MADMModel
from madm_utils.tracking import LOG_NAME

ROOT = Path(__file__).parent.parent
# No GPU is visible, so that the tests mean the same on every machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT.pop("ACCELERATE_USE_CPU", None)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def start(config: str, *launcher_flags, script: Path = ROOT / "train_madm.py", flags: list) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", ROOT / f"accelerate_configs/{config}.yaml", *launcher_flags, script, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, **pipes)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), num_test=1)


def test_every_config_is_launched_here():
    """`test_docs` has Accelerate parse them."""
    names = {path.stem for path in (ROOT / "accelerate_configs").iterdir()}
    assert names == {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "deepspeed_zero2"}


# --- launched --------------------------------------------------------------------------------------------------------


def test_dry_run(data, tmp_path):
    """Everything is built in the configs' processes and precision, and nothing is written."""
    flags = train_flags(data, tmp_path / "o", "--dry_run")
    launched = [start("single_gpu", flags=flags), start("multi_gpu", "--main_process_port", free_port(), flags=flags)]
    for processes, out in enumerate(map(finish, launched), start=1):
        assert f"{processes} x cpu, precision bf16" in out and out.count("dry run:") == 1
    assert not (tmp_path / "o").exists()


def test_dry_run_of_two_machines(data, tmp_path):
    """Two launchers on this machine play the two machines, with one process each."""
    machines = ("--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", 2)
    flags = train_flags(data, tmp_path / "o", "--dry_run")
    launched = [start("multi_node", *machines, "--machine_rank", rank, flags=flags) for rank in (0, 1)]
    outs = [finish(process) for process in launched]
    assert "2 x cpu, precision bf16" in outs[0] and "dry run:" not in outs[1]
    assert not (tmp_path / "o").exists()


def real_flags(data: Path, out: Path, *more) -> list[str]:
    """Two steps of full fine-tuning, two passes each, at the published learning rate."""
    steps = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--gradient_accumulation_steps", 2)
    settings = ("--unet_tuning", "full", "--learning_rate", "5e-6", "--head_lr_multiplier", "1", "--mixed_precision",
                "no", "--report_to", "none")  # fmt: skip
    return train_flags(data, out, *steps, *settings, *more)


@pytest.fixture(scope="module")
def ddp_run(data, tmp_path_factory):
    """`cpu.yaml` as its comment says."""
    out = tmp_path_factory.mktemp("ddp") / "out"
    printed = finish(start("cpu", "--main_process_port", free_port(), flags=real_flags(data, out)))
    assert "2 x cpu" in printed and printed.count("trained model") == 1
    return out


def losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / LOG_NAME).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.endswith("_loss") or k == "gradient_norm"} for line in lines]


@pytest.mark.parametrize(
    ("config", "kind", "unet_share"),
    [("fsdp2", "FSDP", 0.5), pytest.param("deepspeed_zero2", "DEEPSPEED", 1.0, marks=needs_deepspeed)],
)
def test_engine_goes_on_like_ddp(config, kind, unet_share, ddp_run, data, tmp_path):
    """From DDP's first checkpoint: divided as the engine says, the same losses up to rounding, and a checkpoint with
    the same files and tensors, those of the optimizer included."""
    flags = real_flags(data, tmp_path / "out", "--resume_from_checkpoint", ddp_run / "checkpoint-1")
    worker = {"script": ROOT / "tests/engine_worker.py", "flags": [tmp_path / "report.json", *flags]}
    finish(start(config, "--main_process_port", free_port(), **worker))

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["distributed_type"] == kind and report["teacher_spread"] == 0.0
    # Shards of a few rows are uneven in a tiny model.
    assert report["unet"] == pytest.approx(unet_share, abs=0.01) and report["vae"] == 1.0
    assert report["moments"] == pytest.approx(0.5, abs=0.02)

    expected, found = losses(ddp_run)[1:], losses(tmp_path / "out")
    assert len(found) == 1 and len(found[0]) == 5
    for before, now in zip(expected, found, strict=True):
        assert now == pytest.approx(before, rel=1e-5)
    paths = sorted(path.relative_to(ddp_run) for path in ddp_run.glob("checkpoint-2/**/*.*"))
    assert paths == sorted(path.relative_to(tmp_path / "out") for path in tmp_path.glob("out/checkpoint-2/**/*.*"))
    for name in (path for path in paths if path.suffix == ".safetensors"):
        before, now = load_file(ddp_run / name), load_file(tmp_path / "out" / name)
        for key in before.keys() | now.keys():
            torch.testing.assert_close(now[key], before[key], rtol=1e-4, atol=5e-6, msg=f"{name}: {key}")
    states = [
        json.loads((out / "checkpoint-2/training_state.json").read_text()) for out in (ddp_run, tmp_path / "out")
    ]
    assert states[0] == states[1]
    assert "optimizer" in states[0] and (tmp_path / "out/madm_config.json").exists()


def test_fsdp2_as_its_config_says(data, tmp_path):
    """In bf16, with the LoRA and the recomputation that docs/training.md advises; also what validates."""
    flags = train_flags(data, tmp_path / "out", "--unet_tuning", "lora", "--gradient_checkpointing")
    flags += ["--max_train_steps", "1", "--validate_on", "test", "--report_to", "none"]
    out = finish(start("fsdp2", "--main_process_port", free_port(), flags=flags))
    assert "2 x cpu, precision bf16" in out and "mIoU" in out
    model = MADMModel.from_pretrained(tmp_path / "out")
    assert all(p.isfinite().all() for p in model.parameters()) and model.unet_tuning == "lora"


# --- mistakes --------------------------------------------------------------------------------------------------------

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        (FSDP2, {"num_tasks": 2}, "FSDP2 trains one --task per run, got 2; give one, or launch with .*multi_gpu.yaml"),
        (FSDP2, {"quantize_base": "nf4"}, "FSDP2 cannot divide a quantised UNet; drop --quantize_base"),
        (FSDP2, {"use_8bit_adam": True}, "not of --use_8bit_adam; drop it"),
        (FSDP2, {"compile": True}, "FSDP2 was not made to work with --compile; drop it"),
        (FSDP2, {"precision": "fp16"}, "FSDP2 trains MADM in bf16 or float32; use --mixed_precision bf16 or no"),
        (FSDP2 | {"FSDP_VERSION": "1"}, {}, "fsdp_version: 1; FSDP2 trains MADM with 2, as in .*fsdp2.yaml"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: true; FSDP2 .* with false"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp_activation_checkpointing: true"),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading: true"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage: 3; DeepSpeed .* with 2"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device: cpu"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "deepspeed_config_file: ds.json"),
        pytest.param(
            ZERO2, {}, "DeepSpeed is not installed: pip install deepspeed",
            marks=pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed"),
        ),
        pytest.param(ZERO2, {"use_8bit_adam": True}, "DeepSpeed divides the moments", marks=needs_deepspeed),
    ],
)  # fmt: skip
def test_refused_with_an_engine(environment, settings, message, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    given = {"quantize_base": "none", "use_8bit_adam": False, "compile": False, "precision": "no", "num_tasks": 1}
    given |= settings
    precision, num_tasks = given.pop("precision"), given.pop("num_tasks")
    with pytest.raises(UserError, match=message):
        check_engine(Namespace(**given), precision, num_tasks)
    for key in environment:
        monkeypatch.delenv(key)
    check_engine(Namespace(**given), precision, num_tasks)  # DDP takes them all
