"""Tasks of lm-evaluation-harness: finding, loading and checking them, and reading their results.

Importing this module raises `HarnessNotInstalled` where lm_eval is not installed.
"""

import logging
import os
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from spin_jax import config_values
from spin_jax.errors import HarnessNotInstalled
from spin_jax.models.architecture import Model
from spin_jax.runtime import processes
from spin_jax.sampling.next_token import Sampling

try:
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise HarnessNotInstalled(
        f"evaluation tasks need lm-evaluation-harness ({error}): pip install 'spin_jax[eval]'"
    ) from error

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise it forks for standard errors, and JAX has threads
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings concern things that are intended here

_SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # the harness's own, so that results are comparable


# --- finding and loading -------------------------------------------------------------------------


class Tasks(NamedTuple):
    """Tasks that are loaded with their data."""

    names: tuple[str, ...]  # the tasks, groups and tags that were requested
    loaded: Any  # the harness's dict of tasks and groups


def check_tasks(names: Sequence[str], include_path: str | None = None) -> None:
    """Raises ValueError for a task, group or tag that the harness does not know, and names the nearest."""
    processes.together(lambda: _find_manager(tuple(names), include_path))


def load_tasks(
    names: Sequence[str], *, include_path: str | None = None, num_fewshot: int | Mapping[str, int] | None = None
) -> Tasks:
    """Loads tasks, groups or tags with their data.

    Args:
        include_path: a directory of task files (YAML), which take precedence over the harness's own.
        num_fewshot: examples before each question, for all names or by name. None keeps the number that a task states,
            and a task that states 0 always keeps it.

    Raises:
        ValueError: a task is unknown, its data cannot be read, or it wants a way of generation that is not supported.
    """
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    manager = processes.together(lambda: _find_manager(tuple(names), include_path))
    for name in dict.fromkeys(names):
        parts = processes.together(lambda name=name: _load(manager, name))
        count = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
        for task in parts["tasks"].values():
            stated = task.get_config("num_fewshot")
            if stated is None or (count is not None and stated != 0):
                task.set_config(key="num_fewshot", value=count or 0)
            task.set_fewshot_seed(seed=_SEEDS["fewshot"])
        for kind in loaded:
            loaded[kind].update(parts.get(kind, {}))
    return Tasks(tuple(names), loaded)


def _find_manager(names: tuple[str, ...], include_path: str | None) -> TaskManager:
    """A task manager that knows all names."""
    if not names:
        raise ValueError("no task is named")
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise ValueError(f"include_path={include_path!r}: no such directory")
        own = _read_index(include_path, False)
        if set(names) <= set(own.all_subtasks):
            return own  # the thousands of tasks that come with the harness need not be read
    manager = _read_index(include_path, True)
    for name in names:
        if name not in manager.task_index:
            hint = config_values.nearest(name, manager.all_tasks)
            hint = hint if "did you mean" in hint else "; `lm-eval ls tasks` lists the harness's own tasks"
            raise ValueError(f"no evaluation task {name!r}{hint}")
    return manager


@lru_cache(maxsize=4)
def _read_index(include_path: str | None, include_defaults: bool) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _load(manager: TaskManager, name: str) -> Any:
    try:
        parts = manager.load([name])
        for task in parts["tasks"].values():
            _generation_options(task)
    except Exception as error:  # any kind: from YAML, from the hub, from the code of a task
        raise ValueError(f"evaluation task {name}: {type(error).__name__}: {error}") from error
    return parts


def check_model(tasks: Tasks, model: Model, apply_chat_template: bool = False) -> None:
    """Raises ValueError where the model cannot answer the tasks."""
    if model.tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token")
    if apply_chat_template and model.tokenizer.chat_template is None:
        raise ValueError("apply_chat_template: the tokenizer has no chat template")
    longest = model.config.max_position_embeddings
    for name, task in tasks.loaded["tasks"].items():
        options = _generation_options(task)
        if options and options.limit >= longest:
            raise ValueError(
                f"evaluation task {name}: answers of {options.limit} tokens (max_gen_toks) leave no room for a "
                f"question, because the model takes {longest} tokens (max_position_embeddings)"
            )


# --- how a task generates ------------------------------------------------------------------------

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # by precedence
# Options of other backends, at the values that change nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}


class GenerationOptions(NamedTuple):
    """The generation_kwargs of a request, read as the harness's `hf` backend reads them."""

    sampling: Sampling
    until: tuple[str, ...]  # stop strings

    @property
    def limit(self) -> int:
        """The most tokens of an answer."""
        return self.sampling.max_new_tokens

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> "GenerationOptions":
        """Reads generation_kwargs; ValueError names an option that is not supported or has an impossible value.

        Args:
            kwargs: the options that the task states.
            defaults: the options of the model's generation_config.json, for tasks that sample.
        """
        rest, defaults = dict(kwargs), defaults or {}
        until = rest.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        limits = [rest.pop(name, None) for name in _LIMITS]
        do_sample, temperature = rest.pop("do_sample", None), float(rest.pop("temperature", None) or 0.0)
        samples = temperature > 0 if do_sample is None else bool(do_sample)
        top_k = rest.pop("top_k", defaults.get("top_k", 50))  # 50 is the default of transformers
        top_p = rest.pop("top_p", defaults.get("top_p"))
        unknown = [name for name, value in rest.items() if _NEUTRAL.get(name, rest) != value]
        if unknown:
            raise ValueError(
                f"generation_kwargs: {unknown[0]}={rest[unknown[0]]!r} is not supported; supported are "
                f"until, do_sample, temperature, top_k, top_p, {', '.join(_LIMITS)}"
            )
        if samples and temperature <= 0:
            raise ValueError(f"generation_kwargs: do_sample needs temperature above 0, not {temperature:g}")
        limit = int(next((n for n in limits if n is not None), 256))
        strategy = (temperature, top_k or None, top_p) if samples else (0.0, None, None)
        return cls(Sampling(limit, *strategy), tuple(until))


def _generation_options(task: Any) -> GenerationOptions | None:
    """How a task generates; None where it only scores."""
    if task.get_config("output_type") != "generate_until":
        return None
    return GenerationOptions.from_kwargs(task.get_config("generation_kwargs") or {})


# --- results -------------------------------------------------------------------------------------


def flat_metrics(results: Mapping[str, Any], tasks: Tasks | None = None, *, stderr: bool = False) -> dict[str, float]:
    """The harness's results as flat numbers: task/metric, or task/metric/filter where the filter has a name.

    Args:
        tasks: leaves out the tasks within groups that have numbers of their own; None keeps all.
        stderr: the standard errors in place of the values.
    """
    hidden = _tasks_within_groups(tasks) if tasks else ()
    flat = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            name = metric.removesuffix("_stderr")
            included = comma and task not in hidden and (name != metric) == stderr
            if included and isinstance(value, int | float):
                flat["/".join([task, name, *([] if filtered == "none" else [filtered])])] = float(value)
    return flat


def results_table(results: Mapping[str, Any], tasks: Tasks) -> str:
    """The harness's own Markdown table, without the tasks within groups that have numbers of their own."""
    hidden = _tasks_within_groups(tasks)
    shown = {name: metrics for name, metrics in results["results"].items() if name not in hidden}
    return make_table({**results, "results": shown}).rstrip()


def metric_directions(names: Sequence[str], include_path: str | None = None) -> dict[str, int]:
    """{task/metric: 1 where higher is better, −1 where lower is better} of tasks, groups and their tasks."""
    loaded = load_tasks(names, include_path=include_path).loaded
    higher = {
        f"{name}/{metric}": is_better
        for name, task in loaded["tasks"].items()
        for metric, is_better in task.higher_is_better().items()
    }
    for name, group in loaded["groups"].items():
        members = [task.higher_is_better() for task in group.get_all_tasks()]
        for part in group.aggregate_metric_list or ():
            higher[f"{name}/{part.metric}"] = all(member.get(part.metric) is not False for member in members)
    return {name: -1 if is_better is False else 1 for name, is_better in higher.items()}


def _tasks_within_groups(tasks: Tasks) -> set[str]:
    """Tasks and groups that nobody requested by name, within groups that have numbers of their own."""
    return {
        part
        for group in tasks.loaded["groups"].values()
        if group.has_aggregation
        for part in (*(t.task_name for t in group.get_all_tasks()), *(g.name for g in group.get_all_groups()))
        if part != group.name and part not in tasks.names
    }
