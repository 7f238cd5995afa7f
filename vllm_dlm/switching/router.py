# SPDX-License-Identifier: Apache-2.0
"""`EntropyRouter`: two models write texts together, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tqdm import tqdm
from vllm import LLM
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import (
    conversation_to_seq,
    parse_model_prompt,
    prompt_to_seq,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_dlm.switching.entropy import LARGE, SMALL, Model, make_rule
from vllm_dlm.switching.pair import plan_pair
from vllm_dlm.switching.sampling import check_sampling
from vllm_dlm.switching.text import Text, TextRequest


class EntropyRouter:
    """A small and a large model that write one text (arXiv 2502.06833).

    The small one begins. Where the mean entropy of its last tokens reaches `tau` the
    large one goes on, until its own mean is down at `tau`. The text is not that of
    either model: for the large one's own text, faster, use speculative decoding.

    Args:
        small: folder, hub id or alias of the model that begins.
        large: the same, of the model that helps. Both must have one tokenizer.
        tau: entropy at which they change; it depends on the models, so try several.
        window: how many entropies are averaged.
        min_tokens: fewest tokens that a model writes before the other goes on.
        unit: of `tau`: "bits" or "nats".
        small_options: arguments of `vllm.LLM` for the small model's engine.
        large_options: the same for the large one's. Without a memory size
            (`gpu_memory_utilization` or `kv_cache_memory_bytes`) the engines take 25 %
            and 65 %.
        stop_token_id: token by which the engines are told to stop, which no text
            contains. By default an unused id, or a special token for prompts only.

    Raises:
        ValueError: models that do not fit together, or options that are not valid.
    """

    def __init__(
        self,
        small: str,
        large: str,
        *,
        tau: float,
        window: int = 5,
        min_tokens: int = 10,
        unit: Literal["bits", "nats"] = "bits",
        small_options: Mapping[str, Any] | None = None,
        large_options: Mapping[str, Any] | None = None,
        stop_token_id: int | None = None,
    ) -> None:
        self.rule = make_rule(tau=tau, window=window, min_tokens=min_tokens, unit=unit)
        options = {SMALL: small_options or {}, LARGE: large_options or {}}
        pair = plan_pair(
            {SMALL: small, LARGE: large},
            # As `vllm.LLM`: nobody reads the engines' statistics here.
            {
                model: {"disable_log_stats": True, **own}
                for model, own in options.items()
            },
            stop_token_id=stop_token_id,
        )
        self.stop_token_id = pair.stop_token_id
        self.max_model_len = pair.max_model_len
        self.llms: dict[Model, LLM] = {
            model: LLM.from_engine_args(args)
            for model, args in pair.engine_args.items()
        }
        self._engines = {model: llm.llm_engine for model, llm in self.llms.items()}
        self._requests = 0

    def get_tokenizer(self) -> Any:
        """The tokenizer of both models."""
        return self.llms[LARGE].get_tokenizer()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue the prompts, all at once.

        Args:
            prompts: as `vllm.LLM.generate` takes them: a text, its token ids, or a
                list of either.
            sampling_params: for all prompts or one for each; without it the large
                model's defaults. `extra_args` may set `ead_tau`, `ead_window`,
                `ead_min_tokens` and `ead_unit` for a request.
            use_tqdm: show a progress bar.

        Returns:
            One `RequestOutput` for each prompt. Its `outputs` are `PairOutput`s:
            `segments`, `models`, `switches`, `tokens_by_model` and `catch_up_tokens`
            say who wrote what, and what the changes cost.

        Raises:
            VLLMValidationError: parameters that are not valid, or not supported here.
        """
        prompts = prompt_to_seq(prompts)
        if sampling_params is None:
            sampling_params = self.llms[LARGE].get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(sampling_params)} sampling "
                "parameters: give one for all, or one for each"
            )
        requests = [
            self._request(prompt, params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        texts = [
            [Text(request, index) for index in range(request.params.n)]
            for request in requests
        ]
        self._write([text for group in texts for text in group], use_tqdm)
        return [
            request.output(
                [text.output(RequestOutputKind.FINAL_ONLY) for text in group],
                group[0].first,
                finished=True,
            )
            for request, group in zip(requests, texts, strict=True)
        ]

    def chat(
        self,
        messages: list[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, with the large model's chat template.

        Args:
            messages: one conversation (dicts with `role` and `content`), or a list.
            sampling_params: as in `generate`.
            use_tqdm: show a progress bar.
            **template_options: for the tokenizer's `apply_chat_template`.
        """
        options = {"add_generation_prompt": True} | template_options
        tokenizer = self.get_tokenizer()
        prompts = [
            {
                "prompt_token_ids": tokenizer.apply_chat_template(
                    each, tokenize=True, return_dict=False, **options
                )
            }
            for each in conversation_to_seq(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def shutdown(self) -> None:
        """Stop both engines."""
        for engine in self._engines.values():
            engine.engine_core.shutdown()

    def _request(self, prompt: Any, params: SamplingParams) -> TextRequest:
        rule = check_sampling(params, self.rule, self.stop_token_id)
        llm = self.llms[LARGE]
        (rendered,) = llm.renderer.render_cmpl(
            [parse_model_prompt(llm.model_config, prompt)],
            llm.renderer.default_cmpl_tok_params,
        )
        if rendered["type"] != "token":
            raise ValueError("two models share text only: no images, no embeddings")
        self._requests += 1
        return TextRequest(
            request_id=str(self._requests),
            prompt=rendered.get("prompt"),
            prompt_token_ids=rendered["prompt_token_ids"],
            params=params,
            rule=rule,
            stop_token_id=self.stop_token_id,
            max_model_len=self.max_model_len,
            tokenizer=llm.get_tokenizer(),
            cache_salt=rendered.get("cache_salt"),
        )

    def _write(self, texts: Sequence[Text], use_tqdm: bool) -> None:
        """Both engines step by turns until all texts are finished."""
        turns: dict[str, Text] = {}

        def begin_turn(text: Text) -> None:
            # Numbered by turns begun: a finished turn's late outputs find no text.
            self._requests += 1
            request_id = f"{text.request.request_id}-{text.index}-{self._requests}"
            prompt, params = text.next_turn()
            self._engines[text.model].add_request(request_id, prompt, params)
            turns[request_id] = text

        try:
            for text in texts:
                begin_turn(text)
            with tqdm(
                total=len(texts),
                desc="Texts",
                unit="text",
                dynamic_ncols=True,
                disable=not use_tqdm,
            ) as progress:
                while turns:
                    for model in self._ready():
                        engine = self._engines[model]
                        for output in engine.step():
                            text = turns[output.request_id]
                            if not text.add(output):
                                continue
                            del turns[output.request_id]
                            if not output.finished:
                                engine.abort_request([output.request_id])
                            if text.finished:
                                progress.update()
                            else:
                                begin_turn(text)
        finally:
            for engine in self._engines.values():
                engine.abort_request(list(turns))

    def _ready(self) -> list[Model]:
        """Engines to step now: those with outputs, so as not to wait for the others."""
        busy = [
            model
            for model, engine in self._engines.items()
            if engine.has_unfinished_requests()
        ]
        # An engine in this process has no queue, and computes when it is asked.
        queues = [
            getattr(self._engines[model].engine_core, "outputs_queue", None)
            for model in busy
        ]
        ready = [
            model
            for model, queue in zip(busy, queues, strict=True)
            if queue is None or not queue.empty()
        ]
        return ready or busy[:1]
