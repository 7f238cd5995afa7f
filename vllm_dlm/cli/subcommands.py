# SPDX-License-Identifier: Apache-2.0
"""What `vllm-dlm` can do beside showing lists: a line for each subcommand.

Modules are named, not imported: most load torch, and are needed only when chosen.
"""

from __future__ import annotations

TRAINABLE = {
    "llada-tiny": ("vllm_dlm.training.tiny.llada_tiny", "the built-in diffusion model"),
    "llada-tiny-t2t": (
        "vllm_dlm.training.tiny.llada_tiny_t2t",
        "llada-tiny further, to edit what it has written (strategy joint)",
    ),
    "llada-forms": (
        "vllm_dlm.training.tiny.llada_forms",
        "the built-in diffusion model for JSON, forms and tools",
    ),
    "sdar-tiny": (
        "vllm_dlm.training.tiny.sdar_tiny",
        "the built-in diffusion model that is block-causal",
    ),
    "llama-tiny": (
        "vllm_dlm.training.tiny.llama_tiny",
        "the built-in autoregressive model, for speculative decoding",
    ),
    "llama-tiny-draft": (
        "vllm_dlm.training.tiny.llama_tiny_draft",
        "the built-in draft model of llama-tiny",
    ),
    "deer": (
        "vllm_dlm.training.drafters.deer",
        "a diffusion drafter for an autoregressive model (method deer)",
    ),
    "specdec-head": (
        "vllm_dlm.training.drafters.specdec_head",
        "the acceptance head of a draft model (method specdec++)",
    ),
    "lud": (
        "vllm_dlm.training.drafters.lud",
        "an autoregressive model to draft for itself behind pads (method lud)",
    ),
    "layer-skip": (
        "vllm_dlm.training.layer_skip",
        "an autoregressive model to do without some of its layers",
    ),
    "steer-mu": (
        "vllm_dlm.training.steer_mu",
        "the constant by which a base steers what was tuned from it (SVDecode)",
    ),
    "certainty": (
        "vllm_dlm.training.recipes.certainty",
        "a diffusion model to be sure early, for the strategy entropy (dParallel)",
    ),
    "d3llm": (
        "vllm_dlm.training.recipes.d3llm",
        "the same on states of the model's own trajectories (d3LLM)",
    ),
    "dscd": (
        "vllm_dlm.training.recipes.dscd",
        "a diffusion model to predict from many masks as from few (CD4LM)",
    ),
    "sft": (
        "vllm_dlm.training.recipes.sft",
        "a diffusion model on answers of your own (the objective of LLaDA)",
    ),
    "cj-grpo": (
        "vllm_dlm.training.recipes.cj_grpo",
        "a diffusion model by rewards, on the canvases that it visited (CJ-GRPO)",
    ),
    "coupled-grpo": (
        "vllm_dlm.training.recipes.coupled_grpo",
        "a diffusion model by rewards, with three forwards an update (DiffuCoder, d1)",
    ),
    "tracerl": (
        "vllm_dlm.training.recipes.trace_rl",
        "a diffusion model by rewards, along its trajectories (TraceRL)",
    ),
    "t2t": (
        "vllm_dlm.training.recipes.t2t",
        "a diffusion model to correct what it has written (strategy joint)",
    ),
    "block-size": (
        "vllm_dlm.training.recipes.block_size",
        "a block-causal model for longer blocks (TDAR's extension of SDAR)",
    ),
}
"""What `vllm-dlm train` trains -> module with `add_arguments` and `run`, and a
summary."""

TOOLS = {
    "answers": (
        "vllm_dlm.training.answers",
        "record a model's own answers, to train it on",
    ),
    "bench": (
        "vllm_dlm.bench.command",
        "measure speed and accuracy, and compare with other engines",
    ),
    "chat": (
        "vllm_dlm.watching.chat",
        "chat in the terminal, and watch the answer's canvas fill",
    ),
    "count-tokens": (
        "vllm_dlm.training.counts.token_counts",
        "count how often tokens occur in texts, for the strategy pc",
    ),
    "count-trigrams": (
        "vllm_dlm.training.counts.trigrams",
        "count the tri-grams of texts, for speculative decoding by ADED",
    ),
    "eval": (
        "vllm_dlm.evaluation.command",
        "ask tasks: accuracy, tokens per forward, speed, by strategy and cache",
    ),
    "search": (
        "vllm_dlm.search.command",
        "search for better answers: best of n, votes, trees, particles, look-ahead",
    ),
    "serve-pair": (
        "vllm_dlm.switching.serve_pair",
        "serve two models that write one text together",
    ),
    "traces": (
        "vllm_dlm.learn2pd.collect",
        "record what a model decides, to train a filter on",
    ),
    "train-filter": (
        "vllm_dlm.learn2pd.train",
        "train the learned filter of the strategy learn2pd",
    ),
    "watch": (
        "vllm_dlm.watching.watch",
        "show on a page how a server's canvases fill",
    ),
}
"""Further subcommands -> module with `add_arguments` and `run`, and a summary."""
