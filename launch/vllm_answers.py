#!/usr/bin/env python3
"""Answers the prompts of a run with vLLM, in vLLM's own environment: nothing of spin_jax is needed here.

    python -m spin_jax.pairs --workdir=DIR --prompts=prompts.jsonl
    python launch/vllm_answers.py --prompts=prompts.jsonl --output=pairs.jsonl
    python -m spin_jax.main … --config.selfplay.pairs=T=pairs.jsonl

Token ids go in and token ids come out: nothing is tokenized again, and the run checks the prompts' ids
against its own. How to sample, and where answers end, is in the file of prompts. More GPUs, less memory:

    python launch/vllm_answers.py … --engine='{"tensor_parallel_size": 8, "gpu_memory_utilization": 0.85}'
"""

import argparse
import json
import os
import sys


def read(path):
    """(how to sample, prompts) of a file that `spin_jax.pairs --prompts` wrote."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if len(rows) < 2 or "prompts_of_iteration" not in rows[0]:
        raise SystemExit(f"{path} is no file of prompts: python -m spin_jax.pairs --prompts=FILE writes one")
    return rows[0], rows[1:]


def sampling(how, prompt):
    """vLLM's parameters for a prompt."""
    from vllm import SamplingParams

    limits = {key: how[key] for key in ("top_k", "top_p") if how[key] is not None}
    return SamplingParams(
        n=prompt["samples"],
        temperature=how["temperature"],
        max_tokens=prompt["max_tokens"],
        stop_token_ids=how["stop_token_ids"],
        detokenize=False,
        **limits,
    )


def answer(how, prompts, model, engine):
    """A pair for each answer: the ids of the prompt, of the human answer and of vLLM's."""
    from vllm import LLM

    options = {"revision": how["revision"]} if how["revision"] and model == how["model"] else {}
    longest = max(len(prompt["prompt_tokens"]) + prompt["max_tokens"] for prompt in prompts)
    llm = LLM(**{"model": model, "seed": how["seed"], "max_model_len": longest, **options, **engine})
    outputs = llm.generate(
        [{"prompt_token_ids": prompt["prompt_tokens"]} for prompt in prompts],
        [sampling(how, prompt) for prompt in prompts],
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        place = f"prompt_id {prompt['prompt_id']}"
        if list(output.prompt_token_ids) != prompt["prompt_tokens"]:
            raise SystemExit(f"{place}: vLLM answered other token ids than it was given")
        if len(output.outputs) != prompt["samples"]:
            raise SystemExit(f"{place}: vLLM gave {len(output.outputs)} answers, and {prompt['samples']} are wanted")
        for sample_id, answered in enumerate(output.outputs):
            ids = list(answered.token_ids)
            if answered.finish_reason not in ("stop", "length"):
                raise SystemExit(f"{place}: vLLM did not finish the answer ({answered.finish_reason})")
            if answered.finish_reason == "stop" and ids[-1:] not in [[stop] for stop in how["stop_token_ids"]]:
                raise SystemExit(f"{place}: the answer ends without its stop token: this vLLM leaves it out")
            fields = ("prompt_id", "real", "prompt_tokens", "real_tokens")
            yield {**{field: prompt[field] for field in fields}, "sample_id": sample_id, "generated_tokens": ids}


def main(argv=None):
    """Runs the command line; returns its exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--prompts", required=True, help="the file of prompts")
    parser.add_argument("--output", required=True, help="the .jsonl file of pairs that is written")
    parser.add_argument("--model", help="where the model is here, if not where the file of prompts has it")
    parser.add_argument("--engine", type=json.loads, default={}, help="arguments of vllm.LLM, as JSON")
    options = parser.parse_args(argv)
    if not options.output.endswith(".jsonl"):
        parser.error(f"--output={options.output}: a name that ends in .jsonl is wanted")
    how, prompts = read(options.prompts)
    pairs = list(answer(how, prompts, options.model or how["model"], options.engine))
    with open(f"{options.output}.partial", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    os.replace(f"{options.output}.partial", options.output)
    print(f"{options.output}: {len(pairs)} pairs for iteration {how['prompts_of_iteration']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
