"""What Lumina-Image-2.0 calls its layers, and what diffusers does: for checkpoints and for adapters."""

from __future__ import annotations

from library.key_layout import KeyMap, Rule, key_map, nested

_FEED_FORWARD = tuple(Rule(f"feed_forward.w{number}", f"feed_forward.linear_{number}") for number in (1, 2, 3))
_NORMS = (
    Rule("attention.q_norm", "attn.norm_q"),
    Rule("attention.k_norm", "attn.norm_k"),
    Rule("attention_norm2", "norm2"),
    Rule("ffn_norm1", "ffn_norm1"),
    Rule("ffn_norm2", "ffn_norm2"),
)


def lumina_key_map(heads_per_key: int = 3) -> KeyMap:
    """Original names <-> diffusers' Lumina2Transformer2DModel. heads_per_key: how many heads share a key."""
    shared = (
        Rule("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), widths=(heads_per_key, 1, 1)),
        Rule("attention.out", "attn.to_out.0"),
        *_FEED_FORWARD,
        *_NORMS,
    )
    modulated = (Rule("attention_norm1", "norm1.norm"), Rule("adaLN_modulation.1", "norm1.linear"), *shared)
    return key_map(
        Rule("x_embedder", "x_embedder"),
        Rule("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
        Rule("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
        Rule("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
        Rule("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
        nested("context_refiner.{i}", "context_refiner.{i}", (Rule("attention_norm1", "norm1"), *shared)),
        nested("noise_refiner.{i}", "noise_refiner.{i}", modulated),
        nested("layers.{i}", "layers.{i}", modulated),
        Rule("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
        Rule("final_layer.linear", "norm_out.linear_2"),
    )


LUMINA_DIFFUSERS = lumina_key_map()
"""The table of every published model; theirs is the original, ours the diffusers folder."""
