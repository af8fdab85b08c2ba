"""Runs `harken` and Python files for the documentation's code blocks, and for recipes, in forks of one warm process.

A page calls `harken` some ten times, a recipe a hundred, and importing torch, DeepSpeed and Lhotse costs seconds each
time. The programs `harken` and `python` that the blocks find on their PATH send their arguments, folder, environment
and streams here.

Run as `python docs_server.py SOCKET [--as-configured]`; it prints `ready` when it listens. A documented training is cut
to four steps; --as-configured leaves trainings as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# what most blocks import; a module that is not listed is imported by the block that needs it
WARM = (
    "deepspeed",
    "harken.apps.decode",
    "harken.apps.doctor",
    "harken.apps.train",
    "harken.encoders.transformer",
    "harken.evaluate.tables",
    "harken.objectives.ctc",
    "harken.objectives.hubert",
    "harken.objectives.saved",
    "harken.optim.optimizers.adamw",
    "harken.train.run",
    "harken.units.clusterer",
    "harken.units.label",
    "harken.interop.fairseq",
    "kaldi_native_fbank",
    "lhotse.dataset",
    "tensorboard.compat.tensorflow_stub",
    "torch.utils.tensorboard",
)
# a block may say how long a real run takes; here a run takes four steps
SHORT = (
    "train.steps=4",
    "train.valid_every_steps=4",
    "checkpoint.every_steps=2",
    "log.every_steps=2",
    "log.peak_tflops=1",
    "data.max_seconds=12",
    "batch.max_seconds=13",
    "batch.seconds_per_step=13",
)
CLIENT = """#!{python} -IS
import json, os, socket, sys
arguments = {prefix} + sys.argv[1:]
if {prefix} or arguments[:2] == ["-m", "harken.apps.main"] or arguments and arguments[0].endswith(".py"):
    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
    request = dict(arguments=arguments, folder=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or b"1"))
os.execv({python!r}, [{python!r}, *arguments])
"""


def write_clients(folder: Path, address: str) -> None:
    """Write the programs `harken` and `python`, which ask the server at `address`, into a folder."""
    for name, prefix in (("harken", ["-m", "harken.apps.main"]), ("python", [])):
        path = folder / name
        path.write_text(CLIENT.format(python=sys.executable, prefix=prefix, address=address))
        path.chmod(0o755)


def serve(address: str, short: tuple[str, ...]) -> None:
    """Answer requests until killed; every request runs in a fork of its own. short: overrides of every training."""
    # one core, and another for each test process: a program that sees one core starts no processes of its own
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy every page
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            end(answer, connection, short)
        connection.close()
        while children_ended():
            pass


def children_ended() -> bool:
    """Whether a child that had ended was removed from the process table."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def answer(connection: socket.socket, short: tuple[str, ...]) -> None:
    """Run one request in a fork and send back its exit status."""
    message, streams, _, _ = socket.recv_fds(connection, 65536, 3)
    while more := connection.recv(65536):
        message += more
    request = json.loads(message)
    runner = os.fork()
    if runner == 0:
        connection.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        end(run, request["arguments"], request["folder"], request["environment"], short)
    for stream in streams:
        os.close(stream)
    status = os.waitstatus_to_exitcode(os.waitpid(runner, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # the block was stopped
        connection.sendall(str(status if status >= 0 else 128 - status).encode())


def end(work: Callable[..., None], *arguments: Any) -> NoReturn:
    """Do the work of a fork and leave as Python does, but for taking hundreds of modules apart: that takes a second."""
    status: Any = 0
    try:
        work(*arguments)
    except SystemExit as asked:
        status = asked.code or 0
    except BaseException:  # noqa: BLE001  this is where the interpreter would print it
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def run(arguments: list[str], folder: str, environment: dict[str, str], short: tuple[str, ...]) -> None:
    """Run `python ARGUMENTS` as a fresh interpreter would, as far as blocks can tell."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        from harken.apps.main import main

        sys.exit(main([*arguments[2:], *(short if arguments[2] == "train" else ())]))
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], () if sys.argv[2:] == ["--as-configured"] else SHORT)
