# SPDX-License-Identifier: Apache-2.0
"""Model runner V2's Triton kernels for a CPU without Triton.

Each function stands in for the kernel of the same name in `vllm.v1.worker`: same
parameters in the same order, called once per launch instead of once per program.
Those that not every supported vLLM has are optional (`fitting.py`).
vLLM's dispatcher drops the grid, so it is read off the shapes. Loops run in numba;
the few kernels over the vocabulary are torch. Source: vLLM 0.32 and 0.33.
"""

import contextlib
import functools
from collections.abc import Callable

from vllm_dlm.kernels.runner_cpu.block_table import (
    _apply_write_kernel,
    _compute_slot_mappings_kernel,
    _gather_block_tables_kernel,
    _zero_kv_blocks_kernel,
)
from vllm_dlm.kernels.runner_cpu.constraints import (
    _bad_words_kernel,
    _bias_kernel,
    _bincount_kernel,
    _min_p_kernel,
    _penalties_kernel,
    _temperature_kernel,
)
from vllm_dlm.kernels.runner_cpu.fitting import (
    FittedKernels,
    kernel_parameters,
    refusal,
)
from vllm_dlm.kernels.runner_cpu.gumbel import _gumbel_sample_kernel
from vllm_dlm.kernels.runner_cpu.input_batch import (
    _combine_sampled_and_draft_tokens_kernel,
    _expand_idx_mapping_kernel,
    _get_num_sampled_and_rejected_kernel,
    _post_update_kernel,
    _post_update_num_computed_tokens_kernel,
    _prepare_pos_seq_lens_kernel,
    _prepare_prefill_inputs_kernel,
)
from vllm_dlm.kernels.runner_cpu.verification import (
    _compute_local_logits_stats_kernel,
    _flatten_sampled_kernel,
    _gather_draft_sampled_kernel,
    _insert_resampled_kernel,
    _rejection_kernel,
    _resample_kernel,
)
from vllm_dlm.kernels.runner_cpu.vocabulary import (
    _apply_grammar_bitmask_kernel,
    _fill_logprob_token_ids_kernel,
    _num_nans_kernel,
    _prompt_logprobs_token_ids_kernel,
    _ranks_kernel,
    _topk_log_softmax_kernel,
)

_BY_MODULE: dict[str, tuple[Callable[..., None], ...]] = {
    "utils": (_zero_kv_blocks_kernel,),
    "gpu.buffer_utils": (_apply_write_kernel,),
    "gpu.block_table": (
        _gather_block_tables_kernel,
        _compute_slot_mappings_kernel,
    ),
    "gpu.input_batch": (
        _prepare_prefill_inputs_kernel,
        _prepare_pos_seq_lens_kernel,
        _combine_sampled_and_draft_tokens_kernel,
        _expand_idx_mapping_kernel,
        _get_num_sampled_and_rejected_kernel,
        _post_update_kernel,
        _post_update_num_computed_tokens_kernel,
    ),
    "gpu.metrics.logits": (_num_nans_kernel,),
    "gpu.sample.bad_words": (_bad_words_kernel,),
    "gpu.sample.gumbel": (_gumbel_sample_kernel, _temperature_kernel),
    "gpu.sample.logit_bias": (_bias_kernel,),
    "gpu.sample.logprob": (
        _topk_log_softmax_kernel,
        _ranks_kernel,
        _fill_logprob_token_ids_kernel,
    ),
    "gpu.sample.min_p": (_min_p_kernel,),
    "gpu.sample.penalties": (_bincount_kernel, _penalties_kernel),
    "gpu.sample.prompt_logprob": (_prompt_logprobs_token_ids_kernel,),
    "gpu.spec_decode.rejection_sampler": (
        _flatten_sampled_kernel,
        _gather_draft_sampled_kernel,
    ),
    "gpu.spec_decode.rejection_sampler_utils": (
        _compute_local_logits_stats_kernel,
        _insert_resampled_kernel,
        _rejection_kernel,
        _resample_kernel,
    ),
    "gpu.structured_outputs": (_apply_grammar_bitmask_kernel,),
}

KERNELS = FittedKernels(
    {
        f"vllm.v1.worker.{module}.{kernel.__name__}": kernel
        for module, kernels in _BY_MODULE.items()
        for kernel in kernels
    }
)


@functools.cache
def register() -> None:
    """Route vLLM's launches to `KERNELS`, once per process; not where Triton works.

    Autoregressive models launch few of them or none. So what does not fit this vLLM
    is said in the log, and ends the engine only when it is launched.
    """
    from vllm.logger import init_logger
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import register_kernels

    if HAS_TRITON:
        return
    problems = KERNELS.problems()
    for problem in problems.values():
        init_logger(__name__).warning("%s", problem)
    kernels = {name: KERNELS[name] for name in KERNELS if name not in problems}
    for name, problem in problems.items():
        with contextlib.suppress(RuntimeError):  # no such kernel: nothing launches it
            kernel_parameters(name)
            kernels[name] = refusal(problem)
    register_kernels(kernels)
