"""kill -9 of a conversion: at its output lies what was there, or the whole new model.

`pytest tests/test_conversion_killed.py --kill-points 20` kills at twenty random moments; the unit suite does one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import foreign
import torch

from convert import meta
from panda_jax.weights import open_weights

REPOSITORY = Path(__file__).resolve().parent.parent
# 8 layers of (2 * 512 + 2 * 256 + 3 * 1408) * 512 float16 numbers: 47 MB. int(8 / 3 * 512) = 1365 -> 1408.
SIZE = foreign.Size(512, 8, 4, 1408, {"multiple_of": 128}, num_layers=8)


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "convert.meta", "import", "--input", source, "--output", output, "--overwrite"]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def whole(folder: Path) -> foreign.State:
    """Open a weights folder with every tensor, which checks its hashes; return what another reader sees."""
    for tensor in open_weights(folder).tensors.values():
        tensor.read()
    return foreign.loaded(folder)


def test_killed_at_a_random_moment(tmp_path, request):
    state = foreign.random_state(SIZE, torch.float16)
    source = foreign.write_meta(tmp_path / "meta", SIZE, state, 2)
    small = foreign.random_state(foreign.GQA, torch.float16)
    other = foreign.write_meta(tmp_path / "other", foreign.GQA, small)
    new, old = foreign.our_bits(state), foreign.our_bits(small)
    output = tmp_path / "place" / "ours"
    for point in range(request.config.getoption("--kill-points")):
        has_former = point % 2 == 0
        if has_former:
            foreign.done(meta, "import", "--input", other, "--output", output, "--no-verify")
        process = start(source, output)
        while process.poll() is None and not list(tmp_path.glob("place/ours.unfinished-*")):
            time.sleep(0.002)
        # The copy takes a tenth of a second, the proof one or two.
        time.sleep(random.Random(point).choice([0.15, 3]) * random.random())
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0 and foreign.report(output)["passed"], said.decode()
        if has_former or output.exists():
            found = foreign.bits(whole(output))
            assert found in ([old, new] if has_former else [new])
        for place in output.parent.iterdir():
            assert place == output or place.name.startswith("ours.unfinished-")
        foreign.done(meta, "import", "--input", source, "--output", output, "--overwrite", "--no-verify")
        assert foreign.bits(whole(output)) == new
        assert [place.name for place in output.parent.iterdir()] == ["ours"]
        shutil.rmtree(output)
