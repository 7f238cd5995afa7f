# SPDX-License-Identifier: Apache-2.0
"""Block tables, slot mappings and the pages they name; runs of values into rows."""

from typing import Any

import numba
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_dlm.kernels.numba_jit import jit

_jit = jit()

_NONE = np.empty(0, dtype=np.int32)


@intrinsic
def _as_pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


def _apply_write_kernel(
    output_ptr: torch.Tensor,
    output_stride: torch.Tensor | int,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Write runs of values into rows: `output[index, start : start + len] = run`.

    Args:
        output_ptr: `[rows]` or `[rows, width]`; with MULTI_GROUP uint64 `[groups]`,
            the addresses of int32 tables.
        output_stride: row stride; with MULTI_GROUP int64 `[groups]`.
        write_indices_ptr, write_starts_ptr: int32 `[writes]`.
        write_contents_ptr: the runs, one after another.
        write_cu_lens_ptr: int32 `[writes]`, ends of the runs.
        write_group_ids_ptr: int32 `[writes]`, with MULTI_GROUP only.
    """
    indices = write_indices_ptr.numpy()
    starts = write_starts_ptr.numpy()
    contents = write_contents_ptr.numpy()
    ends = write_cu_lens_ptr.numpy()
    if MULTI_GROUP:
        assert isinstance(output_stride, torch.Tensor)
        assert write_group_ids_ptr is not None
        _apply_write_groups(
            output_ptr.numpy(),
            output_stride.numpy(),
            indices,
            starts,
            contents,
            ends,
            write_group_ids_ptr.numpy(),
        )
    else:
        # view, not reshape: a copy would swallow the writes.
        output = output_ptr.view(-1).numpy()
        _apply_write(output, output_stride, indices, starts, contents, ends)


@_jit
def _apply_write(output, stride, indices, starts, contents, ends):  # type: ignore[no-untyped-def]
    begin = 0
    for write in range(indices.shape[0]):
        base = np.int64(indices[write]) * stride + starts[write] - begin
        for i in range(begin, ends[write]):
            output[base + i] = contents[i]
        begin = ends[write]


@_jit
def _apply_write_groups(addresses, strides, indices, starts, contents, ends, groups):  # type: ignore[no-untyped-def]
    begin = 0
    for write in range(indices.shape[0]):
        group = groups[write]
        base = np.int64(indices[write]) * strides[group] + starts[write]
        length = ends[write] - begin
        output = numba.carray(_as_pointer(addresses[group]), (base + length,), np.int32)
        for i in range(length):
            output[base + i] = contents[begin + i]
        begin = ends[write]


def _gather_block_tables_kernel(
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    num_computed_tokens_ptr: torch.Tensor | None = None,
    sliding_window_reach_ptr: torch.Tensor | None = None,
    block_sizes_ptr: torch.Tensor | None = None,
    MASK_SLIDING_WINDOW: bool = False,
    BLOCK_SIZE: int = 1024,
) -> None:
    """Copy the block-table rows of the batch's requests to the front, per KV group.

    vLLM 0.33 launches it for more rows than there are requests, and expects zeros in
    those that a larger batch has left; how many there are, only the grid says. Its
    targets have room for all requests, so every row behind the batch is zeroed. In
    vLLM 0.32 there are such rows under CUDA graphs only.

    Args:
        batch_idx_to_req_idx: `[num_reqs]`.
        src_block_table_ptrs, dst_block_table_ptrs: uint64 `[groups]`, addresses of
            int32 `[max_num_reqs, stride]`.
        block_table_strides: int64 `[groups]`.
        num_blocks_ptr: int32 `[groups, max_num_reqs]`, used blocks of each row.
        num_computed_tokens_ptr: int32 `[max_num_reqs]`, since 0.33, as what follows.
        sliding_window_reach_ptr: int32 `[groups]`, how many tokens before a request's
            first scheduled one are still read; 0 for all.
        block_sizes_ptr: int32 `[groups]`.
        MASK_SLIDING_WINDOW: whether blocks that lie wholly before these get the
            null block, 0.
    """
    if (
        num_computed_tokens_ptr is None
        or sliding_window_reach_ptr is None
        or block_sizes_ptr is None
    ):
        computed, reach, block_sizes = _NONE, _NONE, _NONE
        num_rows = num_reqs
    else:
        computed = num_computed_tokens_ptr.numpy()
        reach = sliding_window_reach_ptr.numpy()
        block_sizes = block_sizes_ptr.numpy()
        num_rows = num_blocks_ptr.shape[1]
    _gather_block_tables(
        batch_idx_to_req_idx.numpy(),
        src_block_table_ptrs.numpy(),
        dst_block_table_ptrs.numpy(),
        block_table_strides.numpy(),
        num_blocks_ptr.numpy(),
        num_rows,
        MASK_SLIDING_WINDOW,
        computed,
        reach,
        block_sizes,
    )


@_jit
def _gather_block_tables(  # type: ignore[no-untyped-def]
    slots,
    sources,
    targets,
    strides,
    num_blocks,
    num_rows,
    masked,
    computed,
    reach,
    block_sizes,
):
    for group in range(strides.shape[0]):
        stride = strides[group]
        source = numba.carray(
            _as_pointer(sources[group]), (num_blocks.shape[1], stride), np.int32
        )
        target = numba.carray(_as_pointer(targets[group]), (num_rows, stride), np.int32)
        for row in range(slots.shape[0]):
            slot = slots[row]
            null = 0
            if masked and reach[group] > 0:
                null = max(computed[slot] - reach[group], 0) // block_sizes[group]
            for i in range(num_blocks[group, slot]):
                target[row, i] = 0 if i < null else source[slot, i]
        target[slots.shape[0] :] = 0


def _compute_slot_mappings_kernel(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    dcp_sharded: torch.Tensor,
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Turn token positions into KV-cache slots, per KV group.

    Args:
        max_num_tokens: width of `slot_mappings_ptr`; the unused tail gets PAD_ID.
        idx_mapping: `[num_reqs]`, -1 for a row that owns no blocks.
        query_start_loc: int32 `[num_reqs + 1]`.
        pos: int64 `[tokens]`.
        block_table_ptrs: uint64 `[groups]`; block_table_strides: int64 `[groups]`.
        block_sizes: int32 `[groups]`; slot_mapping_enabled: bool `[groups]`.
        slot_mappings_ptr: int64 `[groups, max_num_tokens]`.

    Raises:
        NotImplementedError: context parallelism, which vLLM has no CPU path for.
    """
    if CP_SIZE != 1:
        raise NotImplementedError("context parallelism is not supported on CPU")
    _compute_slot_mappings(
        idx_mapping.numpy(),
        query_start_loc.numpy(),
        pos.numpy(),
        block_table_ptrs.numpy(),
        block_table_strides.numpy(),
        block_sizes.numpy(),
        slot_mapping_enabled.numpy(),
        slot_mappings_ptr.numpy(),
        PAD_ID,
    )


@_jit
def _compute_slot_mappings(  # type: ignore[no-untyped-def]
    slots,
    query_starts,
    positions,
    tables,
    strides,
    block_sizes,
    enabled,
    mappings,
    pad,
):
    num_reqs = slots.shape[0]
    for group in range(block_sizes.shape[0]):
        stride = strides[group]
        block_size = np.int64(block_sizes[group])
        for row in range(num_reqs):
            slot = slots[row]
            begin, end = query_starts[row], query_starts[row + 1]
            if slot < 0 or not enabled[group]:
                mappings[group, begin:end] = pad
                continue
            table = numba.carray(
                _as_pointer(tables[group]), (slot + 1, stride), np.int32
            )
            for token in range(begin, end):
                position = positions[token]
                block = np.int64(table[slot, position // block_size])
                mappings[group, token] = block * block_size + position % block_size
        mappings[group, query_starts[num_reqs] :] = pad


def _zero_kv_blocks_kernel(
    seg_addrs_ptr: torch.Tensor,
    seg_block_strides_ptr: torch.Tensor,
    seg_page_sizes_ptr: torch.Tensor,
    block_ids_ptr: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Zero newly allocated KV-cache blocks, in units of four bytes.

    Args:
        seg_addrs_ptr: uint64 `[segments]`, addresses.
        seg_block_strides_ptr, seg_page_sizes_ptr: int64 `[segments]`.
        block_ids_ptr: int64 `[blocks]`.
    """
    _zero_kv_blocks(
        seg_addrs_ptr.numpy(),
        seg_block_strides_ptr.numpy(),
        seg_page_sizes_ptr.numpy(),
        block_ids_ptr.numpy(),
    )


@_jit
def _zero_kv_blocks(addresses, strides, page_sizes, block_ids):  # type: ignore[no-untyped-def]
    for segment in range(addresses.shape[0]):
        for block in block_ids:
            offset = np.uint64(block * strides[segment] * 4)
            page = numba.carray(
                _as_pointer(addresses[segment] + offset),
                (page_sizes[segment],),
                np.int32,
            )
            page[:] = 0
