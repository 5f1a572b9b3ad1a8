# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Kills commands at every change that they make on disk, runs them again, and compares what comes out.

    python tests/faults/run.py                        # a few points of each command
    python tests/faults/run.py --all                  # all points
    python tests/faults/run.py sample convert --all   # of these commands
    python tests/faults/run.py train --moments 20     # at random moments
    python tests/faults/run.py --disks 10             # on disks that are too small, ten sizes each

A point is an event of `events.py`: the process is killed just before that system call. Of several processes it is the
first one, and the others are killed with it, as when a machine goes down. Then the same command line runs again. It
has to finish ("refused" if not) with the files of a run that was not interrupted ("lost" if not) and no others ("left
over"). Where all of these are there already when the process is killed, a command may refuse to write over them.

A small disk is a tmpfs where this process may mount one, else a limit on the size of files. A command that comes to
its end has to stop with one line and nothing half-written, and to finish once there is room.
"""

import argparse
import contextlib
import faulthandler
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="faults-cache-")  # `datasets` keeps data there

import torch
from faults.commands import Command, make_commands, make_inputs, read_files
from faults.events import FileEvents

from diffusers_lsep.command_line import run_script


TIMEOUT = 300  # seconds
UMASK = 0o027  # not what anybody sets by hand, so that files with modes of their own are seen


class Runner:
    """
    Runs one command, each time in the same new folder and in processes forked from this one, where everything is
    imported already.

    Args:
        command ([`Command`]): The command.
        folder (`Path`): Where.
    """

    def __init__(self, command: Command, folder: Path):
        self.command, self.folder, self.log = command, folder / "work", folder / "log"
        self.before = folder / "before"
        self.num_stopped = 0  # by a full disk
        self.before.mkdir(parents=True)
        fork_and_wait(lambda: command.prepare(self.before), self.log)

    def reset(self):
        if os.path.ismount(self.folder):
            subprocess.run(["umount", self.folder], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.fill()

    def fill(self):
        shutil.copytree(self.before, self.folder, dirs_exist_ok=True)
        (self.folder / "tmp").mkdir()

    def start(self, kill_at: int | None = None, events: Path | None = None, limit: int | None = None) -> list[int]:
        """Starts the command's processes; the first one is to be killed, or no file to grow beyond a limit."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log.unlink(missing_ok=True)
        pids = []
        for rank in range(self.command.processes):

            def run(rank=rank):
                os.environ |= self.command.environment
                if self.command.processes > 1:
                    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                    values = (rank, rank, self.command.processes, self.command.processes, "127.0.0.1", port)
                    os.environ |= {name: str(value) for name, value in zip(names, values)}
                os.chdir(self.folder)
                os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder / "tmp")
                if rank == 0:
                    FileEvents(self.folder, kill_at, events)
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                run_script(lambda: self.command.main(list(map(str, self.command.arguments))), "command")

            pids.append(fork(run, self.log))
        return pids

    def wait(self, pids: list[int], timeout: float = TIMEOUT) -> int:
        """The exit code, negative if a signal ended it; kills all once one is killed or the time is over."""
        deadline, codes = time.monotonic() + timeout, {}
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            if any(codes.values()) or time.monotonic() > deadline:
                for pid in pids:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return next((code for code in codes.values() if code), 0)

    def count(self) -> int:
        """Runs it to its end, keeps what comes out, and returns the number of events."""
        self.reset()
        events, begin = self.folder.parent / "events", time.perf_counter()
        code = self.wait(self.start(events=events))
        if code:
            raise RuntimeError(f"the command ends with {code}:\n{self.log.read_text()[-4000:]}")
        self.seconds = time.perf_counter() - begin
        self.expected = read_files(self.folder)
        before = read_files(self.before)
        for name, (mode, _) in self.expected.items():
            if name not in before and mode & ~0o111 != 0o777 & ~UMASK & ~0o111:
                raise RuntimeError(f"{name} has mode {mode:o} where the umask is {UMASK:o}")
        self.events = events.read_text().splitlines()
        return len(self.events)

    def try_point(self, kill_at: int | None = None, after: float | None = None) -> tuple[str, str]:
        """Kills it at an event, or after so many seconds, runs it again, and says how that ends."""
        self.reset()
        code = self.wait(self.start(kill_at), TIMEOUT if after is None else after)
        if code not in (0, -signal.SIGKILL):
            return "refused", f"it is not killed but ends with {code}: {self.last_line()}"
        broken = self.command.always(self.folder)
        if broken:
            return "lost", f"after the kill {broken}"
        is_complete = read_files(self.folder) == self.expected
        return self.run_again(is_complete)

    def try_disk(self, share: float) -> tuple[str, str]:
        """Runs it where there is room for a share of what it writes, and again with more, and says how that ends."""
        self.reset()
        limit, sizes = None, [len(content) for _, content in self.expected.values()]
        if can_mount():
            before = [path.stat().st_size for path in self.before.rglob("*") if path.is_file()]
            before, written = (sum(-(-size // 4096) for size in some) for some in (before, sizes))  # in pages
            options = f"size={4096 * (before + max(1, int(1.5 * share * written)))}"
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder], check=True)
            self.fill()
        else:
            limit = int(share * max(sizes))
        code = self.wait(self.start(limit=limit))
        self.num_stopped += code != 0
        lines = self.log.read_text().splitlines()
        if code not in (0, 2) or any(line.startswith("Traceback") for line in lines):
            return "refused", f"it ends with {code}: {self.last_line()}"
        halves = [path.name for path in self.folder.rglob(".*") if path.suffix in (".partial", ".tmp", ".old")]
        if halves:
            return "left over", f"after {self.last_line()!r}: {', '.join(halves)}"
        if os.path.ismount(self.folder):
            subprocess.run(["mount", "-o", "remount,size=1g", self.folder], check=True)
        return self.run_again(read_files(self.folder) == self.expected)

    def run_again(self, is_complete: bool) -> tuple[str, str]:
        code = self.wait(self.start())
        found = read_files(self.folder)
        if code and not (is_complete and code == 2 and found == self.expected):
            return "refused", f"the next run ends with {code}: {self.last_line()}"
        different = [name for name, value in self.expected.items() if found.get(name) != value]
        if different:
            return "lost", f"others than without a kill: {', '.join(different)}"
        more = sorted(found.keys() - self.expected.keys())
        if more:
            return "left over", ", ".join(more)
        return ("complete" if code else "finished"), ""

    def last_line(self) -> str:
        return (self.log.read_text().splitlines() or [""])[-1]


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode == 0:
            subprocess.run(["umount", folder], check=True)
            return True
    return False


def fork(run, log: Path) -> int:
    """Calls a function in a process of its own, with its output in a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        faulthandler.enable()
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_and_wait(run, log: Path):
    _, status = os.waitpid(fork(run, log), 0)
    if status:
        raise RuntimeError(log.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help="all if none is given")
    parser.add_argument("--all", action="store_true", help="try every point")
    parser.add_argument("--points", type=int, default=6, help="try so many of each command, evenly spaced")
    parser.add_argument("--moments", type=int, default=0, help="in place of these, so many random moments")
    parser.add_argument("--disks", type=int, default=0, help="in place of these, so many disks that are too small")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--events", action="store_true", help="list the events of the commands, and kill nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that has threads cannot be forked
    moments = random.Random(args.seed)
    os.umask(UMASK)

    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        make = Path(root) / "inputs"
        fork_and_wait(lambda: make_inputs(make), Path(root) / "log")
        commands = make_commands(make)
        unknown = sorted(set(args.commands) - commands.keys())
        if unknown:
            parser.error(f"there is no command {unknown[0]}, but {', '.join(commands)}")
        total = dict.fromkeys(("finished", "complete", "lost", "refused", "left over"), 0)
        stopped = 0
        for name in args.commands or commands:
            runner = Runner(commands[name], Path(root) / name)
            num_events, begin = runner.count(), time.perf_counter()
            if args.events:
                print(f"{name}:", *runner.events, sep="\n    ")
                continue
            if args.moments:
                times = [moments.uniform(0, runner.seconds) for _ in range(args.moments)]
                points = [(f"{value:.3f} s", {"after": value}) for value in times]
            elif args.disks:
                shares = [(index + 0.5) / args.disks for index in range(args.disks)]
                points = [(f"a disk for {1.5 * share:.0%} of the result", {"share": share}) for share in shares]
            else:
                step = 1 if args.all else max(1, num_events // args.points)
                points = [(runner.events[i], {"kill_at": i}) for i in range(step - 1, num_events, step)]
            outcomes = dict.fromkeys(total, 0)
            for where, point in points:
                outcome, what = (runner.try_disk if args.disks else runner.try_point)(**point)
                outcomes[outcome] += 1
                total[outcome] += 1
                if what:
                    print(f"  {name}, {where}: {outcome}: {what}", flush=True)
            seconds = time.perf_counter() - begin
            found = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            of = f"disks, {runner.num_stopped} too small," if args.disks else f"of {num_events} points"
            print(f"{name}: {len(points)} {of} in {seconds:.0f} s: {found}", flush=True)
            stopped += runner.num_stopped
            runner.reset()
            shutil.rmtree(Path(root) / name)
        bad = {name: total[name] for name in ("lost", "refused", "left over")}
        found = ", ".join(f"{count} {outcome}" for outcome, count in bad.items())
        kind = f"disks, {stopped} too small" if args.disks else "kill points"
        complete = f"{total['complete']} of them after the last file was written"
        print(f"{sum(total.values())} {kind} ({complete}): {found}")
        return int(any(bad.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(os.environ["HF_HOME"])
