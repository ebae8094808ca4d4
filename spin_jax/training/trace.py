"""A profile of some training steps, which xprof and TensorBoard open (logging.profile_steps)."""

import contextlib
import itertools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from spin_jax.runtime import processes
from spin_jax.storage import files
from spin_jax.training.step import Step


@contextlib.contextmanager
def traced(step: Step, start: int, steps: range, folder: epath.Path, name: str) -> Iterator[Step]:
    """The step function of a training loop, which writes a trace of `steps` to folder/plugins/profile/name.

    Its first call is step `start`. Process 0 alone traces. A loop that ends before the last of `steps` writes nothing.
    """
    if not steps or not processes.first():
        yield step
        return
    with contextlib.ExitStack() as session:
        numbers = itertools.count(start)

        def run(*arguments: Any) -> Any:
            number = next(numbers)
            if number == steps[0]:
                session.enter_context(_profiler(folder / "plugins" / "profile" / name))
            if number == steps[-1] + 1:
                jax.block_until_ready(arguments)  # the state after the last of them
                session.close()
            if number not in steps:
                return step(*arguments)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                return step(*arguments)

        yield run
    processes.say(f"trace of {name}, steps {steps[0]} to {steps[-1]}: tensorboard --logdir={folder}")


@contextlib.contextmanager
def _profiler(folder: epath.Path) -> Iterator[None]:
    """Profiles the block. The profiler writes to local disks only, and the files go to `folder` when they are whole."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # the calls of Python functions would hide what the devices do
    with tempfile.TemporaryDirectory() as local:
        jax.profiler.start_trace(local, profiler_options=options)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
        for path in pathlib.Path(local).rglob("*"):
            if path.is_file():
                files.write_here(folder / path.name, path.read_bytes())
