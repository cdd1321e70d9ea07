#!/usr/bin/env python
"""A page to try models on: drop a depth, infrared or event image, see its classes, compare two models.

    make venv-demo    # an environment of its own: gradio needs an older Pillow than the rest
    .venv-demo/bin/python demo_app.py --model_path outputs/depth outputs/infrared

Then open the address it prints. `--model_path` may be left out when the environment variable MADM_MODELS holds folders
or Hub ids, separated by spaces: this is how a Hugging Face Space is told its models.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madm_utils import cli
from madm_utils.cli import UserError

if TYPE_CHECKING:
    import gradio as gr

    from madm_utils.app_models import AppModels

MAX_UPLOAD = "100mb"
MAX_WAITING = 32
"""People in the queue; those who come after are told to try again."""
EXAMPLES_DIR = Path(__file__).resolve().parent / "space" / "examples"
EXAMPLES = {name: EXAMPLES_DIR / f"{name}.png" for name in ("depth", "infrared", "event")}
INTRODUCTION = """# Segmentation of depth, infrared and event images
Choose an image, a model and its modality, and press *Segment*. Opacity, hidden classes and the confidence map change
in your browser, without running the model again."""
NO_MODEL = "no model to show; give --model_path or set the environment variable MADM_MODELS"
CSS = """
.example { flex-direction: column; }
.example img { width: 100%; height: 56px; object-fit: cover; border-radius: 4px; margin: 0 0 4px; }
"""
QUIET = {"api_visibility": "private", "show_progress": "hidden"}


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, got {text}")
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model_path", nargs="+", metavar="MODEL", default=os.environ.get("MADM_MODELS", "").split(),
        help="run folders, checkpoint folders or Hub ids, one or several [the environment variable MADM_MODELS]",
    )  # fmt: skip
    parser.add_argument("--device", help="where the models run, e.g. cuda:1 or cpu [a GPU when there is one]")
    parser.add_argument("--server_name", help="address to listen on, 0.0.0.0 for all [127.0.0.1: this machine only]")
    parser.add_argument("--server_port", type=_port, help="port to listen on [the first free one from 7860]")
    parser.add_argument(
        "--share", action="store_true", help="make a public link, which passes through gradio's servers"
    )
    return parser.parse_args(argv)


class Events:
    """What the page does. Each event works on what its own visitor sent; nothing of a visitor is kept between two."""

    def __init__(self, models: "AppModels"):
        self.models = models

    def preview(self, path: str | None) -> list[Any]:
        """Show the image beside which there is no result yet."""
        from madm_utils import app_files, app_viewer

        try:
            value = path and app_viewer.viewer_value(Path(path).name, app_files.read_upload(path))
        except UserError as error:
            value = app_viewer.message_value(str(error))
        return [value, *self._downloads([])]

    def segment(self, path: str | None, comparing: bool, *choices: str) -> list[Any]:
        """Show the result of one model, or of two; `choices` are the models, each followed by its modality."""
        from madm_utils import app_files, app_viewer

        try:
            image = app_files.read_upload(path)
            wanted = [choices[:2], choices[2:]] if comparing else [choices[:2]]
            results = [self.models.segment(image, *choice) for choice in wanted]
        except UserError as error:
            return [app_viewer.message_value(str(error)), *self._downloads([])]
        files = app_files.write_downloads(path, results, os.environ["GRADIO_TEMP_DIR"])
        return [app_viewer.viewer_value(Path(path).name, image, results), *self._downloads(files)]

    def modalities(self, name: str, modality: str) -> dict[str, Any]:
        """What the chosen model can segment; the modality stays when it is among it."""
        import gradio as gr

        offered = self.models.pipelines[name].adapter_names
        return gr.update(choices=list(offered), value=modality if modality in offered else offered[0])

    def choose_example(self, kind: str, name: str, modality: str) -> tuple[str, str, dict[str, Any]]:
        """The example, with a model for it where there is one."""
        able = [other for other, pipe in self.models.pipelines.items() if kind in pipe.adapter_names]
        chosen = name if name in able or not able else able[0]
        return str(EXAMPLES[kind]), chosen, self.modalities(chosen, kind if able else modality)

    @staticmethod
    def _downloads(files: Sequence[str]) -> list[dict[str, Any]]:
        """Updates of the four buttons."""
        import gradio as gr

        owners = (" of A", " of B") if len(files) > 2 else ("",)
        labels = [f"{kind} PNG{owner}" for owner in owners for kind in ("Label", "Colour")]
        shown = [gr.update(value=file, label=label, visible=True) for file, label in zip(files, labels, strict=False)]
        return shown + [gr.update(value=None, visible=False)] * (4 - len(files))


def build_page(models: "AppModels") -> "gr.Blocks":
    import gradio as gr

    from madm_utils.app_files import CACHE_AGE

    with gr.Blocks(
        title="MADM", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_AGE // 4, CACHE_AGE)
    ) as page:
        gr.Markdown(INTRODUCTION)
        if models.failures:
            listed = "\n".join(f"- {failure}" for failure in models.failures)
            gr.Markdown(f"**Models that could not be loaded**\n\n{listed}", elem_id="failures")
        if models.pipelines:
            _build_controls(models)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def _build_controls(models: "AppModels") -> None:
    """The two columns below the introduction, and what happens in them."""
    import gradio as gr

    from madm_utils import app_viewer
    from madm_utils.app_files import MAX_MEGAPIXELS

    events = Events(models)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label=f"Image (up to {MAX_MEGAPIXELS} megapixels)", elem_id="upload", height=140)
            gr.Markdown("Examples (drawn, no photographs)")
            with gr.Row():
                examples = {
                    kind: gr.Button(kind, icon=path, size="sm", min_width=80, elem_classes="example", elem_id=kind)
                    for kind, path in EXAMPLES.items()
                }
            for button in examples.values():
                button.keep_in_cache.add(button.icon["path"])  # `delete_cache` would take it from every visitor
            first = _model_choice(events, "", 0)
            comparing = gr.Checkbox(label="Compare with a second model")
            with gr.Group(visible=False) as second_group:
                second = _model_choice(events, " to compare with", 1)
            run = gr.Button("Segment", variant="primary", elem_id="run")
        with gr.Column(scale=3, min_width=320):
            viewer = gr.HTML(
                html_template=app_viewer.VIEWER_HTML, css_template=app_viewer.VIEWER_CSS,
                js_on_load=app_viewer.VIEWER_JS, apply_default_css=False, elem_id="viewer",
            )  # fmt: skip
            with gr.Row():
                downloads = [gr.DownloadButton(visible=False, size="sm", elem_id=f"download{k}") for k in range(4)]
    comparing.change(lambda shown: gr.update(visible=shown), comparing, second_group, queue=False, **QUIET)
    for kind, button in examples.items():
        button.click(partial(events.choose_example, kind), first, [file, *first], preprocess=False, **QUIET)
    segmenting = run.click(
        events.segment, [file, comparing, *first, *second], [viewer, *downloads], concurrency_limit=1,
        show_progress_on=viewer, api_visibility="private",
    )  # fmt: skip
    # A new file is shown at once, and a result that is still on its way for the one before does not replace it.
    file.change(
        events.preview, file, [viewer, *downloads], concurrency_limit=2, cancels=segmenting, api_visibility="private"
    )


def _model_choice(events: Events, suffix: str, position: int) -> "tuple[gr.Dropdown, gr.Dropdown]":
    import gradio as gr

    names = list(events.models.pipelines)
    name = names[min(position, len(names) - 1)]
    offered = list(events.models.pipelines[name].adapter_names)
    model = gr.Dropdown(names, value=name, label=f"Model{suffix}")
    modality = gr.Dropdown(
        offered, value=offered[position % len(offered)], label=f"Modality{suffix}", elem_id=f"modality{position}"
    )
    # Raw values: what the visitor chose before may be no choice any more when two changes follow each other closely.
    model.input(events.modalities, [model, modality], modality, queue=False, preprocess=False, **QUIET)
    return model, modality


def theme() -> "gr.Theme":
    """gradio's own, with fonts of the visitor's system (its web fonts come from another site) and more contrast."""
    import gradio as gr

    base = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    states = ("", "_dark", "_hover", "_hover_dark")
    return base.set(
        **{f"button_primary_background_fill{state}": "*primary_700" for state in states},
        **{
            f"block_{part}_text_color{mode}": "*body_text_color"
            for part in ("title", "label")
            for mode in ("", "_dark")
        },
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    on_space = "SPACE_ID" in os.environ
    if not args.model_path and not on_space:
        raise UserError(NO_MODEL)
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"{sys.executable} has no gradio; make venv-demo creates an environment that has")
    from madm_utils.app_models import load_models

    models = load_models(args.model_path, args.device, keep_going=on_space)
    if not args.model_path:
        models.failures.append(NO_MODEL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # how services are stopped; what was uploaded goes then too
    # Uploads and results lie in a folder of this run only, which goes when it ends; gradio reads this when imported.
    with tempfile.TemporaryDirectory(prefix="madm-demo-", ignore_cleanup_errors=True) as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        try:
            build_page(models).launch(
                server_name=args.server_name, server_port=args.server_port, share=args.share, max_file_size=MAX_UPLOAD,
                allowed_paths=[str(EXAMPLES_DIR)], theme=theme(), css=CSS, footer_links=["settings"],
                run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
            )  # fmt: skip
        except OSError as error:  # the port
            raise UserError(str(error)) from None


if __name__ == "__main__":
    cli.run(main)
