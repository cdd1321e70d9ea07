"""The code that travels with a saved model, so that it runs with nothing but diffusers.

    model_index.json          components and settings, as `DiffusionPipeline.from_pretrained` reads them
    pipeline.py               the pipeline and all it needs of this package, in one file
    segmenter/segmenter.py    the segmenter's class beside its weights

One file each, because diffusers copies to its cache what a file imports directly, but not what that imports in turn.
"""

import ast
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from madm_utils import __version__

PIPELINE_FILES = ("model_index.json", "pipeline.py")
_PACKAGE = Path(__file__).parent
_PREFIX = "madm_utils."
_Origins = dict[str, tuple[str, str]]
"""Name -> module it comes from, and what it is called there."""
_HEADER = '''"""{what}

From the MADM suite, version {version} (Apache-2.0), of which this file repeats what is needed here. Diffusers runs it:

    pipe = DiffusionPipeline.from_pretrained(REPOSITORY, custom_pipeline=REPOSITORY, trust_remote_code=True)
"""

'''


def save_standalone(folder: Path, settings: dict[str, Any]) -> None:
    """Write the files of the module docstring into a model folder.

    Args:
        folder: holds the model.
        settings: what its `madm_config.json` holds.
    """
    full = settings["unet_tuning"] == "full"
    index = {
        "_class_name": ["pipeline", "DiffusionSegmentationPipeline"],
        "_diffusers_version": version("diffusers"),
        "segmenter": ["segmenter", "Segmenter"],
        "unet": ["diffusers", "UNet2DConditionModel"] if full else [None, None],
        "vae": [None, None],
        "vae_decoder": [None, None],
        "scheduler": [None, None],
        "settings": settings,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    source = standalone_source("segmentation_pipeline", "DiffusionSegmentationPipeline", "The pipeline of this model.")
    (folder / "pipeline.py").write_text(source, encoding="utf-8")
    source = standalone_source("segmenter", "Segmenter", "The segmenter of this model.")
    (folder / "segmenter" / "segmenter.py").write_text(source, encoding="utf-8")


@cache
def standalone_source(module: str, name: str, what: str) -> str:
    """The source of `madm_utils.<module>.<name>` and of everything in this package that it uses, as one module.

    Args:
        module, name: where it is defined.
        what: first line of the docstring.

    Raises:
        ValueError: two modules define one name differently, which a single module cannot hold.
    """
    collected: dict[str, tuple[str, str]] = {}
    imports: set[tuple[str, str]] = set()
    _collect(module, name, collected, imports)
    header = _HEADER.format(what=what, version=__version__)
    body = "\n\n\n".join(source for _, source in collected.values())
    return header + _import_lines(imports) + "\n\n\n" + body + "\n"


def _import_lines(imports: set[tuple[str, str]]) -> str:
    """Import statements of (module, name), one per module; the name is empty where the module itself is imported."""
    whole = sorted(module for module, name in imports if not name)
    parts: dict[str, list[str]] = {}
    for module, name in sorted(imports):
        if name:
            parts.setdefault(module, []).append(name)
    lines = [f"import {module}" for module in whole]
    return "\n".join(lines + [f"from {module} import {', '.join(names)}" for module, names in parts.items()])


def _collect(module: str, name: str, collected: dict[str, tuple[str, str]], imports: set[tuple[str, str]]) -> None:
    """Add the definition of `name`, after what it uses."""
    definitions, inner, outer, lines = _parse(module)
    node = definitions[name]
    if name in collected:
        if collected[name][0] != module:
            raise ValueError(f"{module} and {collected[name][0]} both define {name}; one of them needs another name")
        return
    collected[name] = (module, "")  # ends a recursion
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    source = "\n".join(lines[first - 1 : node.end_lineno])
    for used in sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)}):
        if used in definitions and used != name:
            _collect(module, used, collected, imports)
        elif used in inner:
            _collect(*inner[used], collected, imports)
        elif used in outer:
            imports.add(outer[used])
    del collected[name]
    collected[name] = (module, source)


@cache
def _parse(module: str) -> tuple[dict[str, ast.stmt], _Origins, _Origins, list[str]]:
    """Of a module of this package: definitions by name; names from its other modules; other imports; lines."""
    text = (_PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    inner: _Origins = {}
    outer: _Origins = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            definitions |= {n.id: node for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(_PREFIX):
            inner |= {alias.name: (node.module.removeprefix(_PREFIX), alias.name) for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                written = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                whole = isinstance(node, ast.Import)
                outer[alias.asname or alias.name.split(".")[0]] = (written, "") if whole else (node.module, written)
    return definitions, inner, outer, text.splitlines()
