"""The engine of a run: it answers prompts and scores answers, with whatever weights it is given.

The opponent, the policy on held-out rows, the start and the control all go through it, so that one set of compiled
programs serves them. Where sampling.engine or sampling.command is set, servers answer for the opponent.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from spin_jax import config_values
from spin_jax.data.records import Example, Ids
from spin_jax.errors import Interrupted
from spin_jax.models import lora
from spin_jax.models.architecture import Params
from spin_jax.models.params import sampling_params
from spin_jax.runtime import processes, sharding, stopwatch
from spin_jax.runtime.console import compact
from spin_jax.sampling.continuous import answer_prompts
from spin_jax.sampling.next_token import Sampling, prompt_keys
from spin_jax.sampling.server_process import ServerProcess
from spin_jax.sampling.servers import Protocol, Request, Servers
from spin_jax.selfplay import exports, from_config
from spin_jax.selfplay.prepare import Prepared
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import Group, group_sizes


class Engine:
    """Answers and scores. It keeps the sampler's copy of the last weights until `release`."""

    def __init__(self, run: Prepared, should_stop: Callable[[], Any]):
        """`should_stop` returns the number of the signal that asks the run to stop, or 0."""
        self._run = run
        self.should_stop = should_stop
        self._copied: tuple[Params, Params] | None = None  # the last weights, and the sampler's copy of them
        self._frozen: tuple[Params, Params] | None = None  # the last weights, and what training freezes of them

    def stop_if_asked(self) -> None:
        """Raises Interrupted where the run was asked to stop. It is called between two units of work."""
        if number := self.should_stop():
            raise Interrupted(int(number))

    def release(self) -> None:
        """Forgets the sampler's copy of the weights and frees a reward model: training needs their memory."""
        self._copied = self._frozen = None
        self._run.judge.free()

    def free(self, params: Params | None) -> None:
        """Frees the device memory of these weights and of the sampler's copy."""
        self.release()
        sharding.free(params)

    @contextlib.contextmanager
    def opponent(
        self, t: int, params: Params | None, weights: Callable[[int], Params]
    ) -> Iterator[tuple[Params | None, Params | Servers]]:
        """What answers for the opponent of iteration t: its weights, or servers, which sampling.command starts here.

        `params` are θ_t, or None. Yields θ_t where it is in memory, and what `answer` takes.
        """
        run, c = self._run, self._run.config.sampling
        addresses, check = config_values.engine_addresses(c), lambda: None
        if not c.command and not addresses:
            params = weights(t) if params is None else params
            yield params, params
            return
        model = exports.model_of_opponent(run, t, is_local=bool(c.command))
        fixed = run.model.stop_tokens, run.model.config.vocab_size, c.batch_size, c.timeout_s
        protocol = Protocol(model, from_config.sampling(run.config), *fixed)
        with contextlib.ExitStack() as stack:
            if c.command:
                self.free(params)  # the server may need the memory of these devices
                params, log = None, Path(run.folder(t)) / "engine.log"
                start = functools.partial(ServerProcess, c.command, model, log)
                if process := processes.together(lambda: start() if processes.first() else None):
                    stack.callback(process.stop)
                    addresses, check = [process.address], process.check
            yield params, Servers(addresses, protocol, check)

    @stopwatch.phase("sample")
    def answer(
        self,
        params: Params | Servers,
        examples: Sequence[Example],
        sampling: Sampling,
        *,
        iteration: int,
        sample_ids: int | Sequence[int] = 0,
        bar: Any = None,
    ) -> list[Ids]:
        """Answers the examples' prompts; each answer is cut to the room that `lengths` leaves.

        Args:
            params: float32 weights, or the servers that answer with them.
            iteration: a part of each random key, with the seed, the prompt_id and the sample_id.
            sample_ids: one id for all answers, or one for each example.
            bar: a progress bar that counts answers.

        Raises:
            Interrupted: the run was asked to stop.
            EngineFailed, EngineRefused: servers do not answer.
        """
        run, c = self._run, self._run.config
        sampled, began = 0, time.perf_counter()

        def on_chunk(prompts: int, tokens: int) -> None:
            nonlocal sampled
            sampled += tokens
            if bar is not None:
                bar.set_postfix({"tok/s": compact(sampled / (time.perf_counter() - began))}, refresh=False)
            self._count(bar, prompts)

        prompts = [run.chat.sampling_prompt(example) for example in examples]
        limits = [max(c.lengths.max_length - len(prompt), 1) for prompt in prompts]
        keys = prompt_keys(c.seed, iteration + 1, [e.prompt_id for e in examples], sample_ids)
        if isinstance(params, Servers):
            seeds = np.asarray(jax.random.key_data(keys))[:, 0] >> 1
            numbers = np.broadcast_to(sample_ids, len(examples)).tolist()
            names = [f"prompt_id {e.prompt_id}, sample_id {k}" for e, k in zip(examples, numbers, strict=True)]
            asked = zip(names, prompts, [min(n, sampling.max_new_tokens) for n in limits], seeds.tolist(), strict=True)
            return params.answer([Request(*one) for one in asked], on_chunk)
        # A limit for useful slots. It is the same in all phases, or each would compile the sampler anew.
        most_answers = max(map(len, run.datasets)) * c.selfplay.samples + len(run.held_out)
        return answer_prompts(
            run.decoder,
            self._for_sampling(params),
            prompts,
            keys,
            mesh=run.sampling_mesh,
            sampling=sampling,
            stop_tokens=run.model.stop_tokens,
            slots=min(from_config.slots(c, run.model), most_answers),
            limits=limits,
            on_chunk=on_chunk,
        )

    def _for_sampling(self, params: Params) -> Params:
        if self._copied is None or self._copied[0] is not params:
            self.release()  # first: there is no room for two copies
            model = self._run.model
            self._copied = params, sampling_params(params, model.config, model.dtype, self._run.sampling_mesh)
        return self._copied[1]

    @stopwatch.phase("score")
    def score(
        self, params: Params, groups: Sequence[Group], bar: Any = None, frozen: bool = False
    ) -> Float[np.ndarray, "groups A"]:
        """Log-probs of the answers of each group, in nats, by float32 weights, in rows of the shape that training has.

        With `frozen` they are rounded as train.frozen_dtype says: the policy begins there (models/lora.py).

        Raises:
            Interrupted: the run was asked to stop.
        """
        run, shape = self._run, self._run.pair_shape
        if not groups:
            return np.zeros((0, len(run.roles)), np.float32)
        longest = group_sizes(groups).max(axis=0)
        if (longest > shape.capacity).any():  # `official` samples from whole prompts that it cuts in training
            shape = shape._replace(length=sharding.row_length(int(max(longest[0], shape.length)), run.model.mesh))
        count = functools.partial(self._count, bar)
        unattended = run.chat.unattended
        if frozen:  # sampling is over
            self._copied = None
            run.judge.free()
            params = self._as_frozen(params)
        return score_groups(run.decoder, params, groups, shape, run.model.mesh, unattended=unattended, on_batch=count)

    def _as_frozen(self, params: Params) -> Params:
        model, dtype = self._run.model, self._run.config.train.frozen_dtype
        if not dtype:
            return params
        if self._frozen is None or self._frozen[0] is not params:
            self._frozen = params, lora.freeze(params, model.dtype, dtype, keep=True)
        return self._frozen[1]

    def _count(self, bar: Any, done: int) -> None:
        if bar is not None:
            bar.update(done)
        self.stop_if_asked()
