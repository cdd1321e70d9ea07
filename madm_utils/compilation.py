"""`--compile`: torch.compile of the blocks that repeat (regional compilation), without silent fallbacks.

Blocks, not the whole model: the graphs are small, equal blocks share one, and what stays outside (the conditioning,
switching adapters, recomputing activations, the engines' hooks) works as without. Modules are compiled in place, so
that names in state dictionaries, copies and checkpoints stay what they are. A copy of a compiled module is not
compiled. diffusers' `compile_repeated_blocks` would take the UNet's transformer blocks, but not its convolutions.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from madm_utils.cli import UserError
from madm_utils.feature_extractor import NUM_TAPS, DiffusionFeatureExtractor
from madm_utils.segmenter import Segmenter

_VARIANTS = 128
"""Graphs of one class of blocks: some 15 shapes in Stable Diffusion's UNet, with and without gradient, for a few image
sizes. PyTorch's limit of 8 would end in the first step."""


class CompileError(UserError):
    """A block cannot be compiled, whatever it is to compute."""


def compile_model(
    extractor: DiffusionFeatureExtractor,
    segmenters: Sequence[Segmenter],
    device: torch.device,
    backend: str = "inductor",
) -> None:
    """Have the blocks of UNet, VAE, projections and head compiled when they first run.

    Call it when adapters and recomputation are set, and before a model is wrapped for several processes. Every
    size of images and every mode (training, evaluation) is compiled once, for exactly these shapes.

    Args:
        extractor: VAE and UNet; blocks that are compiled already stay so.
        segmenters: the student's and the teacher's.
        device: on which they will run.
        backend: of torch.compile.

    Raises:
        UserError: the compiler for this device is missing.
        CompileError: later, from a forward pass, a block cannot be compiled or more than 128 variants of one class
            of blocks were.
    """
    if backend == "inductor":
        check_compiler(device.type)
    blocks = [*_extractor_blocks(extractor), *(block for s in segmenters for block in _segmenter_blocks(s))]
    # Dropout as without compilation: from PyTorch's generator, drawn for the same elements.
    options = {"fallback_random": True} if backend == "inductor" else None
    for name, block in blocks:
        if block._compiled_call_impl is None:
            block.compile(fullgraph=True, dynamic=False, backend=backend, options=options, recompile_limit=_VARIANTS)
            block._compiled_call_impl = _explained(name, block._compiled_call_impl)
    clock = _compile_clock()
    for segmenter in segmenters:
        segmenter.register_forward_hook(lambda *_: clock.report())
    _say(
        f"--compile: {len(blocks)} blocks of UNet, VAE and head are compiled when they first run; that takes minutes, "
        "some seconds for every block of another shape, and again for every other size of images"
    )


def check_compiler(device_type: str) -> None:
    """Raise `UserError` where torch.compile's inductor has no compiler for this kind of device."""
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "--compile needs a C++ compiler on the CPU and found none: install g++ (Debian, Ubuntu: apt install "
                "g++), or name yours in the environment variable CXX; or leave --compile out"
            ) from None
    elif device_type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "--compile needs Triton and a GPU that it supports (NVIDIA: compute capability 7.0 and later): pip "
                "install triton, or leave --compile out"
            )


def _extractor_blocks(extractor: DiffusionFeatureExtractor) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what is compiled in UNet and VAE."""
    unet, vae = extractor.unet, extractor.vae
    # Features are read by hooks that come and go; one would become part of the compiled graph.
    tapped = [b.resnets[-1] for b in unet.up_blocks[-NUM_TAPS:] if not getattr(b, "attentions", None)]
    for name, module in unet.named_modules():
        if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)) and not any(module is t for t in tapped):
            yield f"unet.{name}", module
    stacks = {"vae.encoder": [*vae.encoder.down_blocks, vae.encoder.mid_block]}
    if extractor.vae_decoder is None:
        stacks["vae.decoder"] = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    else:
        stacks["vae_decoder"] = [extractor.vae_decoder.decoder]
    for name, modules in stacks.items():
        yield from ((f"{name} ({type(module).__name__})", module) for module in modules)


def _segmenter_blocks(segmenter: Segmenter) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what is compiled in a segmenter: as much at once as is recomputed at once."""
    yield from ((f"segmenter.projections.{k}", module) for k, module in enumerate(segmenter.projections))
    aspp = segmenter.head.fuse_layer
    if not aspp.gradient_checkpointing:
        yield "segmenter.head", segmenter.head
    else:
        yield from ((f"segmenter.head.fuse_layer.aspp_modules.{k}", m) for k, m in enumerate(aspp.aspp_modules))


def _explained(name: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` with errors of the compiler as one message; errors of the block itself stay."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            raise CompileError(
                f"--compile: {name} and its like have been compiled for {_VARIANTS} shapes, too many sizes of images "
                "or batches; use fewer, or leave --compile out"
            ) from None
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:500]
            raise CompileError(
                f"--compile: torch.compile cannot compile {name}: {reason}. Leave --compile out, or mend the compiler "
                "(on a CPU: g++ and Python's headers; on a GPU: Triton)"
            ) from error

    return call


class _CompileClock:
    """Says how long was compiled."""

    def __init__(self):
        self.seconds, self.graphs, self._said = 0.0, 0, 0
        self._started = 0.0
        torch._dynamo.on_compile_start(self._start)
        torch._dynamo.on_compile_end(self._end)

    def _start(self, _: Any) -> None:
        self._started = time.monotonic()

    def _end(self, _: Any) -> None:
        self.seconds += time.monotonic() - self._started
        self.graphs += 1

    def report(self) -> None:
        """After a forward pass: one line, if something was compiled in it."""
        if self.graphs > self._said:
            _say(f"--compile: {self.graphs} graphs compiled in {self.seconds:.0f} s so far")
            self._said = self.graphs


@cache
def _compile_clock() -> _CompileClock:
    """The one of this process: PyTorch tells every clock of every graph."""
    return _CompileClock()


def _say(text: str) -> None:
    PartialState().print(text, file=sys.stderr, flush=True)
