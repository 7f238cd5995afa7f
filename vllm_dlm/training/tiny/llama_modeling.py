# SPDX-License-Identifier: Apache-2.0
"""A small Llama in plain PyTorch whose layers can all be read out.

The network is `llada_modeling.LLaDAModel` under a causal mask; only the tensor names of
the exported folder differ. Reading a layer out means: the final norm and the head on
what that layer hands on, as LayerSkip (arXiv 2404.16710) and DEL (arXiv 2504.05598) do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_dlm.files.model_folders import Config, check_room, check_weights, read_weights
from vllm_dlm.model_executor.models.names import LLADA_NAMES
from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.tiny.export import decoder_config, write_folder
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape


class LlamaModel(nn.Module):
    """A causal language model; `forward` gives what every layer hands on."""

    causal: Tensor

    def __init__(self, shape: LLaDAShape) -> None:
        super().__init__()
        self.shape = shape
        self.network = LLaDAModel(shape)
        length = shape.max_sequence_length
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        self.register_buffer("causal", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states [layers, rows, length, d_model] of token ids [rows, length].

        Rows are left-aligned; what follows a row's tokens does not change them.
        """
        length = input_ids.shape[1]
        mask = self.causal[:length, :length]
        return torch.stack(self.network.hidden_states(input_ids, mask))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of what a layer hands on [..., d_model]."""
        return self.network.head(hidden)


@torch.inference_mode()
def decode_greedy(
    model: LlamaModel, prompts: list[list[int]], *, max_tokens: int, exit_layer: int
) -> list[list[int]]:
    """`max_tokens` token ids for each prompt, read out after `exit_layer` layers.

    Decoding stops early when every row has its <|endoftext|>.
    """
    ends = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.arange(len(prompts))
    ids = torch.zeros(len(prompts), int(ends.max()) + max_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for count in range(max_tokens):
        hidden = model(ids[:, : int(ends.max()) + count])[exit_layer - 1]
        tokens = model.head(hidden[rows, ends + count - 1]).argmax(-1)
        ids[rows, ends + count] = tokens
        finished |= tokens == tokenizer.EOS_ID
        if finished.all():
            break
    columns = ends[:, None] + torch.arange(max_tokens)
    return ids.gather(1, columns).tolist()


def answer_greedy(
    model: LlamaModel, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy answers of the last layer, each up to its end."""
    last = model.shape.n_layers
    end = tokenizer.EOS_ID
    answers = []
    for first in range(0, len(prompts), 64):
        answers += decode_greedy(
            model, prompts[first : first + 64], max_tokens=max_tokens, exit_layer=last
        )
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


def export_llama(model: LlamaModel, output_dir: str | Path) -> None:
    """Write the model as a Hugging Face folder of a `LlamaForCausalLM`."""
    names = _llama_names(model)
    tensors = {
        names[name]: tensor for name, tensor in model.network.state_dict().items()
    }
    write_folder(output_dir, tensors, make_llama_config(model.shape))


def load_llama(model_dir: str | Path) -> LlamaModel:
    """Load a folder that `export_llama` has written.

    Raises:
        ValueError: its files are missing, or do not fit together.
    """
    config = Config(model_dir)
    shape = LLaDAShape(
        vocab_size=config.size("vocab_size"),
        d_model=config.size("hidden_size"),
        n_layers=config.layers("num_hidden_layers"),
        n_heads=config.size("num_attention_heads"),
        mlp_hidden_size=config.size("intermediate_size"),
        rope_theta=config.number("rope_theta"),
        rms_norm_eps=config.number("rms_norm_eps"),
        max_sequence_length=config.size("max_position_embeddings"),
    )
    file = Path(model_dir) / "model.safetensors"
    tensors = read_weights(file)
    check_room(shape.num_parameters, tensors, config)
    model = LlamaModel(shape)
    ours = {
        name: tensors[theirs]
        for name, theirs in _llama_names(model).items()
        if theirs in tensors
    }
    check_weights(ours, model.network, file)
    model.network.load_state_dict(ours)
    return model.eval()


def make_llama_config(shape: LLaDAShape) -> dict[str, object]:
    """config.json of a `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
        **decoder_config(shape),
    }


def _llama_names(model: LlamaModel) -> dict[str, str]:
    """Each tensor of the network -> its name in a `LlamaForCausalLM`."""
    modules = LLADA_NAMES.modules(model.shape.n_layers)
    return {f"{ours}.weight": f"{llamas}.weight" for ours, llamas in modules.items()}
