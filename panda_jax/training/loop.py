"""The training run, from processes to the last checkpoint, in the order in which things happen."""

from __future__ import annotations

import collections
import dataclasses
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from panda_jax import command_line, settings, sharding
from panda_jax.config import Config
from panda_jax.data import cache, packing
from panda_jax.data.cache import TokenCache
from panda_jax.data.loader import Loader
from panda_jax.data.packing import Plan
from panda_jax.errors import InputError
from panda_jax.model.attention import choose_backend
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training import metrics, run_record, start
from panda_jax.training import step as steps
from panda_jax.training.scoring import TaskScores, exams_of

# How many steps may be dispatched before the oldest is looked at: enough to keep the devices busy, few enough that
# batches do not pile up on them and that a non-finite gradient is reported at once.
MAX_STEPS_IN_FLIGHT = 2


def train(config: Config, resume: str) -> Path:
    """Run `config` to its last step, or to the first SIGTERM or Ctrl-C, and return the run folder.

    `resume` is `auto` (newest good checkpoint, or the start when there is none), `never`, or a step number.
    Raises InputError for whatever the user can mend.
    """
    sharding.configure_jax(config.compute)
    sharding.start_processes(config.mesh)
    folder = Path(config.log.runs_dir) / config.name
    with start.taken(folder):
        run_to_the_end(config, resume, folder)
    return folder


def run_to_the_end(config: Config, resume: str, folder: Path) -> None:
    """Do what `train` does, once the processes have found each other."""
    mesh = sharding.make_mesh(config.mesh)
    say, kept = sharding.say, folder / "checkpoints"

    # ---- whatever can be found wrong before hours go into the data ---------------------------------------------------
    sharding.by_first("starting point found", lambda: start.check_named(config, kept, resume))
    steps.build(config, mesh, run_steps=1)
    choose_backend(config.model, config.compute, config.data.seq_len)
    exams = exams_of(config)

    # ---- data: the first process has it prepared, then all open it --------------------------------------------------
    sharding.by_first("data prepared", lambda: prepare_data(config))
    tokenizer = Tokenizer.load(config.tokenizer.path)
    caches = cache.open_listed(config)
    plan = packing.plan(config, caches)
    run = run_record.describe(config, tokenizer, caches, plan)

    # ---- model, optimizer and the step over them -------------------------------------------------------------------
    step = steps.build(config, mesh, plan.num_steps)
    with jax.set_mesh(mesh):
        state, first_step, run = start.initial_state(config, step, kept, resume, run, tokenizer, say)
        if first_step > plan.num_steps:
            raise InputError(
                f"{kept / str(first_step)}: this run ends before that checkpoint, after {plan.num_steps} steps "
                f"(train.max_steps, train.epochs); raise them, or resume an earlier step with --resume"
            )
        saver = checkpoints.Checkpointer(kept, config.checkpoint.keep, config.checkpoint.steps)

        def begin() -> None:
            checkpoints.delete_unfinished(kept)
            if first_step < plan.num_steps:
                saver.check_room(state)
            # Nothing refuses the run any more, so its folder may change.
            start.set_aside(kept, first_step, say)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(settings.to_yaml(config), encoding="utf-8")
            say(metrics.start_card(config, step, plan, caches, tokenizer, first_step))

        sharding.by_first("run folder made", begin)
        recorder = opened_recorder(config, folder, first_step)
        held_out_loss = HeldOut(config, step, plan, caches, recorder)
        task_scores = TaskScores(config, exams, mesh, tokenizer, recorder)
        with metrics.CompileReport(recorder.say):
            train_step = step.compile()
        if first_step == 0:
            held_out_loss.measure(state, 0)
            task_scores.measure(state["parameters"], 0)

        # ---- steps -------------------------------------------------------------------------------------------------
        rows = sharding.local_rows(mesh, config.train.global_batch_size)
        watch = Watch(config, plan, caches, recorder)
        clock = metrics.Clock()
        clock.restart(first_step)
        finished = saved = first_step
        failure: NonFinite | None = None
        with StopRequest() as stop:
            try:
                with Loader(plan, caches, config, first_step, rows) as loader:
                    batches = iter(loader)
                    while finished < plan.num_steps and not stop.requested(finished):
                        local = clock.fetch(lambda: next(batches), watch.devices_idle)
                        batch = sharding.to_global(local, rows, mesh, config.train.global_batch_size)
                        state, result = train_step(state, batch)
                        finished += 1
                        watch.add(finished, result)
                        is_last = finished == plan.num_steps

                        if is_last or finished % config.train.log_every_steps == 0:
                            watch.settle()
                            line = measurements(config, mesh, plan, clock, finished, result)
                            recorder.record(line)
                            recorder.show(line, plan.num_steps)
                            clock.restart(finished)
                        # Who asks a run to leave may not wait for a measurement.
                        if is_last or (is_due(config.train.eval_every_steps, finished) and not stop.is_pending):
                            watch.settle()
                            held_out_loss.measure(state, finished)
                            clock.restart(finished)
                        if is_last or (is_due(config.eval.every_steps, finished) and not stop.is_pending):
                            watch.settle()
                            task_scores.measure(state["parameters"], finished)
                            clock.restart(finished)
                        if is_due(config.checkpoint.every_steps, finished) or finished in config.checkpoint.steps:
                            watch.settle()
                            saver.save(finished, state, run | {"step": finished}, tokenizer.model_bytes)
                            saved = finished
                            clock.restart(finished)
                watch.settle()
            except NonFinite as error:
                failure, finished = error, error.step - 1
            if finished > saved:
                saver.save(finished, state, run | {"step": finished}, tokenizer.model_bytes)
            saver.wait()
        recorder.close()
        if failure is not None:
            raise InputError(str(failure))

        # ---- the end -----------------------------------------------------------------------------------------------
        sharding.by_first(
            "run finished", lambda: say(closing_line(folder, finished, plan.num_steps, metrics.plot_loss(folder)))
        )


def prepare_data(config: Config) -> None:
    """Run the prepare door on this config, in a process without jax; raises ChildFailed after it has said why.

    It costs a second, and keeps a process full of threads and device memory out of tokenising.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(settings.to_yaml(config))
        file.flush()
        command_line.run_module("panda_jax.prepare", "--config", file.name, "--for-train")


def is_due(every_steps: int | None, finished: int) -> bool:
    """Tell whether something done every so many steps is due after `finished` steps."""
    return every_steps is not None and finished % every_steps == 0


def measurements(
    config: Config, mesh: jax.sharding.Mesh, plan: Plan, clock: metrics.Clock, finished: int, result: dict[str, Any]
) -> dict[str, Any]:
    """Return the line of metrics.jsonl for the step that has just finished; speeds are means since the last line."""
    seconds, waited = clock.read()
    num_steps = finished - clock.step
    tokens = plan.tokens_until(finished) - plan.tokens_until(clock.step)
    line: dict[str, Any] = {"step": finished, "tokens_seen": plan.tokens_until(finished), "epoch": plan.epoch(finished)}
    line |= {name: float(result[name]) for name in ("loss", "learning_rate", "gradient_norm", "trained_tokens")}
    line |= metrics.speed(config, mesh, seconds, waited, num_steps, tokens)
    return line | {"seconds_left": seconds / num_steps * (plan.num_steps - finished)}


def closing_line(folder: Path, finished: int, num_steps: int, figure: Path) -> str:
    """Return the last line a run prints."""
    if finished == num_steps:
        done = f"done after {finished} steps"
    else:
        done = f"stopped after step {finished} of {num_steps}; the same command goes on from there"
    return f"{done} · checkpoint {folder / 'checkpoints' / str(finished)} · figure {figure}"


def opened_recorder(config: Config, folder: Path, first_step: int) -> metrics.Recorder:
    """Return the recorder of this process; what the first one cannot open, no process goes on without."""
    recorders: list[metrics.Recorder] = []
    writes = jax.process_index() == 0
    sharding.together(
        "records opened", lambda: recorders.append(metrics.Recorder(config, folder, first_step, writes=writes))
    )
    return recorders[0]


class HeldOut:
    """Measures the loss on the held-out windows and records it."""

    def __init__(
        self, config: Config, step: steps.Step, plan: Plan, caches: Sequence[TokenCache], recorder: metrics.Recorder
    ) -> None:
        # The held-out rows are few: reading processes would take longer to start than to read them.
        data = dataclasses.replace(config.data, loader_workers=0)
        self._config, self._step = dataclasses.replace(config, data=data), step
        self._caches, self._recorder = caches, recorder
        # As many rows at a time as the train step takes: a whole global batch may not fit.
        rows = config.train.global_batch_size // sharding.batch_split(config, step.mesh)
        self._plan = plan.held_out and dataclasses.replace(plan.held_out, global_batch_size=rows)

    def measure(self, state: steps.State, finished: int) -> None:
        """Record the mean loss per trained token over every held-out window; no-op when there are none."""
        if self._plan is None:
            return
        size = self._plan.global_batch_size
        rows = sharding.local_rows(self._step.mesh, size)
        sums = []
        with Loader(self._plan, self._caches, self._config, 0, rows) as loader:
            for local in loader:
                batch = sharding.to_global(local, rows, self._step.mesh, size)
                sums.append(self._step.evaluate(state["parameters"], batch))
        loss_sum, weight = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
        self._recorder.record({"step": finished, "held_out_loss": loss_sum / weight, "held_out_tokens": int(weight)})
        self._recorder.say(f"held-out loss after step {finished}: {loss_sum / weight:.4f} over {int(weight):,} tokens")


class NonFinite(Exception):
    """The gradient of `step`, counted from 1 as in the log, was not finite and the policy is to stop."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"step {step}: non-finite gradient; the parameters are those before it and are saved; lower "
            f"optimizer.learning_rate, look at the records named above, or set train.nonfinite=skip"
        )
        self.step = step


class Watch:
    """Follows the steps in flight and reports a gradient that was not finite."""

    def __init__(self, config: Config, plan: Plan, caches: Sequence[TokenCache], recorder: metrics.Recorder) -> None:
        self._stops = config.train.nonfinite == "stop"
        self._plan, self._caches, self._recorder = plan, caches, recorder
        self._in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def add(self, step: int, result: dict[str, jax.Array]) -> None:
        """Follow step number `step`, from 1, just dispatched; waits for the oldest one when too many are in flight."""
        self._in_flight.append((step, result))
        while len(self._in_flight) > MAX_STEPS_IN_FLIGHT:
            self._check(*self._in_flight.popleft())

    def settle(self) -> None:
        """Wait for every step in flight. Raises NonFinite as the policy says."""
        while self._in_flight:
            self._check(*self._in_flight.popleft())

    def devices_idle(self) -> bool:
        """Tell whether the devices have finished everything that was dispatched."""
        newest: Any = self._in_flight[-1][1]["loss"] if self._in_flight else None
        return newest is None or newest.is_ready()

    def _check(self, step: int, result: dict[str, jax.Array]) -> None:
        if bool(result["finite"]):
            return
        records = self._plan.describe(step - 1, self._caches)
        shown = ", ".join(records[:20]) + (f" and {len(records) - 20} more" if len(records) > 20 else "")
        self._recorder.say(
            f"step {step}: loss {float(result['loss'])}, gradient {float(result['gradient_norm'])}; records: {shown}"
        )
        if self._stops:
            raise NonFinite(step)


class StopRequest:
    """Remembers SIGTERM and Ctrl-C until the last checkpoint is written, so that the run leaves between two steps.

    With several processes JAX's preemption service owns SIGTERM, and makes all of them leave after the same step.
    """

    def __enter__(self) -> StopRequest:
        self._signal: int | None = None
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._former = {number: signal.signal(number, self._remember) for number in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def is_pending(self) -> bool:
        """Whether this process, if it is the only one, has been asked to stop."""
        return self._signal is not None

    def requested(self, finished: int) -> bool:
        """Tell whether to stop after `finished` steps; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(finished)
        return self.is_pending

    def _remember(self, number: int, _frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
