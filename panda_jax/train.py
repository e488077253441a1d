"""Train a model: `python -m panda_jax.train --config C [a.b=c …] [--dry-run] [--resume auto|never|STEP]`.

Started again with the same config it goes on from the newest good checkpoint. `--dry-run` compiles the step on as many
simulated devices as the mesh has and prints the bytes each would need, without data and without allocating the model.
"""

from __future__ import annotations

from panda_jax.command_line import RunParser, run_door
from panda_jax.training.dry_run import dry_run, parse_memory, simulate_devices
from panda_jax.training.loop import train


def main(arguments: list[str]) -> int:
    """Train, or try out, the run that `arguments` name; return the exit status."""
    parser = RunParser("train", "Train a model on the run's data, from its newest checkpoint if there is one.")
    parser.add_argument(
        "--dry-run", action="store_true", help="compile the step and print bytes per device; train nothing"
    )
    parser.add_argument("--memory", default="80GB", metavar="SIZE", help="dry run: memory of a device (default 80GB)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|STEP",
        help="go on from the newest checkpoint, none, or this one",
    )
    config, options = parser.parse(arguments)
    if not options.dry_run:
        train(config, options.resume)
        return 0
    memory_bytes = parse_memory(options.memory)
    simulate_devices(config)
    table, fits = dry_run(config, memory_bytes)
    print(table)
    return 0 if fits else 2


if __name__ == "__main__":
    run_door(main)
