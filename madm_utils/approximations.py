"""Approximations of a trained model at inference: a merged LoRA, and the weights of the UNet in 8 bits."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from madm_utils.cli import UserError
from madm_utils.merging import check_unshared, merge_lora
from madm_utils.model_folder import read_config
from madm_utils.modeling_madm import MADMModel

QUANTIZATIONS = ("int8", "fp8")
_NO_LORA = (
    "there is no LoRA to merge: the UNet of this model was trained whole, or its LoRA is merged already; leave "
    "--merge_lora out"
)


def check_lora(folders: Iterable[Path]) -> None:
    """Raise `UserError` unless each of these models has a LoRA that can be merged; none is loaded."""
    for folder in folders:
        if read_config(folder).unet_tuning != "lora":
            raise UserError(f"{folder}: {_NO_LORA}")


def check_approximation(model: MADMModel, merge: bool = False, quantization: str | None = None) -> None:
    """Raise the errors of `approximate`, and change nothing."""
    if merge and model.unet_tuning != "lora":
        raise UserError(_NO_LORA)
    if quantization:
        _check_quantization(model, quantization)
    if merge or quantization:
        check_unshared(model)


def approximate(model: MADMModel, merge: bool = False, quantization: str | None = None) -> None:
    """Change a model in place, on its device; a LoRA is merged before anything is quantised.

    Args:
        model: in evaluation mode.
        merge: add the LoRA to the UNet's weights.
        quantization: `int8` or `fp8`, see `quantize_unet`.

    Raises:
        UserError: a merge without a LoRA, a UNet that several models share, or see `quantize_unet`. The model is as
            before then.
    """
    check_approximation(model, merge, quantization)
    if merge or quantization:
        merge_lora(model)
    if quantization:
        quantize_unet(model, quantization)


def quantize_unet(model: MADMModel, quantization: str) -> None:
    """Store the UNet's weights in 8 bits, in place, on the device where they are; it cannot be trained or saved then.

    Args:
        model: its LoRA merged.
        quantization: `int8`: the linear layers, with one scale per row and products of 8-bit integers but for
            outlying activations (LLM.int8(), arXiv 2208.07339; bitsandbytes). `fp8`: linear layers and convolutions
            but for norms as float8 e4m3, cast to the UNet's own precision layer by layer while it computes.

    Raises:
        UserError: another name, or the UNet is quantised already.
    """
    _check_quantization(model, quantization)
    if quantization == "fp8":
        model.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.unet.dtype)
    else:
        _linear_layers_to_int8(model.unet)
    model.quantization = quantization


def _check_quantization(model: MADMModel, quantization: str) -> None:
    if quantization not in QUANTIZATIONS:
        raise UserError(f"the UNet can be quantised to {' or '.join(QUANTIZATIONS)}, got {quantization!r}")
    if model.quantization is not None:
        raise UserError(f"the UNet is stored in {model.quantization} already; load the model again")


def _linear_layers_to_int8(unet: nn.Module) -> None:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    # It would warn of every layer and image that activations become float16, as LLM.int8() has it.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for parent in list(unet.modules()):
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear):
                continue
            # The threshold of LLM.int8(): columns with larger activations are multiplied in 16 bits.
            small = Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
            )
            small.bias = layer.bias
            # From the CPU, because bitsandbytes quantises a tensor when it leaves there.
            weight = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            small.weight = weight.to(layer.weight.device)
            setattr(parent, name, small.eval())
