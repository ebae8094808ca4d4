"""Encodes rows in chunks, in processes of this machine where there are many rows. No such process imports JAX."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Generator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

import numpy as np

from spin_jax.data import sources, store
from spin_jax.data.chat import Chat
from spin_jax.data.examples import encode_rows
from spin_jax.errors import EncodingKilled

CHUNK = 512  # rows
MANY = 20_000  # rows: to encode fewer takes no longer than to start other processes


def encode_chunk(rows: Any, numbers: np.ndarray, chat: Chat, options: dict[str, Any]) -> list[Any]:
    """The bytes of a batch of examples, those of their `canonical` forms, and the fields of the findings."""
    encoded, findings = encode_rows(rows, numbers.tolist(), chat, **options)
    batch = store.batch_of(encoded, chat).serialize()
    texts = b"".join(store.canonical(example) for _, example in encoded)
    return [np.frombuffer(batch, np.uint8), np.frombuffer(texts, np.uint8), vars(findings)]


def encode_chunks(rows: Any, chunks: Sequence[np.ndarray], chat: Chat, options: dict[str, Any]) -> Generator[list[Any]]:
    """`encode_chunk` of each chunk, in order. A chunk holds numbers of rows; `options` are those of `encode_rows`."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    count, pool = min(len(usable), 32), None
    if count > 1 and sum(map(len, chunks)) > MANY and getattr(rows, "cache_files", None):
        with contextlib.suppress(Exception):  # another process may not know the class of the user's tokenizer
            pool = _started(count, pickle.dumps((chat, options)))
    if pool is None:
        yield from (encode_chunk(sources.part(rows, chunk), chunk, chat, options) for chunk in chunks)
        return
    try:
        waiting: collections.deque = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode, sources.part(rows, chunk), chunk))
            if len(waiting) > 2 * count:  # so that few results are in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise EncodingKilled(
            f"{options['path']}: one of {count} processes that encode its rows was ended from outside, as Linux does "
            "where memory runs out; give the run more memory, or fewer CPUs (taskset -c 0-3 ...), as each has a process"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _started(count: int, arguments: bytes) -> ProcessPoolExecutor:
    """A pool of processes that have these arguments, and have not imported the user's main program, nor JAX with it."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _prepare, (arguments,))
        first = [pool.submit(int) for _ in range(count)]  # each starts a process
    finally:
        sys.modules["__main__"] = main
    for one in first:
        one.result()
    return pool


_arguments: list[Any] = []  # of such a process: chat and options


def _prepare(arguments: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _arguments.extend(pickle.loads(arguments))


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended, also where that was killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])  # pyright: ignore
    os._exit(1)


def _encode(rows: Any, numbers: np.ndarray) -> list[Any]:
    return encode_chunk(rows, numbers, *_arguments)
