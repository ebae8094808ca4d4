"""Answers of outside engines: what is asked, what is sent again, what is refused, and how a server is started."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import completion_server
import numpy as np
import pytest
from completion_server import FAULTS, Server, answer
from runs import ROOT

from spin_jax import config
from spin_jax.errors import ConfigError, EngineFailed, EngineRefused, Interrupted
from spin_jax.sampling import servers
from spin_jax.sampling.next_token import Sampling
from spin_jax.sampling.server_process import ServerProcess
from spin_jax.sampling.servers import Protocol, Request, Servers
from spin_jax.selfplay.prepare import prepare

STOPS = (2, 7)
MODEL = "/data/run/iteration_0/model"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(servers, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.delenv(servers.KEY, raising=False)


@pytest.fixture
def serve():
    """serve(**options) → a stand-in server, which ends with the test."""
    made = []

    def start(models=(MODEL,), **options):
        made.append(Server(models, **options))
        return made[-1]

    yield start
    for server in made:
        server.close()


def requests(count):
    rng = np.random.default_rng(0)
    return [
        Request(f"prompt_id {n}, sample_id 0", rng.integers(6, 262, 5).astype(np.int32), 1 + n % 6, 1000 + n)
        for n in range(count)
    ]


def expected(asked):
    return [answer(one.prompt.tolist(), one.seed, one.max_tokens, STOPS) for one in asked]


def ask(addresses, asked, *, at_once=4, timeout_s=20, model=MODEL, on_answers=lambda count, tokens: None, **options):
    protocol = Protocol(model, Sampling(8, 0.7, 50, None), STOPS, 262, at_once, timeout_s)
    return [ids.tolist() for ids in Servers(addresses, protocol, **options).answer(asked, on_answers)]


def test_what_is_sent_and_what_comes_back(serve, monkeypatch, capsys):
    server, counts = serve(key="a-key-that-nobody-may-see"), []
    monkeypatch.setenv(servers.KEY, "a-key-that-nobody-may-see")
    (one,) = requests(1)
    found = ask([server.address], [one], on_answers=lambda *counted: counts.append(counted))
    assert found == expected([one])
    assert server.asked == [
        {
            "model": MODEL,
            "prompt": one.prompt.tolist(),
            "max_tokens": 1,
            "seed": 1000,
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [2, 7],
            "return_token_ids": True,
        }
    ]
    assert np.sum(counts, axis=0).tolist() == [1, len(found[0])]
    assert "nobody" not in "".join(capsys.readouterr())
    assert ask([server.address], []) == []


def test_misbehaving_servers_give_the_answers_of_a_well_behaved_one(serve):
    """Two servers with all faults; one ends while it works, and comes back. No answer is lost."""
    asked, mine = requests(300), [serve(faults=FAULTS), serve(faults=FAULTS, slow_s=1)]

    def restart():
        while len(mine[0].asked) < 60:
            time.sleep(0.01)
        mine[0].close()
        time.sleep(0.5)
        mine.append(serve(faults=FAULTS, port=mine[0].server_address[1]))

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    total = []
    found = ask([server.address for server in mine[:2]], asked, on_answers=lambda count, _: total.append(count))
    thread.join()
    assert found == expected(asked)
    assert sum(total) == len(asked)
    assert len(mine[2].answered) > 0
    assert all(server.most_at_once <= 4 for server in mine)
    assert ask([serve().address], asked[::-1]) == expected(asked)[::-1]  # the order plays no part


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        (
            (400, "max_tokens is too large"),
            "refuses prompt_id 0, sample_id 0: HTTP 400, .*too large",
        ),
        ((401, "Unauthorized"), "HTTP 401, .*Unauthorized.*\n.*OPENAI_API_KEY"),
        ((404, "no such page"), "/v1/completions refuses .*HTTP 404, .*no such page"),
        ((422, "top_k"), "HTTP 422, .*top_k"),
    ],
)
def test_a_refusal_ends_the_run_at_once(refuses, message, serve):
    server = serve(refuses=refuses)
    with pytest.raises(EngineRefused, match=message) as caught:
        ask([server.address], requests(1))
    assert server.address in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(server.asked) == 1


def test_a_wrong_key_is_refused_before_any_prompt_is_sent(serve, monkeypatch):
    monkeypatch.setenv(servers.KEY, "another-key")
    server = serve(key="the-key-of-the-server")
    with pytest.raises(
        EngineRefused, match=r"/v1/models refuses to list its models: HTTP 401.*\n.*OPENAI_API_KEY"
    ) as caught:
        ask([server.address], requests(1))
    assert "another-key" not in str(caught.value)
    assert not server.asked


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"token_ids": [9, 262, 9]}, "the token id 262, and the vocabulary has 262"),
        ({"token_ids": [9, True]}, "the token id True"),
        ({"token_ids": []}, "is empty"),
        ({"token_ids": [9] * 7}, "has 7 tokens, and at most 6"),
        ({"token_ids": [9, 7, 9]}, "goes on after the stop token 7"),
        (
            {"token_ids": [9, 3]},
            r"ends after 2 of 6 tokens with the id 3, which is no stop token .*\(finish_reason stop",
        ),
        ({"prompt_token_ids": [1]}, "answered other token ids than it was sent"),
    ],
)
def test_what_is_wrong_again_and_again_ends_the_run(choice, message, serve, monkeypatch):
    """The error names server, request and fault, and says that what is in files is kept; exit code 1: try again."""
    server, one = serve(), requests(6)[5]
    right = {"index": 0, "finish_reason": "stop", "token_ids": [9, 2], "prompt_token_ids": one.prompt.tolist()}
    monkeypatch.setattr(
        "completion_server._Handler.complete", lambda self, *_: self.send(200, {"choices": [right | choice]})
    )
    with pytest.raises(
        EngineFailed, match=rf"failed at the same request 8 times. prompt_id 5, sample_id 0: .*{message}"
    ) as caught:
        ask([server.address], [one])
    assert server.address in str(caught.value)
    assert caught.value.exit_code == 1
    assert len(server.asked) == 8


def test_a_server_without_token_ids_is_refused(serve, monkeypatch):
    monkeypatch.setattr(
        "completion_server._Handler.complete", lambda self, *_: self.send(200, {"choices": [{"text": ""}]})
    )
    with pytest.raises(EngineRefused, match=r"no token ids for prompt_id 0.*return_token_ids.*pairs --prompts"):
        ask([serve().address], requests(1))


def test_a_dead_server_is_left_out_and_the_last_one_ends_the_run(serve, capsys):
    dead, alive, asked = serve(), serve(), requests(20)
    dead.close()
    assert ask([dead.address, alive.address], asked) == expected(asked)
    began = time.monotonic()
    with pytest.raises(EngineFailed, match=rf"no server .* answers any more\. {dead.address}: .*refused") as caught:
        ask([dead.address, dead.address.replace("127.0.0.1", "localhost")], asked, timeout_s=1)
    assert str(caught.value).count("refused") == 2
    assert 1 <= time.monotonic() - began < 5
    assert "refused. This server is given up" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["500", "beyond", "closed"])
@pytest.mark.parametrize("count", [3, 100])
def test_a_server_that_fails_each_time_is_left_out(count, fault, serve, monkeypatch, capsys):
    """The good one is slow, and nevertheless gets all requests. Where the bad one is alone, it ends the run."""
    good, bad, asked = serve(), serve(), requests(count)
    complete, list_models = completion_server._Handler.complete, completion_server._Handler.do_GET
    is_asked, both_are_there = threading.Event(), threading.Event()

    def begin_after_the_bad_one(self):
        if self.server is good:
            is_asked.wait(30)
        list_models(self)
        if self.server is good and self.path == "/v1/models":
            threading.Timer(0.3, both_are_there.set).start()  # the client reads the list in this time

    def misbehave(self, server, body):
        if server is good:
            time.sleep(0.1)
            return complete(self, server, body)
        is_asked.set()
        both_are_there.wait(30)
        if fault == "closed":
            self.close_connection = True
            return None
        return self.send(500 if fault == "500" else 200, {"choices": [{"token_ids": [999], "prompt_token_ids": [1]}]})

    monkeypatch.setattr(completion_server._Handler, "complete", misbehave)
    monkeypatch.setattr(completion_server._Handler, "do_GET", begin_after_the_bad_one)
    assert ask([bad.address, good.address], asked) == expected(asked)
    seeds = [body["seed"] for body in bad.asked]
    assert len(seeds) == len(set(seeds)) > 0  # none is sent there twice
    is_given_up = f"{bad.address}: " in (said := capsys.readouterr().out) and "This server is given up" in said
    assert is_given_up == (count == 100 and fault != "closed")
    assert good.address not in said
    with pytest.raises(EngineFailed, match="failed at the same request 8 times"):
        ask([bad.address], asked)


def test_a_request_that_fails_everywhere_ends_the_run(serve):
    mine = [serve(refuses=(500, "broken")) for _ in range(2)]
    with pytest.raises(EngineFailed, match=r"http.* and http.* failed at the same request 8 times") as caught:
        ask([server.address for server in mine], requests(1))
    assert all(server.address in str(caught.value) and server.asked for server in mine)


def test_a_silent_server_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("completion_server._Handler.complete", lambda self, *_: time.sleep(30))
    with pytest.raises(EngineFailed, match="ReadTimeoutError"):
        ask([serve().address], requests(2), timeout_s=0.5)


def test_only_the_opponents_export_answers(serve, capsys):
    """The model of the iteration before is not asked; once the right one is served, wherever it lies, it answers."""
    server, asked = serve(["/data/run/start/model"]), requests(3)
    threading.Timer(1, lambda: setattr(server, "models", ["/elsewhere/run/iteration_0/model"])).start()
    assert ask([server.address], asked) == expected(asked)
    assert {one["model"] for one in server.asked} == {"/elsewhere/run/iteration_0/model"}
    said = capsys.readouterr().out
    assert f"it serves /data/run/start/model. Serve {MODEL}, or name the model iteration_0/model" in said
    assert f"{server.address}: /elsewhere/run/iteration_0/model is taken for {MODEL}" in said


@pytest.mark.parametrize(
    ("wanted", "served", "is_taken"),
    [
        (MODEL, "/data/other_run/iteration_0/model", False),
        (MODEL, "/data/run/iteration_1/model", False),
        (MODEL, "iteration_0/model", True),
        (MODEL, f"{MODEL}/", True),
        ("org/name", "org/name", True),
        ("org/name", "other/name", False),
        ("/models/name", "/mnt/models/name", True),
        ("/models/name", "name", True),
    ],
)
def test_the_same_name_in_another_folder_is_another_model(wanted, served, is_taken, serve):
    server, asked = serve([served]), requests(1)
    if is_taken:
        assert ask([server.address], asked, model=wanted) == expected(asked)
    else:
        with pytest.raises(EngineFailed, match=f"it serves {served}. Serve {wanted}"):
            ask([server.address], asked, model=wanted, timeout_s=0.5)


def test_a_stop_does_not_wait_for_a_slow_server(serve, monkeypatch):
    monkeypatch.setattr("completion_server._Handler.complete", lambda self, *_: time.sleep(30))

    def stop(count, tokens):
        raise Interrupted(signal.SIGINT)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        ask([serve().address], requests(9), on_answers=stop)
    assert time.monotonic() - began < 5


# --- a server that the run starts ----------------------------------------------------------------

STAND_IN = f"{sys.executable} {ROOT}/tests/helpers/completion_server.py --port={{port}} --model={{model}}"


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_server_is_started_and_ended_with_all_its_children(tmp_path):
    model, log, asked = str(tmp_path / "it's a folder" / "model"), tmp_path / "run" / "engine.log", requests(5)
    process = ServerProcess(f"echo started; sleep 1000 & echo pid $!; {STAND_IN}", model, log)
    try:
        assert ask([process.address], asked, model=model, check=process.check) == expected(asked)
    finally:
        process.stop()
    text = log.read_text()
    assert f"serving {model}" in text
    wait_for(lambda: not alive(text.split("pid ")[1].split()[0]))
    process.stop()  # a second time does no harm


def test_a_command_that_ends_is_told_with_its_log(tmp_path):
    process = ServerProcess("echo no GPU here for {model} at {port} >&2; exit 3", "M", tmp_path / "engine.log")
    with pytest.raises(EngineFailed, match=r"(?s)exit code 3.*engine\.log ends with.no GPU here for M at \d+"):
        ask([process.address], requests(1), model="M", check=process.check)
    process.stop()


def test_a_killed_run_leaves_no_server_behind(tmp_path):
    code = f"""
import pathlib, time
from spin_jax.sampling.server_process import ServerProcess
process = ServerProcess("echo pid $$; sleep 1000", "M", pathlib.Path({str(tmp_path)!r}) / "log")
time.sleep(1000)
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "pid" in log.read_text())
    pid = log.read_text().split()[1]
    assert alive(pid)
    run.kill()
    run.wait()
    wait_for(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"engine": "localhost:8000"}, "sampling.engine has 'localhost:8000': ours, or addresses such as http://HOST"),
        ({"engine": "http://a:1,vllm"}, "sampling.engine has 'vllm'"),
        ({"engine": "http://user:pw@host:1"}, "sampling.engine has .* OPENAI_API_KEY"),
        ({"engine": "http://a:1,"}, "sampling.engine has ''"),
        ({"engine": "http://a:1", "command": "vllm serve {model} --port {port}"}, "are both set"),
        ({"command": "vllm serve {model}"}, "needs {model} and {port}"),
        ({"timeout_s": 0}, "sampling.timeout_s=0: at least 1"),
    ],
)
def test_bad_values_are_refused_first(keys, message):
    with pytest.raises(ConfigError, match=message):
        config.resolve({"model": {"path": "M"}, "data": {"path": "D"}, "sampling": keys})


def test_an_opponent_that_is_in_no_folder_is_refused():
    keys = {"model": {"path": "M", "adapters": "A"}, "data": {"path": "D"}, "sampling": {"engine": "http://a:1"}}
    with pytest.raises(ConfigError, match="an outside engine needs the opponent as a folder"):
        config.resolve(keys)
    config.resolve({**keys, "sampling": {"engine": "ours"}})
    with pytest.raises(ConfigError, match=r"selfplay.opponent_decay: an outside engine needs the opponent as a folder"):
        config.resolve({**keys, "model": {"path": "M"}, "selfplay": {"opponent_decay": 0.5}})


def test_a_command_needs_a_workdir_on_a_disk():
    command = "vllm serve {model} --port {port}"
    keys = {"model": {"path": "M"}, "data": {"path": "D"}, "sampling": {"command": command}}
    with pytest.raises(
        ValueError, match=r"no model in gs://bucket/run: take a --workdir on a disk, or sampling.engine"
    ):
        prepare(config.resolve(keys), "gs://bucket/run")


def test_addresses():
    from spin_jax.config_values import engine_addresses

    def sampling(**keys):
        return config.resolve({"model": {"path": "M"}, "data": {"path": "D"}, "sampling": keys}).sampling

    assert engine_addresses(sampling()) == engine_addresses(sampling(engine="ours")) == []
    several = sampling(engine="http://a:1/v1, https://b/llm/v1/,http://a:1,http://[::1]:8000")
    assert engine_addresses(several) == ["http://a:1", "https://b/llm", "http://[::1]:8000"]


TWO_PROCESSES = """
import json, sys
import numpy as np
from spin_jax.runtime import processes
processes.connect(sys.argv[1], 2, int(sys.argv[2]))
from spin_jax.sampling.next_token import Sampling
from spin_jax.sampling.servers import Protocol, Request, Servers
asked = [Request(f"request {n}", np.arange(8, 12, dtype=np.int32), 5, n) for n in range(30)]
protocol = Protocol(sys.argv[4], Sampling(5, 1.0), (2, 7), 262, 4, 20)
counts = []
found = Servers([sys.argv[3]], protocol).answer(asked, lambda count, tokens: counts.append(count))
print("ANSWERS", json.dumps([sum(counts), [ids.tolist() for ids in found]]), flush=True)
"""


def test_two_processes_have_the_answers_that_process_0_got(serve):
    server = serve(faults=("slow", "500", "cut"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "-c", TWO_PROCESSES, coordinator, str(n), server.address, MODEL] for n in range(2)]
    started = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    texts = [process.communicate(timeout=200)[0] for process in started]
    right = [answer([8, 9, 10, 11], seed, 5, STOPS) for seed in range(30)]
    for text in texts:
        assert "ANSWERS" in text, text
        assert json.loads(text.split("ANSWERS ")[1].splitlines()[0]) == [30, right]
    assert server.most_at_once <= 4  # of one process
