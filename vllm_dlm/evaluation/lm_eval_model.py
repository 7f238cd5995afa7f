# SPDX-License-Identifier: Apache-2.0
"""The model class `vllm_dlm` of lm-evaluation-harness.

    python -m vllm_dlm.evaluation.lm_eval_model run --model vllm_dlm \\
        --model_args pretrained=llada-tiny,dlm_strategy=threshold --tasks ...

is lm-eval's own command, which knows the class. (lm-eval 0.4 looks for no entry points,
so `lm_eval` alone does not find it.) `vllm-dlm eval --tasks lm-eval:NAME` drives the
same class. Log-likelihoods are those of `likelihood.py`: estimates of a bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from vllm import SamplingParams

from vllm_dlm.evaluation.engines import Answers, forwards_of
from vllm_dlm.evaluation.likelihood import greedy_matches, loglikelihood

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from vllm import LLM

MAX_TOKENS = 256
"""New tokens of a request that does not say."""

Pair = tuple[Any, list[int], list[int]]
"""What lm-eval keeps of a request, and token ids of prompt and continuation."""


@register_model("vllm_dlm")
class VllmDlm(TemplateLM):
    """A model on vLLM: one of this package's or, with `llm`, any.

    Args:
        pretrained: folder, hub id or alias of a diffusion model.
        llm: an engine that runs already, in place of `pretrained`.
        max_gen_toks: new tokens of a request that does not say.
        samples: masks of each continuation whose log-likelihood is asked.
        seed: of the masks.
        check_greedy: whether a continuation's log-likelihood comes with the answer
            whether the model would have written it, one token in each step. That takes
            as many forwards as it has tokens, and only some tasks read it; without it,
            the answer is no.
        request_options: options of every request, of diffusion models.
        batch_size, max_batch_size, device: of lm-eval; vLLM's scheduler batches, on
            the device that it finds, and they may say `auto` or nothing.
        engine: further arguments of `vllm_dlm.LLM`, `dlm_strategy` among them.

    Raises:
        ValueError: neither model nor engine, both, or sizes that nobody would read.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        llm: LLM | None = None,
        max_gen_toks: int = MAX_TOKENS,
        samples: int = 128,
        seed: int = 0,
        check_greedy: bool = True,
        request_options: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **engine: Any,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (llm is None):
            raise ValueError("vllm_dlm: give it `pretrained`, a model, or `llm`")
        for name, value in (("max_batch_size", max_batch_size), ("device", device)):
            if value is not None:
                raise ValueError(f"vllm_dlm: {name} is vLLM's to choose; leave it out")
        if batch_size not in (None, 1, "1", "auto"):
            raise ValueError(
                "vllm_dlm: batch_size is vLLM's to choose; for fewer requests at a "
                "time: --model_args max_num_seqs=N"
            )
        if llm is None:
            from vllm_dlm.entrypoints.llm import LLM as OurLLM

            llm = OurLLM(str(pretrained), **engine)
        self.llm = llm
        self.tokenizer: Any = llm.get_tokenizer()
        config = llm.llm_engine.vllm_config.model_config.hf_config
        self.is_diffusion = hasattr(config, "dlm_class")
        self.max_gen_toks = max_gen_toks
        self.samples = samples
        self.seed = seed
        self.check_greedy = check_greedy
        self.request_options = request_options or {}
        self.answers = Answers([])
        """What `generate_until` has done so far; its texts are not kept."""
        self.asked = 0
        """Requests so far, of both kinds."""

    # -- text --------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty prompt."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; the token that begins texts comes at most once."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(
            self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the model's own template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, which lm-eval records with the results."""
        if chat_template not in (False, True, None):
            raise ValueError("vllm_dlm: a model has one chat template, with no name")
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # -- requests ----------------------------------------------------------

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Answers to prompts, each up to one of its stop strings."""
        prompts, sampling = [], []
        for request in requests:
            context, kwargs = request.args
            prompts.append({"prompt_token_ids": self.tok_encode(context)})
            sampling.append(self._sampling(dict(kwargs)))
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=not disable_tqdm)
        self.answers.seconds += time.perf_counter() - began
        texts = []
        for request, output in zip(requests, outputs, strict=True):
            texts.append(output.outputs[0].text)
            self.answers.tokens += len(output.outputs[0].token_ids)
            self.answers.forwards += forwards_of(output)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        self.asked += len(requests)
        return texts

    def _sampling(self, kwargs: dict[str, Any]) -> SamplingParams:
        """What lm-eval's arguments of a generation mean to vLLM.

        Raises:
            ValueError: one of them means nothing here.
        """
        until = kwargs.pop("until", None) or []
        lengths = [
            kwargs.pop(name, None)
            for name in ("max_gen_toks", "max_new_tokens", "max_tokens")
        ]
        draws = kwargs.pop("do_sample", None)
        temperature = kwargs.pop("temperature", 0.0 if not draws else 1.0)
        known = {
            name: kwargs.pop(name)
            for name in ("top_p", "top_k", "min_p", "seed")
            if name in kwargs
        }
        if kwargs:
            raise ValueError(
                f"generation_kwargs {', '.join(sorted(kwargs))}: not known to the "
                "model class vllm_dlm; it knows until, max_gen_toks, do_sample, "
                "temperature, top_p, top_k, min_p, seed"
            )
        return SamplingParams(
            temperature=temperature if draws is not False else 0.0,
            max_tokens=next(
                (int(one) for one in lengths if one is not None), self.max_gen_toks
            ),
            stop=[until] if isinstance(until, str) else list(until),
            extra_args={"dlm": self.request_options} if self.request_options else None,
            **known,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        if self.is_diffusion:
            found = loglikelihood(
                self.llm,
                pairs,
                samples=self.samples,
                seed=self.seed,
                progress=not disable_tqdm,
            )
            greedy = [False] * len(pairs)
            if self.check_greedy:
                greedy = greedy_matches(self.llm, pairs)
            results = [
                (one.value, is_greedy)
                for one, is_greedy in zip(found, greedy, strict=True)
            ]
        else:
            results = self._of_prompts(pairs)
        for (args, *_), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", args, result)
        self.asked += len(requests)
        return results

    def _of_prompts(
        self, pairs: list[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """Of an autoregressive model: vLLM says how probable a prompt is."""
        prompts = [{"prompt_token_ids": [*first, *last]} for first, last in pairs]
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        results = []
        for (first, last), output in zip(pairs, outputs, strict=True):
            entries: Any = output.prompt_logprobs
            own = [
                entry[token]
                for entry, token in zip(entries[len(first) :], last, strict=True)
            ]
            value = sum(one.logprob for one in own)
            results.append((value, all(one.rank == 1 for one in own)))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Refused: whole texts are longer than the bound is good for.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "loglikelihood_rolling (perplexity of whole documents) is not defined for "
            "diffusion models here: a window's bound is not one of the next token, and "
            "they do not add up to a document's; choose a task of multiple choice or "
            "generation"
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
