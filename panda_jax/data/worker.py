"""The process that tokenises: `python -m panda_jax.data.worker`, fed with pickles on standard input.

It reads a Job, then Blocks; each Block becomes a shard on the disk, and the reply on standard output is the shard's
Header, or the exception. It ends when its input ends. So a parent that is killed leaves no orphan, and the shard that
was under way is still finished. It imports neither jax nor the parent's main module, as a spawned
multiprocessing worker would.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import traceback
from typing import BinaryIO

# Pickles name classes by module, and this module is __main__ here: so Job lives elsewhere.
from panda_jax.data.build import Job, build_shard
from panda_jax.text.tokenizer import Tokenizer


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until their end; whatever a block raises becomes the reply to it."""
    job: Job | None = None
    tokenizer: Tokenizer | None = None
    while True:
        try:
            request = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):
            return  # the parent closed the pipe, or died while it wrote
        if isinstance(request, Job):
            job, tokenizer = request, Tokenizer(request.model_bytes, "the tokenizer")
            continue
        assert job is not None and tokenizer is not None, "a Job comes before the first Block"
        try:
            reply = build_shard(request, job, tokenizer)
        except Exception as error:
            reply = _picklable(error)
        pickle.dump(reply, replies)
        replies.flush()


def _picklable(error: Exception) -> Exception:
    """Return the exception with its traceback as a note, or a RuntimeError that tells the same."""
    error.add_note("in a tokenising process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Serve the parent until it closes the pipe or dies."""
    # A block makes some hundred thousand small objects without cycles; to look for cycles took 12 % of the time.
    gc.disable()
    try:
        # Whatever prints must not disturb the replies: standard output becomes standard error.
        with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as replies:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            serve(sys.stdin.buffer, replies)
    except BrokenPipeError:
        pass  # the parent died; its successor finds the shard that was just written


if __name__ == "__main__":
    main()
