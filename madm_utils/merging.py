"""A LoRA merged into the UNet it was trained on, for formats that have no place for one."""

from madm_utils.modeling_madm import MADMModel


def merge_lora(model: MADMModel) -> None:
    """Add the model's LoRA to the UNet's own weights, in place; afterwards the model is one of a whole UNet.

    Outputs change by rounding only. A UNet that other models share must not be merged.
    """
    if model.unet_tuning != "lora":
        return
    model.unet.fuse_lora(adapter_names=[model.task.modality])
    model.unet.unload_lora()
    model.unet_tuning = "full"
