"""TODO."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax.errors import NothingToTrainOn
from spin_jax.runtime import interrupts, processes
from spin_jax.selfplay import announce
from spin_jax.selfplay.announce import lengths, plan
from spin_jax.selfplay.fitting import Row, SelfPlay
from spin_jax.selfplay.prepare import prepare, take

PHASES = ("sample", "score", "train")


def run(
    config: Mapping[str, Any] | ConfigDict,
    workdir: str,
    *,
    only: str | None = None,
    should_stop: Callable[[], int] | None = None,
) -> list[Row]:
    """Runs self-play, or continues it, and returns the rows of summary.json.

    Args:
        config: what `spin_jax.config.default` lists; missing keys keep their defaults.
        workdir: a directory or object store URL; one run, and what is already there is not redone.
        only: `sample`, `score` or `train`: just this phase of the next iteration.
        should_stop: asked between units of work: the number of a signal, or 0. None listens to Ctrl-C and
            SIGTERM. Of several processes, one that is to stop stops all.

    Raises:
        ValueError, FileNotFoundError: bad config or input, before anything is computed.
        Interrupted: stopped; the same call continues.
        NotFinite: losses or gradients that are not finite, step after step.
        OSError: the workdir cannot be written; files.NoRoom where the disk is too full for a checkpoint.
    """
    if only is not None and only not in PHASES:
        raise ValueError(f"only={only!r}: choose from {', '.join(PHASES)}")
    with contextlib.ExitStack() as stack:
        stop = should_stop or stack.enter_context(interrupts.listening())
        resolved = config_lib.resolve(config)
        processes.say(f"{announce.tree(resolved)}\n")
        prepared = prepare(resolved, workdir)
        stack.enter_context(take(prepared))
        play = SelfPlay(prepared, lambda: processes.most(stop()))
        stack.callback(play.metrics.close)
        processes.say(plan(play.run, sum(map(play.finished, play.run.iterations))))

        params, spent = play.start(), ""
        play.hand_out()  # what failed before
        for t in play.run.iterations:
            if play.finished(t):
                params = None
                continue
            if play.summary.stops_early():
                break
            if only in (None, "sample"):
                params = play.sample(t, params)
            if only in (None, "score"):
                params = play.score(t, params)
            if only in (None, "train"):
                try:
                    params = play.train(t, params)  # the next opponent
                except NothingToTrainOn as error:
                    if t == play.run.config.selfplay.start:
                        raise
                    spent = str(error)
            if only is not None or spent:
                break
        del params

        if spent or play.summary.stops_early() or all(map(play.finished, play.run.iterations)):
            play.control()
            play.summary.conclude(spent)
            play.hand_out()
            play.summary.report()
        return play.summary.rows


def check(config: Mapping[str, Any] | ConfigDict, workdir: str | None = None) -> None:
    """Reads and checks all that `run` would, and says what it found; nothing is trained or written.

    Raises:
        ValueError, FileNotFoundError: what `run` would.
    """
    resolved = config_lib.resolve(config)
    processes.say(f"{announce.tree(resolved, everything=True)}\n")
    prepared = prepare(resolved, workdir)
    lines = plan(prepared, 0).splitlines()
    shown = [line for line in lines if workdir or not line.startswith(("workdir", "disk"))]
    processes.say(
        "\n".join([*shown, "", lengths(prepared), "", "everything that can be checked is in order"])
    )
