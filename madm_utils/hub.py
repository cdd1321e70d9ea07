"""Versions of what ran, and upload of a run to the Hugging Face Hub. Only the main process uploads."""

import logging
import os
import platform
import shlex
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from madm_utils import __version__
from madm_utils.cli import UserError
from madm_utils.standalone import PIPELINE_FILES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "pillow")
_OPTIONAL = ("pytorch_lora_weights.safetensors", "segmenter/*", "teacher/*", "unet/*", "sample.png")
_FILES = ("madm_config.json", "run.json", "README.md", *PIPELINE_FILES, *_OPTIONAL)


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide about numbers."""
    return {"madm_utils": __version__, "python": platform.python_version(), **{p: version(p) for p in _PACKAGES}}


def device_name(device: "torch.device") -> str:
    """What a card calls the hardware: the name of the GPU, or the kind of processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def stale_files(names: Sequence[str]) -> list[str]:
    """What an upload deletes from the repository unless it brings it: a teacher of another run would be taken for this
    one's, and a model at the top for what is in the sub-folders `names` ("" is the top itself)."""
    stale = [f"{name}/{file}" if name else file for name in names for file in _OPTIONAL]
    return stale + (["madm_config.json", *PIPELINE_FILES, *_OPTIONAL] if any(names) else [])


class HubUpload:
    """Uploads a run: checkpoints in the background as they are published, the trained model at the end.

    The repository gets the final model at its top (with several modalities one sub-folder each) and, under
    `every_checkpoint`, every checkpoint as `checkpoint-N/`. A checkpoint goes up whole, training state included: it is
    then what its marker says, can be downloaded to go on training on another machine, and may be read while training
    still runs. Logs stay here.

    Uploading never holds up or ends a training that has begun. A checkpoint that failed is tried again with the next
    one and at the end; where uploading is slower than training, checkpoints that `--checkpoints_total_limit` has
    deleted before their turn are skipped. The one being uploaded is read from hard links: rotation does not reach it.

    The thread is a daemon, unlike those of `huggingface_hub.run_as_future`, which the interpreter waits for: a process
    that was told to stop must end at once.

    Args:
        repo_id: of the repository; default: the name of `folder`.
        private: create it as private, and refuse one that is not.
        token: default: the one of `hf auth login`.
        folder: run folder.
        strategy: `end` or `every_checkpoint`.
        names: sub-folder of each model of the run; "" is the run folder itself.
        pauses: seconds to wait before each further try of an upload that training no longer waits behind.
        timeout: seconds without any progress after which a request counts as failed; Xet storage has limits of its
            own.
    """

    def __init__(
        self,
        repo_id: str | None,
        private: bool,
        token: str | None,
        folder: str | Path,
        strategy: str,
        names: Sequence[str] = ("",),
        pauses: Sequence[float] = (5.0, 20.0),
        timeout: float = 300.0,
    ):
        from huggingface_hub import HfApi

        self.folder = Path(folder).resolve()
        self.repo_id = repo_id or self.folder.name
        self.private = private
        self.strategy = strategy
        self.api = HfApi(token=token)
        self._files = [f"{name}/{file}" if name else file for name in names for file in _FILES]
        if any(names):
            self._files.append("README.md")
        self._stale = stale_files(names)
        self._pauses = tuple(pauses)
        self._timeout = timeout
        # Under a temporary name of this run: `checkpointing.remove_unfinished` clears it after a kill.
        self._staging = self.folder / f".upload.tmp-{os.getpid()}"
        self._lock = threading.Lock()
        self._waiting: deque[Path] = deque()
        self._failed: list[Path] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    # --- while training ----------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Create the repository and make sure that it can be written to; call it before training.

        Returns:
            The full id of the repository.

        Raises:
            UserError: wrong name or token, no right to write, no connection, or a public repository where a private
                one was asked for.
        """
        from huggingface_hub import CommitOperationAdd

        self._limit_waiting()
        try:
            self.repo_id = self._try(
                lambda: self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True).repo_id
            )
            # Asks how a file would be uploaded, which needs the right to write; nothing is sent.
            self._try(lambda: self.api.preupload_lfs_files(self.repo_id, [CommitOperationAdd("README.md", b"-")]))
            info = self._try(lambda: self.api.repo_info(self.repo_id, timeout=self._timeout))
        except Exception as error:  # the Hub client raises many unrelated types
            raise UserError(
                f"--push_to_hub: {self.repo_id} on the Hub cannot be written to ({self._reason(error)}). Check "
                "--hub_model_id, the token (`hf auth login`, or --hub_token; it needs the right to write) and the "
                f"network; or train without --push_to_hub and upload afterwards: {self.final_command()}"
            ) from None
        if self.private and not info.private:
            raise UserError(
                f"--hub_private_repo: {self.repo_id} exists and is public; make it private on the Hub, or give "
                "another --hub_model_id"
            )
        return self.repo_id

    def checkpoint(self, path: Path) -> None:
        """Upload a published checkpoint in the background; returns at once and never raises because of the upload."""
        if self.strategy != "every_checkpoint":
            return
        snapshot = self._staging / path.name
        try:
            shutil.copytree(path, snapshot, copy_function=_link)
        except OSError as error:
            logger.warning(f"{path.name} is not uploaded: it cannot be set aside ({error})")
            shutil.rmtree(snapshot, ignore_errors=True)
            return
        with self._lock:
            self._waiting.extend(self._failed)
            self._failed.clear()
            self._waiting.append(snapshot)
            self._skip_deleted()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Give up what is not uploaded yet, without waiting: for a training that stops early. Does nothing after
        `finish`."""
        with self._lock:
            self._closed = True
            left = [path.name for path in sorted(self._staging.glob("*")) if (self.folder / path.name).is_dir()]
        shutil.rmtree(self._staging, ignore_errors=True)
        if left:
            commands = " && ".join(self._checkpoint_command(name) for name in left)
            logger.warning(f"not uploaded yet: {', '.join(left)}; by hand: {commands}")

    def _work(self) -> None:
        """Upload what waits, oldest first, until nothing does."""
        while True:
            with self._lock:
                self._skip_deleted()
                if self._closed or not self._waiting:
                    self._thread = None
                    return
                snapshot = self._waiting.popleft()
            try:
                self._upload_checkpoint(snapshot)
            except Exception as error:
                with self._lock:
                    self._failed.append(snapshot)
                    if self._closed:
                        return
                logger.warning(
                    f"uploading {snapshot.name} to {self.repo_id} failed ({self._reason(error)}); training goes on, "
                    "and it is tried again with the next checkpoint or at the end"
                )

    def _skip_deleted(self) -> None:
        """Forget waiting checkpoints that rotation has deleted: their links would hold the disk space."""
        for snapshot in [path for path in self._waiting if not (self.folder / path.name).exists()]:
            self._waiting.remove(snapshot)
            shutil.rmtree(snapshot, ignore_errors=True)
            logger.warning(f"{snapshot.name} is not uploaded: it was deleted before its turn came")

    def _upload_checkpoint(self, snapshot: Path) -> None:
        self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=snapshot,
            path_in_repo=snapshot.name,
            commit_message=f"Add {snapshot.name}",
        )
        shutil.rmtree(snapshot, ignore_errors=True)

    # --- at the end --------------------------------------------------------------------------------------------------

    def finish(self) -> str:
        """Wait for the background, then upload the final model and the checkpoints that failed.

        Returns:
            The address of the repository.

        Raises:
            UserError: something could not be uploaded; the message holds the commands that finish it by hand.
        """
        thread = self._thread
        if thread is not None:
            logger.info("waiting for the upload of checkpoints")
            thread.join()
        by_hand = {self.final_command(): self._upload_final}
        for snapshot in [*self._failed, *self._waiting]:
            if (self.folder / snapshot.name).exists():
                command = self._checkpoint_command(snapshot.name)
                by_hand[command] = lambda snapshot=snapshot: self._upload_checkpoint(snapshot)
        try:
            for command, upload in list(by_hand.items()):
                self._try(upload)
                del by_hand[command]
        except Exception as error:  # whatever the network and the Hub raise, the trained model stays
            raise UserError(
                f"the model is complete in {self.folder}, but uploading to {self.repo_id} failed "
                f"({self._reason(error)}). Log in (`hf auth login`) and finish with: {' && '.join(by_hand)}"
            ) from None
        finally:
            self._closed = True
            shutil.rmtree(self._staging, ignore_errors=True)
        return f"{self.api.endpoint}/{self.repo_id}"

    def _upload_final(self) -> None:
        self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=self.folder,
            allow_patterns=self._files,
            delete_patterns=self._stale,
            commit_message="End of training",
        )

    def final_command(self) -> str:
        """The command that uploads the final model by hand."""
        private = ["--private"] if self.private else []
        include = [word for pattern in self._files for word in ("--include", pattern)]
        delete = [word for pattern in self._stale for word in ("--delete", pattern)]
        return shlex.join(["hf", "upload", self.repo_id, str(self.folder), ".", *include, *delete, *private])

    def _checkpoint_command(self, name: str) -> str:
        return shlex.join(["hf", "upload", self.repo_id, str(self.folder / name), name])

    # --- requests ----------------------------------------------------------------------------------------------------

    def _try(self, action: Callable[[], Result]) -> Result:
        """The result of `action`, tried again after a pause when the reason of a failure may pass."""
        for pause in self._pauses:
            try:
                return action()
            except Exception as error:
                if not may_pass(error):
                    raise
                logger.warning(f"the Hub: {self._reason(error)}; trying again in {pause:g} s")
                time.sleep(pause)
        return action()

    def _reason(self, error: Exception) -> str:
        """The error in one line, without the token: a header that cannot be sent is quoted by the client."""
        text = " ".join(str(error).split()) or type(error).__name__
        return (text.replace(self.api.token.strip(), "***") if self.api.token else text)[:300]

    def _limit_waiting(self) -> None:
        """Let silent connections fail: by default the Hub client waits for them for ever."""
        import httpx2
        from huggingface_hub import get_session, set_client_factory

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it reports every request
        hooks = get_session().event_hooks
        set_client_factory(
            lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=httpx2.Timeout(self._timeout))
        )


def _link(source: str, target: str) -> None:
    """Make `target` the same file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: not after "forbidden", "not found" or a bad name."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 429)
    return not isinstance(error, (OfflineModeIsEnabled, ValueError))
