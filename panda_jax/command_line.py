"""What every door shares: its arguments, its `--help`, and the exit status of whatever goes wrong."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from panda_jax import settings
from panda_jax.config import Config
from panda_jax.errors import InputError

# What a full, read-only or forbidden disk answers: the user can mend it, so it is bad input and no fault of ours.
DISK_ERRORS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions or choose another folder",
    errno.EPERM: "change its permissions or choose another folder",
}

OUT_OF_MEMORY = (
    "train with a smaller train.micro_batch_size, compute.remat=full or more devices (`train --dry-run` tells what "
    "fits), evaluate and generate on more devices"
)


class Parser(argparse.ArgumentParser):
    """Arguments of a door: a mistake in them is an InputError, and options may stand among the overrides."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class RunParser(Parser):
    """Arguments of a door that works on a run: `--config C [a.b=c …]`; `--help` lists every setting as well."""

    def __init__(self, door: str, purpose: str) -> None:
        super().__init__(prog=f"python -m panda_jax.{door}", description=purpose, allow_abbrev=False)
        self.add_argument("--config", required=True, metavar="C", help="the run's YAML file")
        self.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the file")

    def format_help(self) -> str:
        return f"{super().format_help()}\nsettings, in the YAML file or as a.b=c:\n\n{settings.help_text()}"

    def parse(self, arguments: Sequence[str]) -> tuple[Config, argparse.Namespace]:
        """Return the resolved run and all arguments; raises InputError for a mistake in either."""
        parsed = self.parse_intermixed_args(arguments)
        return settings.load(parsed.config, parsed.overrides), parsed


def run_door(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line and exit: 0 done, 2 bad input in one line, 130 interrupted, 1 our fault."""
    sys.exit(exit_status(main, sys.argv[1:]))


class ChildFailed(Exception):
    """A door that this process started has failed with `status` and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def start_module(module: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start `python -m module` of this interpreter and of this panda_jax, installed or not; options as for Popen."""
    search_path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    # -P: no folder of the user's may shadow a module, wherever the door was started.
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], env=environment, **options)


def run_module(module: str, *arguments: str) -> None:
    """Run `python -m module` to its end; raises ChildFailed unless it exits with 0.

    Its standard input is a pipe that closes when this process ends, however that happens.
    """
    child = start_module(module, *arguments, stdin=subprocess.PIPE)
    try:
        status = child.wait()
    except BaseException:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    finally:
        assert child.stdin is not None
        child.stdin.close()
    if status:
        raise ChildFailed(status if status > 0 else 128 - status)


def exit_status(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """Return the exit status of `main(arguments)`, having told standard error what went wrong."""
    try:
        status = main(arguments) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ChildFailed as failure:
        return failure.status
    except BrokenPipeError:
        # The reader of our output left (`… | head`): nobody is there to be told, and flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            traceback.print_exc()
            return 1
        print(f"error: {reason}", file=sys.stderr)
        return 2


def _reason(error: BaseException) -> str | None:
    """Return one line for a failure that the user can mend, None for one that they cannot."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    for cause in _causes(error):
        # By its name: not every door imports jax.
        if type(cause).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(cause):
            return f"the memory of a device is full ({str(cause).splitlines()[0][:200]}); {OUT_OF_MEMORY}"
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            place = f"{cause.filename}: " if cause.filename else ""
            return f"{place}{os.strerror(cause.errno)}; {DISK_ERRORS[cause.errno]}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
