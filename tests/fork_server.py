"""Starts of the scripts without their ten seconds of imports: one process imports them once, then forks.

Every child runs the script itself, as `__main__`, with its own flags, environment, output and process group.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


class ForkServer:
    """Client side. `start` has the form of `benchmarks.soak_resume.start_script`."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: dict):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, setup, flags: list[str], log: Path) -> list["Forked"]:
        return self.group("train_madm.py", setup.processes, flags, str(log), str(log))

    def group(self, script: str, processes: int, flags: list[str], out: str, err: str) -> list["Forked"]:
        """Start the processes of one run, as a launcher does."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        started = []
        for rank in range(processes):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            environment = {key: str(value) for key, value in environment.items()} if processes > 1 else {}
            started.append(self.fork(script, flags, out, err, environment))
        return started

    def fork(self, script: str, flags: list[str], out: str, err: str, environment: dict[str, str]) -> "Forked":
        """Start a script of the repository; its output is appended to the files `out` and `err`, which exist."""
        request = {"script": script, "flags": flags, "out": out, "err": err, "environment": environment}
        return Forked(self, self.ask(request))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


class Forked:
    """One child of the server."""

    def __init__(self, server: ForkServer, pid: int):
        self.server, self.pid, self.code = server, pid, None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.code is None:
            self.code = self.server.ask({"wait": self.pid, "options": options})
        return self.code

    def wait(self) -> int:
        return self.poll(options=0)


@functools.cache
def shared_server() -> ForkServer:
    """One per test process."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def run_script(script: str, *flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script of the repository to its end, as `subprocess.run` with captured text does."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        flags = [str(flag) for flag in flags]
        started = shared_server().group(script, processes, flags, str(out), str(err))
        code = max(abs(process.wait()) for process in started)
        return subprocess.CompletedProcess([script, *flags], code, out.read_text(), err.read_text())


def serve() -> list[str]:
    """Answer requests until there are no more; in a forked child, return its script and flags."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], request["options"])
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                for descriptor, name in ((1, request["out"]), (2, request["err"])):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.environ.update(request["environment"])
                return [request["script"], *request["flags"]]
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from madm_utils.cli import quiet_libraries

    quiet_libraries()
    import datasets  # noqa: F401 what the scripts import late is imported before forking as well
    import matplotlib.figure  # noqa: F401
    import tensorboard  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import convert_original_madm  # noqa: F401
    import eval_madm  # noqa: F401
    import madm_utils.pipeline_madm  # noqa: F401
    import predict_madm  # noqa: F401
    import prepare_datasets  # noqa: F401
    import train_madm  # noqa: F401

    gc.collect()
    gc.freeze()  # children need not look through, and copy, what they share
    sys.argv = serve()
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
