"""A LoRA merged into the UNet it was trained on, for formats that have no place for one."""

from madm_utils.base_model import base_signature
from madm_utils.cli import UserError
from madm_utils.modeling_madm import MADMModel


def merge_lora(model: MADMModel) -> None:
    """Add the model's LoRA to the UNet's own weights, in place; afterwards the model is one of a whole UNet.

    Outputs change by rounding only.

    Raises:
        UserError: other models share the UNet, which would change with it.
    """
    if model.unet_tuning != "lora":
        return
    check_unshared(model)
    model.unet.fuse_lora(adapter_names=[model.task.modality])
    model.unet.unload_lora()
    model.unet_tuning = "full"
    # Of a base whose UNet is not used, as a model that was trained whole has it.
    model.base_signature = base_signature(model.extractor.vae, model.extractor.scheduler)


def check_unshared(model: MADMModel) -> None:
    """Raise `UserError` where other models' LoRAs are on the UNet of this one."""
    adapters = getattr(model.unet, "peft_config", {})
    if len(adapters) > 1:
        raise UserError(
            f"the LoRAs of {', '.join(adapters)} share one UNet, so none of them can be merged; load the folder of "
            "one of them"
        )
