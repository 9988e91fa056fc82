"""What Stable Diffusion 3 calls its layers, and what diffusers does: for checkpoints and for adapters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from torch import Tensor

from library.key_layout import SWAP_HALVES, KeyMap, Op, Rule, key_map, nested

HEAD_WIDTH = 64
"""Of every published model, which are as many heads wide as they have blocks."""
MAX_BLOCKS = 64

_X = (
    Rule("attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rule("attn.ln_q", "attn.norm_q"),
    Rule("attn.ln_k", "attn.norm_k"),
    Rule("attn.proj", "attn.to_out.0"),
    Rule("attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    Rule("attn2.ln_q", "attn2.norm_q"),
    Rule("attn2.ln_k", "attn2.norm_k"),
    Rule("attn2.proj", "attn2.to_out.0"),
    Rule("mlp.fc1", "ff.net.0.proj"),
    Rule("mlp.fc2", "ff.net.2"),
    Rule("adaLN_modulation.1", "norm1.linear"),
)
_CONTEXT = (
    Rule("attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rule("attn.ln_q", "attn.norm_added_q"),
    Rule("attn.ln_k", "attn.norm_added_k"),
    Rule("attn.proj", "attn.to_add_out"),
    Rule("mlp.fc1", "ff_context.net.0.proj"),
    Rule("mlp.fc2", "ff_context.net.2"),
)
_BLOCK, _THEIRS = "joint_blocks.{i}", "transformer_blocks.{i}"
_CONTEXT_MODULATION = "context_block.adaLN_modulation.1", "norm1_context.linear"


def _modulation(number: int | str, op: Op | None = None) -> Rule:
    """Of the text in block `number`. The last block's is shift and scale, which diffusers has the other way round."""
    ours, theirs = _CONTEXT_MODULATION
    own = Rule(f"joint_blocks.{number}.{ours}", f"transformer_blocks.{number}.{theirs}")
    return own if op is None else Rule(own.theirs, own.ours, op)


def _swap_of(rows: int) -> Op:
    """Halves swapped where there are `rows` rows, and nothing changed where there are others."""

    def change(tensor: Tensor) -> Tensor:
        return SWAP_HALVES.to_ours(tensor) if tensor.shape[0] == rows else tensor

    return Op(f"swap halves of {rows}", change, change)


def _modulations() -> Iterator[Rule]:
    """Of any model whose width is 64 for each of its blocks: that of block i is the last one's if it has 2 * 64 * (i + 1) rows.
    Those of others have three times as many as the last one's, so none is taken for it."""
    return (_modulation(number, _swap_of(2 * HEAD_WIDTH * (number + 1))) for number in range(MAX_BLOCKS))


@lru_cache(maxsize=8)
def sd3_key_map(num_blocks: int | None = None) -> KeyMap:
    """Original names <-> diffusers' SD3Transformer2DModel. num_blocks: None for adapters of any published model."""
    modulations = list(_modulations()) if num_blocks is None else [_modulation(num_blocks - 1, SWAP_HALVES), _modulation("{i}")]
    embedders = {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}
    return key_map(
        Rule("pos_embed", "pos_embed.pos_embed"),
        Rule("x_embedder.proj", "pos_embed.proj"),
        Rule("context_embedder", "context_embedder"),
        (
            Rule(f"{theirs}.mlp.{layer}", f"time_text_embed.{ours}.linear_{number}")
            for theirs, ours in embedders.items()
            for layer, number in ((0, 1), (2, 2))
        ),
        nested(f"{_BLOCK}.x_block", _THEIRS, _X),
        nested(f"{_BLOCK}.context_block", _THEIRS, _CONTEXT),
        Rule("final_layer.linear", "proj_out"),
        Rule("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP_HALVES),
        modulations,
    )


SD3_LAYERS = sd3_key_map()
"""The table of adapters."""
