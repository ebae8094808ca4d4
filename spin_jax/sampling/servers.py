"""Answers of outside engines: completion servers that speak OpenAI's protocol, such as vLLM and SGLang.

Token ids go out and token ids come back (`return_token_ids`), so that nothing is tokenized twice. Each request has a
seed of its own, so that its answer depends neither on the order of the requests nor on what was answered before. A
request that fails is sent again, to a server that has not failed at it where there is one. Every answer is checked.
"""

import collections
import dataclasses
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import urllib3

from spin_jax.data.records import Ids
from spin_jax.errors import EngineFailed, EngineRefused
from spin_jax.runtime import processes
from spin_jax.sampling.next_token import Sampling

KEY = "OPENAI_API_KEY"  # the environment variable that holds the servers' key

_TRIES = 8  # for each request; a server that is busy does not count
_LONGEST_PAUSE_S = 15
_BUSY = (429, 503)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to answer."""

    name: str  # for messages: prompt_id 7, sample_id 0
    prompt: Ids
    max_tokens: int
    seed: int  # below 2**31


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all requests have in common."""

    model: str  # the path or hub id of the opponent, which the servers must offer
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    vocab_size: int
    at_once: int  # requests in progress at each server
    timeout_s: float  # a server that does not start, or answers nothing, for so long is given up


class Servers:
    """The servers of one opponent. Process 0 talks with them, and the other processes get its answers."""

    def __init__(self, addresses: Sequence[str], protocol: Protocol, check: Callable[[], object] = lambda: None):
        """`check` is called while the main thread waits; it raises if the servers are lost for good."""
        self._servers = [_Server(address, protocol) for address in addresses]
        self._check = check

    def answer(self, requests: Sequence[Request], on_answers: Callable[[int, int], None]) -> list[Ids]:
        """The answers in the order of the requests, which are the same in all processes.

        `on_answers` gets the numbers of new answers and of their tokens, and may raise to stop.

        Raises:
            EngineRefused: a server refuses what it is asked, and would refuse it again.
            EngineFailed: no server is left that answers, or none answers some request well.
        """
        work, done = _Work(self._servers, self._check, requests) if processes.first() else None, 0
        try:
            while done < len(requests):
                count, tokens = processes.together(lambda: work.wait() if work else (0, 0))
                count = int(processes.most(count))
                on_answers(count - done, tokens)
                done = count
        finally:
            if work:
                work.close()
        return processes.exchanged(work.answers if work else None)[0]


class _TryAgain(Exception):
    """A request failed, and another attempt may succeed."""

    def __init__(self, problem: str, is_busy: bool = False, is_away: bool = False):
        super().__init__(problem)
        self.is_busy, self.is_away = is_busy, is_away


class _Server:
    """One server: whether it is there, and what it says to one request."""

    def __init__(self, address: str, protocol: Protocol):
        self.address, self.protocol = address, protocol
        timeout = urllib3.Timeout(connect=10, read=protocol.timeout_s)
        self._pool = urllib3.PoolManager(maxsize=protocol.at_once, timeout=timeout, retries=False)
        self._lock = threading.Lock()
        self._name: str | None = None  # that the server gives the model; None while it is not known to be there
        self.good_at = time.monotonic()  # the time of the last answer, or of the first request
        self.failures = 0  # in a row; those of a server that is busy or away do not count
        self.problem, self.is_gone = "", False

    def is_ready(self) -> bool:
        return self._name is not None and not self.is_gone

    def wait_until_ready(self, closed: threading.Event) -> str | None:
        """Returns the server's name for the model once it offers it; None if it is given up or `closed` is set."""
        with self._lock:  # one thread asks for all
            pauses = 0
            while self._name is None and not self.is_gone and not closed.is_set():
                try:
                    self._name, self.good_at = self._offered(), time.monotonic()
                except _TryAgain as again:
                    self.note_failure(str(again))
                    pauses += 1
                    if pauses == 2:
                        processes.say(f"{self.address}: {again}. The run waits for it")
                    closed.wait(_pause(pauses))
            return None if self.is_gone or closed.is_set() else self._name

    def note_failure(self, problem: str, is_away: bool = False, is_hopeless: bool = False) -> None:
        """Gives the server up where it is hopeless, or nothing succeeded for too long."""
        self.problem = f"{self.address}: {problem}"
        self._name = None if is_away else self._name
        if not self.is_gone and (is_hopeless or time.monotonic() - self.good_at >= self.protocol.timeout_s):
            self.is_gone = True
            processes.say(f"{self.problem}. This server is given up")

    def complete(self, model: str, request: Request) -> Ids:
        """The server's answer, which fits the request. Raises _TryAgain or EngineRefused."""
        p, how, prompt = self.protocol, self.protocol.sampling, request.prompt.tolist()
        asked = {"model": model, "prompt": prompt, "max_tokens": request.max_tokens, "seed": request.seed}
        asked |= {"temperature": how.temperature, "top_k": how.top_k or -1, "top_p": how.top_p or 1.0}
        asked |= {"stop_token_ids": list(p.stop_tokens), "return_token_ids": True}
        asked |= {"min_p": 0.0, "repetition_penalty": 1.0}  # or they would come from generation_config.json
        said = self._call("POST", "/v1/completions", request.name, json=asked)
        match said.get("choices"):
            case [{"token_ids": list(ids), "prompt_token_ids": list(echoed), **choice}]:
                if problem := _unfit(ids, request.max_tokens, p, choice.get("finish_reason"), echoed == prompt):
                    raise _TryAgain(f"{request.name}: {problem}")
            case [dict()]:
                raise EngineRefused(
                    f"{self.address} returned no token ids for {request.name}: vLLM (from 0.10.2 on) and SGLang (from "
                    "pull request 30917 on) have return_token_ids. Take such a server, or `spin_jax.pairs --prompts`"
                )
            case _:
                raise _TryAgain(f"{request.name}: one answer was asked for, and the server sent {str(said)[:200]}")
        self.good_at, self.failures = time.monotonic(), 0
        return np.array(ids, np.int32)

    def _offered(self) -> str:
        """The server's name for the model. Raises _TryAgain where it is not there, or offers another one."""
        self._call("GET", "/health", "to tell its health")
        listed = self._call("GET", "/v1/models", "to list its models").get("data")
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        # Another machine may have the folder at another place. Other runs have folders of the same name, so of a
        # longer path one more part must be the same.
        wanted = self.protocol.model.rstrip("/").split("/")
        own = 2 if wanted[-1] == "model" else 1  # iteration_0/model, or the name of a model's own folder
        for card in cards:
            for name in (str(card.get("root")), str(card.get("id"))):
                parts = name.rstrip("/").split("/")
                if parts == wanted[-own:] or parts[-own - 1 :] == wanted[-own - 1 :]:
                    if name != self.protocol.model:
                        processes.say(f"{self.address}: {name} is taken for {self.protocol.model}")
                    return str(card.get("id"))
        names = ", ".join(str(card.get("id")) for card in cards) or "nothing"
        name = "/".join(wanted[-own:])
        raise _TryAgain(f"it serves {names}. Serve {self.protocol.model}, or name the model {name}")

    def _call(self, method: str, path: str, name: str, **options: Any) -> Mapping[str, Any]:
        """The JSON object that the server returns. /health, which not all servers have, returns none."""
        headers = {"Authorization": f"Bearer {os.environ[KEY].strip()}"} if os.environ.get(KEY) else {}
        try:
            response = self._pool.request(method, self.address + path, headers=headers, redirect=False, **options)
        except urllib3.exceptions.HTTPError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}", is_away=True) from error
        status, text = response.status, response.data.decode("utf-8", "replace").strip()
        if path == "/health" and status in (200, 404, 405):
            return {}
        if status == 200:
            try:
                return dict(json.loads(text))
            except (ValueError, TypeError) as error:
                raise _TryAgain(f"{name}: the server sent no JSON object, but {text[:200]!r}") from error
        if status < 500 and status not in (408, *_BUSY):
            advice = f"Set the variable {KEY} to its key" if status in (401, 403) else "Its log may tell more"
            raise EngineRefused(f"{self.address}{path} refuses {name}: HTTP {status}, {text[:500]}\n{advice}")
        raise _TryAgain(f"{name}: HTTP {status}: {text[:200]}", is_busy=status in _BUSY)


def _unfit(ids: list, max_tokens: int, protocol: Protocol, reason: Any, is_prompt_equal: bool) -> str:
    """What is wrong with the ids of an answer; nothing where they may be used."""
    stops, size = protocol.stop_tokens, protocol.vocab_size
    if not is_prompt_equal:
        return "the server answered other token ids than it was sent"
    if not ids:
        return "the answer is empty"
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < size]:
        return f"the answer has the token id {str(wrong[0])[:20]}, and the vocabulary has {size}"
    if len(ids) > max_tokens:
        return f"the answer has {len(ids)} tokens, and at most {max_tokens} were asked for"
    if early := [token for token in ids[:-1] if token in stops]:
        return f"the answer goes on after the stop token {early[0]}"
    if ids[-1] not in stops and len(ids) < max_tokens:
        return (
            f"the answer ends after {len(ids)} of {max_tokens} tokens with the id {ids[-1]}, which is no stop token of "
            f"the run (finish_reason {reason}): compare eos_token_id in the model's generation_config.json"
        )
    return ""


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures: twice as long each time, and not the same in all threads."""
    return min(0.25 * 2 ** min(failures, 10), _LONGEST_PAUSE_S) * random.uniform(0.5, 1)


class _Work:
    """Requests that wait, those that are in progress in threads, and the answers."""

    def __init__(self, servers: Sequence[_Server], check: Callable[[], object], requests: Sequence[Request]):
        self.answers: list[Ids] = [np.zeros(0, np.int32)] * len(requests)
        self._servers, self._check, self._requests = servers, check, requests
        self._waiting = collections.deque(range(len(requests)))
        self._failures = collections.Counter[tuple[int, _Server]]()
        self._done = self._tokens = 0
        self._error: Exception | None = None
        self._changed, self._closed = threading.Condition(), threading.Event()
        for server in servers:
            server.good_at = time.monotonic()
            for _ in range(min(server.protocol.at_once, len(requests))):
                # A daemon does not keep the program from ending while a server is silent.
                threading.Thread(target=self._run, args=[server], daemon=True).start()

    def wait(self) -> tuple[int, int]:
        """Waits a moment, or until all is done; returns (answers so far, tokens since the last call)."""
        self._check()
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._closed.is_set(), timeout=0.5)
            if self._error:
                raise self._error
            tokens, self._tokens = self._tokens, 0
            return self._done, tokens

    def close(self) -> None:
        """Ends the threads; answers that are still to come are dropped."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()

    def _run(self, server: _Server) -> None:
        try:
            while (model := server.wait_until_ready(self._closed)) and (number := self._next(server)) is not None:
                self._answer(server, model, number)
            with self._changed:
                self._changed.notify_all()  # where this server is given up, others get its requests
            if all(each.is_gone for each in self._servers):
                problems = "; ".join(each.problem for each in self._servers)
                raise EngineFailed(f"no server of sampling.engine answers any more. {problems}")
        except Exception as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _next(self, server: _Server) -> int | None:
        """The number of the server's next request; None when there is none to come."""
        with self._changed:
            while not self._closed.is_set() and not server.is_gone:
                for number in self._waiting:
                    if not self._failures[number, server] or not self._others(number):
                        self._waiting.remove(number)
                        return number
                self._changed.wait()
            return None

    def _others(self, number: int) -> bool:
        """Whether a server that is there has not failed at this request."""
        return any(each.is_ready() and not self._failures[number, each] for each in self._servers)

    def _answer(self, server: _Server, model: str, number: int) -> None:
        try:
            answer = server.complete(model, self._requests[number])
        except _TryAgain as again:
            with self._changed:
                self._failures[number, server] += not again.is_busy
                server.failures += not (again.is_busy or again.is_away)
                rounds = server.failures // server.protocol.at_once
                has_spare = any(not each.is_gone for each in self._servers if each is not server)
                server.note_failure(str(again), again.is_away, is_hopeless=has_spare and rounds >= _TRIES)
                failed = [each for each in self._servers if self._failures[number, each]]
                failures = sum(self._failures[number, each] for each in failed)
                is_for_others = not again.is_busy and self._others(number)
            if failures >= _TRIES and all(each.is_gone or each in failed for each in self._servers):
                said = f"{' and '.join(each.address for each in failed)} failed at the same request {failures} times"
                advice = "See the server's log; the answers that are in files are kept"
                raise EngineFailed(f"{said}. {again}. {advice}") from again
            pause = _pause(3 if again.is_busy else max(failures, rounds))
            if not is_for_others:
                self._closed.wait(pause)
            with self._changed:
                self._waiting.appendleft(number)
                self._changed.notify_all()
            if is_for_others:
                self._closed.wait(pause)
        else:
            with self._changed:
                self.answers[number] = answer
                self._done, self._tokens = self._done + 1, self._tokens + len(answer)
            if self._done == len(self.answers):
                self.close()
