"""What FLUX.1 and Chroma call their layers, and what diffusers does: for checkpoints and for adapters."""

from __future__ import annotations

from library.key_layout import SWAP_HALVES, KeyMap, Rule, key_map, nested

_DOUBLE = (
    Rule("img_mod.lin", "norm1.linear"),
    Rule("txt_mod.lin", "norm1_context.linear"),
    Rule("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rule("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rule("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    Rule("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    Rule("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    Rule("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    Rule("img_attn.proj", "attn.to_out.0"),
    Rule("txt_attn.proj", "attn.to_add_out"),
    Rule("img_mlp.0", "ff.net.0.proj"),
    Rule("img_mlp.2", "ff.net.2"),
    Rule("txt_mlp.0", "ff_context.net.0.proj"),
    Rule("txt_mlp.2", "ff_context.net.2"),
)


def flux_key_map(mlp_ratio: int = 4) -> KeyMap:
    """Original names of FLUX.1 and Chroma <-> diffusers' FluxTransformer2DModel and ChromaTransformer2DModel."""
    single = (
        Rule("modulation.lin", "norm.linear"),
        Rule("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), widths=(1, 1, 1, mlp_ratio)),
        Rule("linear2", "proj_out"),
        Rule("norm.query_norm.scale", "attn.norm_q.weight"),
        Rule("norm.key_norm.scale", "attn.norm_k.weight"),
    )
    embedders = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
    return key_map(
        Rule("img_in", "x_embedder"),
        Rule("txt_in", "context_embedder"),
        (
            Rule(f"{theirs}.{layer}", f"time_text_embed.{ours}.linear_{number}")
            for theirs, ours in embedders.items()
            for layer, number in (("in_layer", 1), ("out_layer", 2))
        ),
        Rule("distilled_guidance_layer.layers.{i}.in_layer", "distilled_guidance_layer.layers.{i}.linear_1"),
        Rule("distilled_guidance_layer.layers.{i}.out_layer", "distilled_guidance_layer.layers.{i}.linear_2"),
        Rule("distilled_guidance_layer.norms.{i}.scale", "distilled_guidance_layer.norms.{i}.weight"),
        Rule("distilled_guidance_layer.in_proj", "distilled_guidance_layer.in_proj"),
        Rule("distilled_guidance_layer.out_proj", "distilled_guidance_layer.out_proj"),
        nested("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE),
        nested("single_blocks.{i}", "single_transformer_blocks.{i}", single),
        Rule("final_layer.linear", "proj_out"),
        Rule("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP_HALVES),
    )


FLUX_DIFFUSERS = flux_key_map()
"""The table of every published model; theirs is the original, ours the diffusers folder."""
