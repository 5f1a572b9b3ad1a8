# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
A `python` whose every process is forked from one that has imported the libraries already. That takes the larger part
of the time of a short command. (Nothing is computed and no thread is started before the fork. When the `python` that
was called ends, so does the fork; no signal is passed on.)

    python warm_python.py serve SOCKET                   # until its standard input ends
    python warm_python.py run SOCKET [-m MODULE | -c CODE | SCRIPT] ...
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


LENGTH = struct.Struct("!I")
MODULES = (
    *("accelerate.commands.launch", "datasets", "evaluate", "matplotlib.figure", "transformers"),
    *("diffusers_lsep.commands.evaluate", "diffusers_lsep.commands.probe", "diffusers_lsep.training.trainer"),
)


@contextlib.contextmanager
def warm_environment(
    folder: Path, environment: dict[str, str], scripts: tuple[str, ...] = ()
) -> Iterator[dict[str, str]]:
    """
    Environment variables with which `python` and some scripts beside it are forked.

    Args:
        folder (`Path`): Where they go.
        environment (`dict[str, str]`): The variables that they, and the libraries as they are imported, are to have.
        scripts (`tuple[str, ...]`): Names of scripts in the folder of this Python.
    """
    folder.mkdir()
    place = str(folder / "socket")
    python = Path(sys.executable)
    for name in ("python", *scripts):
        words = [python, "-I", "-S", __file__, "run", place, *([] if name == "python" else [python.parent / name])]
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {" ".join(map(str, words))} "$@"\n')
        script.chmod(0o755)
    environment = {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}
    server = subprocess.Popen([python, __file__, "serve", place], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env=environment)  # fmt: skip
    try:
        assert server.stdout.readline() == b"ready\n"
        yield environment
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def run(place: str, arguments: list[str]) -> int:
    """Hands a command over, with this process's streams, folder and environment, and returns its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    command = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [LENGTH.pack(len(command))], [0, 1, 2])
    connection.sendall(command)
    return LENGTH.unpack(receive(connection, LENGTH.size))[0]


def serve(place: str) -> list[str] | None:
    """Takes commands until nobody is there to send them. Returns in forked processes, with what they have to run."""
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    for module in MODULES:
        __import__(module)
    gc.freeze()  # what is never looked at stays one copy for all
    server = socket.socket(socket.AF_UNIX)
    server.bind(place)
    server.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if os.fork() == 0:  # This one notices the end, and that one accepts.
        main = os.getppid()
        while os.read(0, 1):
            pass
        os.kill(main, signal.SIGTERM)
        os._exit(0)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            message, streams, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
            arguments, folder, environment = json.loads(receive(connection, LENGTH.unpack(message)[0]))
            worker = os.fork()
            if worker == 0:
                connection.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                sys.executable = str(Path(place).parent / "python")
                return arguments
            for stream in streams:
                os.close(stream)
            threading.Thread(target=kill_at_end_of, args=(connection, worker), daemon=True).start()
            code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
            connection.sendall(LENGTH.pack(code if code >= 0 else 128 - code))
            os._exit(0)
        connection.close()


def kill_at_end_of(connection: socket.socket, worker: int):
    """Kills a process when the one that has asked for it is gone."""
    with contextlib.suppress(OSError):
        if not connection.recv(1):
            os.kill(worker, signal.SIGKILL)


def execute(arguments: list[str]):
    """Does what `python ARGUMENTS` does."""
    # What Python and OpenMP have read from the environment as they were loaded.
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if "OMP_NUM_THREADS" in os.environ:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    arguments = [word for i, word in enumerate(arguments) if not (word == "-u" and i == 0)]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def end(function: Callable, *arguments: object):
    """Calls a function and ends this process as Python does, but without the second that it takes to tidy up."""
    code: object = 0
    try:
        function(*arguments)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for those that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        os._exit(run(sys.argv[2], sys.argv[3:]))
    end(execute, serve(sys.argv[2]))
