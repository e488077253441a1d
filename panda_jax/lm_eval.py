"""lm-evaluation-harness on our checkpoints.

    python -m panda_jax.lm_eval --model panda_jax --model_args checkpoint=runs/demo,dtype=float32 --tasks logiqa2

The harness looks for models in its own list only, so its command line runs here, once ours stands in that list; all
its options are as its documentation says. Needs the [lm-eval] extra.
"""

from __future__ import annotations

import sys
from importlib import import_module

from panda_jax.command_line import run_door
from panda_jax.harness import model_class


def main(arguments: list[str]) -> int:
    """Run the harness's own command line with `arguments`; returns the exit status."""
    model = model_class()
    import_module("lm_eval.models")  # fills the registry, which keeps what stands in it already
    import_module("lm_eval.api.registry").model_registry.register("panda_jax", target=model)
    sys.argv[1:] = arguments
    import_module("lm_eval.__main__").cli_evaluate()
    return 0


if __name__ == "__main__":
    run_door(main)
