"""Stands in for vLLM where that cannot be installed: its names and signatures, and answers from a file.

VLLM_STUB names a JSON file of [[prompt's ids, answer's ids], …], where a prompt may come with several answers. What was
asked of it goes to stdout.
"""

import dataclasses
import json
import os
from typing import Any


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclasses.dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        **kwargs: Any,
    ):
        assert not trust_remote_code
        assert os.path.exists(os.path.join(model, "SHA256SUMS"))
        print("LLM", json.dumps({"tensor_parallel_size": tensor_parallel_size, "seed": seed, **kwargs}))
        with open(os.environ["VLLM_STUB"]) as file:
            self.answers: dict[tuple[int, ...], list[list[int]]] = {}
            for prompt, answer in json.load(file):
                self.answers.setdefault(tuple(prompt), []).append(answer)

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None
    ) -> list[RequestOutput]:
        assert len(prompts) == len(sampling_params)
        return [self._answer(n, *asked) for n, asked in enumerate(zip(prompts, sampling_params, strict=True))]

    def _answer(self, number: int, prompt: dict[str, Any], params: SamplingParams) -> RequestOutput:
        ids = prompt["prompt_token_ids"]
        assert not params.detokenize
        outputs = []
        for index, whole in enumerate(self.answers[tuple(ids)][: params.n]):
            answer = whole[: params.max_tokens]
            stopped = answer[-1] in params.stop_token_ids
            reason = os.environ.get("VLLM_STUB_REASON") or ("stop" if stopped else "length")
            outputs.append(CompletionOutput(index, "", answer, finish_reason=reason))
        return RequestOutput(str(number), None, list(ids), outputs)
