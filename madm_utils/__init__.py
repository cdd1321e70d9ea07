"""MADM: unsupervised adaptation of semantic segmentation from RGB to depth, infrared and event images.

The public names are loaded at first use, so that `import madm_utils` stays quick and silent.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madm_utils.modeling_madm import MADMModel
    from madm_utils.pipeline_madm import MADMPipeline

__version__ = "0.1.0"
__all__ = ["MADMModel", "MADMPipeline", "__version__"]

_MODULES = {"MADMModel": "madm_utils.modeling_madm", "MADMPipeline": "madm_utils.pipeline_madm"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
