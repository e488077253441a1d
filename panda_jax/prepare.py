"""Build the token cache of a run: `python -m panda_jax.prepare --config C [a.b=c …] [--preview N]`.

Tokenises what is not in the cache yet on every core, then prints the data report. Started again after an interruption,
it goes on where it stopped. `--preview N` also prints N decoded records per source with the trained part marked.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from panda_jax.command_line import RunParser, run_door
from panda_jax.data.cache import TokenCache, list_caches, preview
from panda_jax.data.preparation import prepare
from panda_jax.data.progress import Display
from panda_jax.data.report import report
from panda_jax.data.vocabulary import load_or_train_tokenizer
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer


def main(arguments: list[str]) -> None:
    """Prepare the data of the run that `arguments` name; raises InputError for whatever is wrong with them."""
    parser = RunParser("prepare", "Tokenise the run's data into the cache and report on them.")
    parser.add_argument("--preview", type=int, default=0, metavar="N", help="print N decoded windows of every source")
    parser.add_argument("--for-train", action="store_true", help="no report; end when standard input does")
    config, options = parser.parse(arguments)
    if options.preview < 0:
        raise InputError(f"--preview: {options.preview}, expected 0 or more")
    if options.for_train:
        threading.Thread(target=_leave_with_the_parent, daemon=True).start()

    tokenizer = load_or_train_tokenizer(config)
    with Display() as display:
        caches = prepare(config, tokenizer, display)
    list_caches(config, caches)
    if options.for_train:
        return

    print(report(caches, config))
    for cache in caches:
        print(f"{cache.source}: {cache.folder}")
    for cache in caches:
        _show_samples(cache, tokenizer, options.preview)


def _leave_with_the_parent() -> None:
    """Interrupt this process when the train door that started it dies, even by kill -9."""
    # Not sys.stdin: a thread that holds its lock breaks the interpreter's shutdown.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def _show_samples(cache: TokenCache, tokenizer: Tokenizer, num_samples: int) -> None:
    """Print windows at equal distances through the source."""
    num_samples = min(num_samples, len(cache))
    for sample in range(num_samples):
        print(f"\n{preview(cache, tokenizer, sample * len(cache) // num_samples, sys.stdout.isatty())}")


if __name__ == "__main__":
    run_door(main)
