"""Loading Stable Diffusion parts and our own saved parts, strictly; LoRA in the diffusers format.

Everything that reads weights from disk or the Hub is here. Our own files are safetensors and JSON; a base model that
has nothing but `.bin` files is read by the libraries as plain tensors.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, BitsAndBytesConfig, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn

from madm_utils.cli import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModel

PARTS = ("vae", "unet", "scheduler", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class BaseModelReference:
    """A Stable Diffusion 1.x/2.x model in diffusers layout: local folder or Hub id."""

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None

    def to_dict(self) -> dict:
        """JSON form; a local folder becomes absolute, so that the saved model loads from any working directory."""
        path = Path(self.pretrained_model_name_or_path)
        values = dataclasses.asdict(self)
        if path.is_dir():
            values["pretrained_model_name_or_path"] = str(path.resolve())
        return values


def _check_base_folder(base: BaseModelReference) -> None:
    """Refuse a local folder that lacks a part, before anything is loaded; Hub ids are left to the loaders."""
    name = base.pretrained_model_name_or_path
    path = Path(name)
    if not path.is_dir():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
        if looks_local or path.exists():
            raise UserError(
                f"base model {name}: no such folder; give a Stable Diffusion folder in diffusers layout or a Hub id "
                "such as CompVis/stable-diffusion-v1-4 (--pretrained_model_name_or_path, in Python `base=`)"
            )
        return
    missing = [part for part in PARTS if not (path / part).is_dir()]
    if missing:
        found = sorted(p.name for p in path.iterdir())
        raise UserError(
            f"base model {name} lacks {', '.join(missing)}; a Stable Diffusion folder in diffusers layout has "
            f"{', '.join(PARTS)}, found: {', '.join(found) or 'nothing'}"
        )


def _load(base: BaseModelReference, cls, part: str, **options):
    """`cls.from_pretrained` of one part, refusing weights that do not cover it, with a one-line error."""
    name = base.pretrained_model_name_or_path
    if base.revision is not None:
        options["revision"] = base.revision
    has_weights = part in ("vae", "unet", "text_encoder")
    if has_weights:
        options["output_loading_info"] = True
        if base.variant is not None:
            options["variant"] = base.variant
    try:
        loaded = cls.from_pretrained(name, subfolder=part, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"cannot load '{part}' of base model {name}: {reason}. "
            "Check the name, --revision, --variant and the network, or give a local folder."
        ) from None
    if not has_weights:
        return loaded
    model, info = loaded
    # Unexpected tensors do no harm (old text encoders carry position ids); absent ones would be random numbers.
    absent = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if absent:
        raise UserError(
            f"'{part}' of base model {name} lacks {len(absent)} tensors that its config asks for, or has them in "
            f"another shape: {', '.join(map(str, absent[:20]))}; download it again"
        )
    return model


def load_vae(base: BaseModelReference, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE of the base model."""
    _check_base_folder(base)
    return _load(base, AutoencoderKL, "vae", torch_dtype=dtype)


def load_scheduler(base: BaseModelReference) -> DDPMScheduler:
    """The noise schedule, as a DDPM scheduler whatever sampler the base model names."""
    return _load(base, DDPMScheduler, "scheduler")


def load_unet(
    base: BaseModelReference, dtype: torch.dtype = torch.float32, quantization: str = "none"
) -> UNet2DConditionModel:
    """The UNet of the base model.

    Args:
        base: Stable Diffusion folder or Hub id.
        dtype: of the weights; with quantisation, of those that are not quantised and of the arithmetic.
        quantization: `nf4` (4 bits, arithmetic in `dtype`) or `int8` for the weights of the linear layers, by
            bitsandbytes, on the current GPU; `none`. Convolutions and norms stay as they are.

    Raises:
        UserError: see `check_quantization`; or the weights are not to be had, or do not fit.
    """
    check_quantization(quantization)
    options = {}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantization == "nf4",
            load_in_8bit=quantization == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    return _load(base, UNet2DConditionModel, "unet", torch_dtype=dtype, **options)


def check_quantization(quantization: str) -> None:
    """Raise `UserError` where a quantised UNet cannot be built; cheap, so that it can be asked before any loading."""
    if quantization != "none" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UserError(
            f"--quantize_base {quantization} needs a GPU: bitsandbytes quantises the UNet there, and PyTorch finds "
            "none (CUDA or XPU). Leave the flag out, or run on a machine with a GPU"
        )


def load_unet_config(base: BaseModelReference) -> dict:
    """Configuration of the base model's UNet, for UNets whose weights come from elsewhere."""
    try:
        return UNet2DConditionModel.load_config(
            base.pretrained_model_name_or_path, subfolder="unet", revision=base.revision
        )
    except OSError as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"cannot load 'unet' of base model {base.pretrained_model_name_or_path}: {reason}") from None


def base_fingerprint(vae: AutoencoderKL, unet: UNet2DConditionModel, scheduler: DDPMScheduler) -> str:
    """Digest that tells base models apart: first and last convolutions (which no quantisation touches), noise levels.

    Not the configurations, to which a newer diffusers adds entries.
    """
    tensors = [vae.encoder.conv_in.weight, vae.decoder.conv_out.weight, unet.conv_in.weight, unet.conv_out.weight]
    digest = hashlib.sha256(str(vae.config.scaling_factor).encode())
    for tensor in (*tensors, scheduler.alphas_cumprod):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_signature(
    vae: AutoencoderKL, scheduler: DDPMScheduler, unet: UNet2DConditionModel | None = None
) -> list[float]:
    """A few numbers of a base model by which `check_base` knows it again; empty on the meta device.

    Weights of convolutions, which no LoRA and no quantisation touches.

    Args:
        vae, scheduler: of the base model.
        unet: of the base model as well, where it is used as it is but for a LoRA.
    """
    convolutions = [vae.encoder.conv_in, vae.decoder.conv_out]
    if unet is not None:
        convolutions += [unet.conv_in, unet.mid_block.resnets[0].conv1, unet.conv_out]
    weights = weight_samples(convolutions)
    return [float(f"{float(scheduler.alphas_cumprod[-1]):.6g}"), *weights] if weights else []


def weight_samples(convolutions: Sequence[nn.Conv2d]) -> list[float]:
    """16 weights of each convolution, to 6 digits; empty on the meta device."""
    if any(convolution.weight.is_meta for convolution in convolutions):
        return []
    values = []
    for convolution in convolutions:
        weights = convolution.weight.detach().flatten()
        values += weights[torch.linspace(0, len(weights) - 1, 16).long().to(weights.device)].float().tolist()
    return [float(f"{value:.6g}") for value in values]


def same_weights(signature: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two signatures are of the same weights, up to the rounding of a half precision."""
    return len(signature) == len(expected) and all(
        abs(found - value) <= 0.004 * abs(value) + 1e-6 for found, value in zip(signature, expected, strict=True)
    )


def check_base(signature: Sequence[float], expected: Sequence[float], name: str) -> None:
    """Raise `UserError` unless the base model `name` is, up to the rounding of its precision, the expected one.

    Args:
        signature: of what was loaded, see `base_signature`.
        expected: of what the model was trained on.
        name: of the base model that was loaded.
    """
    if signature and not same_weights(signature, expected):
        raise UserError(
            f"this model was trained on another base model than {name}, whose weights differ; it would run, and "
            "segment nonsense. Give the base model that its card names"
        )


def vae_scale(vae: AutoencoderKL) -> int:
    """Image pixels per latent pixel of `vae`."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def load_text_encoder(base: BaseModelReference) -> "CLIPTextModel":
    """The text encoder of the base model, float32."""
    from transformers import CLIPTextModel

    return _load(base, CLIPTextModel, "text_encoder", dtype=torch.float32)


@torch.no_grad()
def empty_text_embedding(base: BaseModelReference) -> Tensor:
    """Embedding of the empty prompt, (1, tokens, D) float32: final layer norm applied, no attention mask."""
    from transformers import CLIPTokenizer

    tokenizer = _load(base, CLIPTokenizer, "tokenizer")
    text_encoder = load_text_encoder(base).eval()
    length = text_encoder.config.max_position_embeddings
    tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids).last_hidden_state


def local_folder(name: str | Path, revision: str | None = None, expected: str = "") -> Path:
    """A local folder for a folder or a Hub id; `expected` is the file that proves it is ours.

    Raises:
        UserError: no such folder, unreachable Hub repository, or `expected` is not in it.
    """
    path = Path(name)
    if not path.is_dir():
        if path.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise UserError(f"model {name}: no such folder; give a run folder, one of its checkpoints, or a Hub id")
        from huggingface_hub import snapshot_download

        try:
            # A run may have pushed its checkpoints too; they are not the model.
            path = Path(snapshot_download(str(name), revision=revision, ignore_patterns=["checkpoint-*/*"]))
        except Exception as error:  # the Hub client raises many unrelated types, all meaning "not to be had"
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"model {name}: no such folder, and not to be had from the Hub ({reason})") from None
    if expected and not (path / expected).is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
        raise UserError(
            f"{path} is not a trained model: it lacks {expected} (found: {found}). Give the --output_dir of a "
            "training run, one of its checkpoint folders, or a converted checkpoint."
        )
    return path


def check_keys(expected: dict[str, Tensor], found: dict[str, Tensor], where: str | Path) -> None:
    """Raise `UserError` listing every missing, unexpected and mis-shaped tensor."""
    problems = []
    for title, keys in (
        ("missing", sorted(expected.keys() - found.keys())),
        ("unexpected", sorted(found.keys() - expected.keys())),
        (
            "mis-shaped",
            [
                f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in sorted(expected.keys() & found.keys())
                if found[key].shape != expected[key].shape
            ],
        ),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}: {', '.join(keys)}")
    if problems:
        raise UserError(f"{where}: tensors do not fit the model; {'; '.join(problems)}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, with a one-line error when it is missing or damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the folder is incomplete, copy or download it again") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from None


def load_strict(cls: type[ModelMixin], folder: Path, part: str) -> ModelMixin:
    """Load the diffusers model in `folder/part`, float32, refusing any key or shape that does not fit."""
    path = folder / part
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is missing or lacks config.json; the folder is incomplete, copy or download it again")
    try:
        # The tensors of the file become the parameters: nothing is initialised, nothing copied.
        with torch.device("meta"):
            model = cls.from_config(cls.load_config(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}/config.json is damaged ({reason}); copy or download it again") from None
    restore_strict(model, folder, part, assign=True)
    return model


def save_part(model: ModelMixin, folder: Path, state: dict[str, Tensor]) -> None:
    """Write a diffusers model as its `save_pretrained` does, with the whole tensors of `state`."""
    from safetensors.torch import save_file

    model.save_config(folder)
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def save_lora(unet: UNet2DConditionModel, folder: Path, adapter: str, state: dict[str, Tensor]) -> None:
    """Write the adapter's tensors in the diffusers format with its alpha, so that plain diffusers loads it.

    Equal adapters give equal bytes: sets in the adapter's settings are sorted, and the header holds a single metadata
    entry, because safetensors writes several in an order that changes from process to process.

    Args:
        unet: has the adapter.
        folder: exists.
        adapter: its name.
        state: its tensors, as `lora_state` names them.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors.torch import save_file

    settings = unet.peft_config[adapter].to_dict()
    settings = {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    # Without the settings a reader takes alpha = rank and gets other outputs.
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    StableDiffusionPipeline.save_lora_weights(
        save_directory=folder,
        unet_lora_layers={key.removeprefix("unet."): value for key, value in state.items()},
        save_function=lambda weights, path: save_file(weights, path, metadata=metadata),
    )


def load_lora(unet: UNet2DConditionModel, folder: Path, adapter: str) -> None:
    """Add the adapter saved in `folder` to `unet` and make it active; every tensor must fit and be used."""
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    path = folder / LORA_WEIGHT_NAME_SAFE
    saved = read_safetensors(path)
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(
        str(folder), weight_name=LORA_WEIGHT_NAME_SAFE, return_lora_metadata=True
    )
    try:
        unet.load_lora_adapter(state, prefix="unet", adapter_name=adapter, metadata=metadata, low_cpu_mem_usage=False)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{path} does not fit the UNet of the base model: {reason}") from None
    check_keys(lora_state(unet, adapter), saved, path)


def restore_lora(unet: UNet2DConditionModel, folder: Path, adapter: str) -> None:
    """Put the tensors saved in `folder` into the adapter that `unet` already has."""
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import set_peft_model_state_dict

    path = folder / LORA_WEIGHT_NAME_SAFE
    saved = read_safetensors(path)
    check_keys(lora_state(unet, adapter), saved, path)
    state = {key.removeprefix("unet."): value for key, value in saved.items()}
    set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state), adapter_name=adapter)


def lora_state(unet: UNet2DConditionModel, adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors under names that diffusers reads from a file; empty when there is no such adapter."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    if adapter not in getattr(unet, "peft_config", {}):
        return {}
    state = get_peft_model_state_dict(unet, adapter_name=adapter)
    # diffusers has names of its own for attention layers alone, and takes the form of a file's first name for that of
    # all: an adapter of other layers too keeps peft's names everywhere.
    renamed = convert_state_dict_to_diffusers(state)
    if not any(".lora_A." in key for key in renamed):
        state = renamed
    return {f"unet.{key}": value for key, value in state.items()}


def restore_strict(module: ModelMixin, folder: Path, part: str, assign: bool = False) -> None:
    """Put the tensors saved in `folder/part` into `module`, refusing any key or shape that does not fit.

    With `assign` they replace those of the module instead of being copied into them.
    """
    path = folder / part / SAFETENSORS_WEIGHTS_NAME
    state = read_safetensors(path)
    check_keys(module.state_dict(), state, path)
    module.load_state_dict(state, assign=assign)
