"""Sharded training with the meaning of plain DDP: PyTorch's FSDP2 and DeepSpeed's ZeRO-2, through Accelerate.

The training loop talks to one `TrainingAccelerator` and does not know which engine runs. What differs is here: how two
backward passes make one step, how layers compute in half precision, and how divided tensors become whole ones for a
checkpoint and back. A checkpoint does not depend on the engine that wrote it.
"""

import os
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_deepspeed_available,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from madm_utils.args import check_precision
from madm_utils.base_model import check_quantization
from madm_utils.cli import UserError
from madm_utils.cpu_memory import keep_freed_memory
from madm_utils.distributed import PATIENCE

_NAMES = {"fsdp": "FSDP2", "deepspeed": "DeepSpeed"}
_CONFIGS = {"fsdp": "accelerate_configs/fsdp2.yaml", "deepspeed": "accelerate_configs/deepspeed_zero2.yaml"}
# Key of the accelerate config -> the variable by which `accelerate launch` hands it on, and the value it must have.
_REQUIRED = {
    "fsdp": {
        "fsdp_version": ("FSDP_VERSION", "2"),
        "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", "false"),
        "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", "false"),
        "fsdp_cpu_ram_efficient_loading": ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"),
    },
    "deepspeed": {
        "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"),
    },
}


def build_accelerator(args: Namespace, num_tasks: int) -> Accelerator:
    """Processes, engine, precision, accumulation and trackers of a training.

    Args:
        args: settings of the run.
        num_tasks: tasks that it trains.

    Raises:
        UserError: the machine or the engine cannot do what is asked for.
    """
    # `accelerate launch` hands its config's precision on through the environment.
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    check_precision(precision, torch.accelerator.is_available())
    check_engine(args, precision, num_tasks)
    check_quantization(args.quantize_base)
    keep_freed_memory()
    # `forward_sync_buffers`, its successor, would still copy BatchNorm statistics between the processes at the start.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return TrainingAccelerator(
        precision,
        args.gradient_accumulation_steps,
        args.max_grad_norm,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
    )


def launched_engine() -> str:
    """The engine that `accelerate launch` asks for: `fsdp`, `deepspeed`, or '' for DDP or a single process."""
    return next((n for n in _NAMES if os.environ.get(f"ACCELERATE_USE_{n.upper()}", "").lower() == "true"), "")


def check_engine(args: Namespace, precision: str, num_tasks: int) -> None:
    """Refuse what the launched engine cannot do, before anything is loaded.

    Raises:
        UserError: a setting that needs DDP, an accelerate config that asks for something else than ours, or DeepSpeed
            that is not installed.
    """
    engine = launched_engine()
    if not engine:
        return
    name, ddp = _NAMES[engine], "or launch with accelerate_configs/multi_gpu.yaml"
    for key, (variable, required) in _REQUIRED[engine].items():
        found = os.environ.get(variable, required)
        if found.lower() != required:
            raise UserError(
                f"the accelerate config says {key}: {found}; {name} trains MADM with {required}, as in "
                f"{_CONFIGS[engine]}"
            )
    if engine == "deepspeed" and not is_deepspeed_available():
        raise UserError(f"DeepSpeed is not installed: pip install deepspeed, {ddp}")
    if num_tasks > 1:
        raise UserError(f"{name} trains one --task per run, got {num_tasks}; give one, {ddp}")
    if args.quantize_base != "none":
        raise UserError(f"{name} cannot divide a quantised UNet; drop --quantize_base, {ddp}")
    if args.use_8bit_adam:
        raise UserError(f"{name} divides the moments of plain AdamW, not of --use_8bit_adam; drop it, {ddp}")
    if args.compile:
        raise UserError(f"{name} was not made to work with --compile; drop it, {ddp}")
    if precision == "fp16":
        raise UserError(f"{name} trains MADM in bf16 or float32; use --mixed_precision bf16 or no, {ddp}")


class TrainingAccelerator(Accelerator):
    """An `Accelerator` whose methods mean the same under DDP, FSDP2 and ZeRO-2.

    Weights stay float32 and layers compute under autocast with every engine, so that all follow the same numbers up to
    rounding; the engines' own half precision would round the weights as well.

    Args:
        precision: `no`, `fp16` or `bf16`.
        gradient_accumulation_steps: passes per step.
        max_grad_norm: what `clip_grad_norm_` will be told; DeepSpeed has to know it now.
        options: of `Accelerator`.
    """

    def __init__(self, precision: str, gradient_accumulation_steps: int, max_grad_norm: float, **options: Any):
        self.engine = launched_engine()
        self._precision = precision
        has_gpu = torch.accelerator.is_available()
        # BatchNorm statistics stay per process, as published; synchronised gradients are views of DDP's buckets.
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        # The others wait while the main process writes a checkpoint or reaches the Hub.
        patience = {"timeout": PATIENCE}
        # Without `cpu`, several processes on a machine without GPU would not form a group, and each write the results.
        cpu, plugins = not has_gpu, {}
        if self.engine == "fsdp":
            plugins["fsdp_plugin"] = _fsdp_plugin()
        elif self.engine == "deepspeed":
            cpu, plugins["deepspeed_plugin"] = False, _deepspeed_plugin(precision, max_grad_norm)
            if not has_gpu:
                patience["backend"] = "gloo"
        handlers.append(InitProcessGroupKwargs(**patience))
        super().__init__(
            cpu=cpu,
            # Told of it, DeepSpeed would turn the weights into bf16.
            mixed_precision="no" if self.engine == "deepspeed" else precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            kwargs_handlers=handlers,
            # For CUDA the loader pins its batches; copying one then need not wait for the step before.
            dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
            **plugins,
            **options,
        )
        if self.engine == "fsdp" and self.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate shards on GPUs only and would run DDP without a word; PyTorch shards on the CPU as well.
            self.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = plugins["fsdp_plugin"]

    @property
    def mixed_precision(self) -> str:
        """`no`, `fp16` or `bf16`."""
        return self._precision

    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager:
        """Half precision inside the block, with every engine."""
        if self.engine == "deepspeed":
            return torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16")
        return super().autocast(autocast_handler)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Gradients of backward passes inside add up to those of the next one outside; no step is made inside.

        DDP does not communicate inside. The other engines do: keeping whole gradients would cost what they save.
        """
        sync, self.sync_gradients = self.sync_gradients, False  # DeepSpeed steps in the backward pass
        try:
            with nullcontext() if self.engine else super().no_sync(model):
                yield
        finally:
            self.sync_gradients = sync

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: int = 2) -> Tensor:
        """Clip, and return the norm before clipping as a plain scalar. DeepSpeed has clipped in its step."""
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return torch.as_tensor(whole(norm), device=self.device)


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # The frozen VAE and decoder also run outside the model's forward pass, where nobody would gather its shards.
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), ignored_modules=r"extractor\.vae(_decoder)?"
    )


def _deepspeed_plugin(precision: str, max_grad_norm: float) -> DeepSpeedPlugin:
    plugin = DeepSpeedPlugin(gradient_clipping=max_grad_norm)
    if precision == "bf16":
        # Gradients of the modules that this list named would travel as bf16.
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        plugin.deepspeed_config["torch_autocast"] = autocast
    return plugin


# --- divided and whole tensors ---------------------------------------------------------------------------------------


def whole(value: Any) -> Any:
    """A tensor that FSDP2 has sharded, in full (every process has to call); anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_state(state: dict[Any, Any], keep: bool = True) -> dict[Any, Any]:
    """A nested state dictionary with whole tensors in place of shards. Every process has to call.

    Args:
        state: parameters and buffers, or the state of an optimizer.
        keep: return the values, gathered ones in CPU memory; False for processes that only take part.
    """
    gathered = {}
    for key, value in state.items():
        if isinstance(value, dict):
            gathered[key] = gather_state(value, keep)
            continue
        full = whole(value)
        if keep:
            gathered[key] = value if full is value else full.cpu()
    return gathered


class OptimizerState:
    """State of a prepared AdamW in the form it has on one process, whichever engine divides it.

    Args:
        optimizer: as `Accelerator.prepare` returns it.
        trained: parameters of the prepared model, by group of the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: list[list[nn.Parameter]]):
        self.trained = trained
        inner = getattr(optimizer, "optimizer", optimizer)
        # DeepSpeed's optimizer around AdamW; it holds the own part of each group as one flat tensor.
        self.zero = inner if hasattr(inner, "single_partition_of_fp32_groups") else None
        self.optimizer = inner.optimizer if self.zero else inner

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """Whole tensors by the parameter's number; `keep` as in `gather_state`. Every process has to call."""
        if not self.zero:
            return gather_state(self.optimizer.state_dict(), keep)
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state, groups = {}, []
        for flat, group, parameters in self._divided_groups():
            numbers = [len(state) + n for n in range(len(parameters))]
            groups.append({**group, "params": numbers})
            for number, parameter in zip(numbers, parameters, strict=True):
                values = {
                    key: safe_get_full_optimizer_state(parameter, key) if value.dim() else value
                    for key, value in self.optimizer.state[flat].items()
                }
                state[number] = {key: value.cpu() for key, value in values.items()} if keep else {}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; every process passes the same."""
        parameters = [parameter for group in self.trained for parameter in group]
        if not self.zero:
            state = {
                i: {k: _like(v, parameters[i]) for k, v in values.items()} for i, values in saved["state"].items()
            }
            own = zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
            groups = [stored | _implementation(group) for stored, group in own]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        for (flat, group, _), stored in zip(self._divided_groups(), saved["param_groups"], strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"} | _implementation(group))
            for key, value in saved["state"][stored["params"][0]].items():
                # A fused AdamW counts its steps on the device.
                self.optimizer.state[flat][key] = torch.zeros_like(flat) if value.dim() else value.to(flat.device)
        self._link()
        for index, parameter in enumerate(parameters):
            for key, value in saved["state"][index].items():
                if value.dim():
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _divided_groups(self) -> Iterator[tuple[Tensor, dict[str, Any], list[nn.Parameter]]]:
        """Own part, settings and parameters of each group under DeepSpeed."""
        return zip(self.zero.single_partition_of_fp32_groups, self.optimizer.param_groups, self.trained, strict=True)

    def _link(self) -> None:
        """Tell the parameters where their part of the state lies, which DeepSpeed does for the first group only."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat, parameters in zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)


def _implementation(group: dict[str, Any]) -> dict[str, Any]:
    """Settings of a group that say how it is computed, not what: never those of the run that wrote a checkpoint."""
    return {key: group[key] for key in ("foreach", "fused", "capturable") if key in group}


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """The own shard of `value` where `parameter` is sharded."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    # Every process has read the same file, so nothing has to be sent.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
