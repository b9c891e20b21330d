"""Options under which a kind's laws are checked besides its defaults. A kind without an entry has its defaults."""

VARIANTS: dict[str, list[dict]] = {
    "gqa": [
        {},
        {"heads": 4, "kv_heads": 1, "head_dim": 6, "window": 8, "sinks": 2},
        {"heads": 4, "kv_heads": 2, "position": {"kind": "alibi"}, "bias": True, "qk_norm": "rms", "gate": True},
        {
            "heads": 2,
            "softcap": 5.0,
            "window": 5,
            "position": {"kind": "rotary", "layout": "interleaved", "fraction": 0.5},
        },
        {
            "heads": 2,
            "qk_norm": "layer",
            "out_bias": True,
            "position": {"kind": "rotary", "scaling": {"kind": "yarn", "factor": 4.0, "original_context": 16}},
        },
        {"heads": 2, "causal": False, "position": None},
    ],
    "moe": [
        {},
        {
            "experts": 5,
            "top_k": 1,
            "router": "sinkhorn",
            "expert": {"kind": "mlp", "bias": True},
            "out_bias": True,
            "shared_experts": 2,
            "shared_hidden": 5,
            "shared_gate": True,
            "router_z": 0.1,
        },
        {
            "experts": 6,
            "router": {"kind": "top_k", "order": "top_k_then_softmax", "groups": 3, "top_groups": 2, "scale": 2.5},
        },
        {"experts": 6, "router": {"kind": "loss_free", "groups": 3, "top_groups": 2, "scale": 2.5}},
        {"experts": 4, "router": {"kind": "smoe_dropout", "eval_top_k": 3}, "load_balance": 0.0},
        {"experts": 5, "top_k": 1, "router": {"kind": "stable", "rank": 3}},
        {"experts": 5, "top_k": 1, "router": "base"},
        {"experts": 5, "router": "expert_choice"},
        {"experts": 4, "router": "unweighted", "expert": {"kind": "mpo", "bond": 4}, "load_balance": 0.0},
    ],
    "mlp": [{}, {"activation": "relu2", "bias": True}],
    "mamba": [
        {},
        {"state_size": 5, "conv_width": 2, "inner_norm": True, "bias": True},
        {"conv_width": 1, "inner_norm": "weightless"},
    ],
    "hyena": [
        {},
        {"order": 3, "length": 20, "conv_width": 1, "filter_width": 8, "filter_layers": 0, "bands": 1, "window": None},
    ],
    "hyena_modal": [{}, {"order": 3, "modes": 3, "conv_width": 2}],
    "bst": [
        {"block": 8, "ssm": {"kind": "s4d", "state_size": 4}},
        {
            "mode": "mh",
            "block": 5,
            "heads": 2,
            "ssm": {"kind": "s4d", "state_size": 4, "skip": False},
            "position": {"kind": "alibi"},
        },
        {"mode": "mf", "block": 6, "heads": 2, "states": 3, "ssm": {"kind": "s4d", "state_size": 4}, "position": None},
    ],
    "dense_mamba": [
        {"layers": 3, "state_size": 3, "projection": "linear"},
        {"layers": 2, "state_size": 3, "fusion": "concat", "conv_width": 2, "bias": True, "gate_rank": 5},
    ],
    "mamba2": [
        {"state_size": 16},
        {
            "state_size": 5,
            "head_dim": 6,
            "groups": 2,
            "conv_width": 2,
            "dt_limit": [0.002, 0.05],
            "norm_before_gate": True,
            "norm_groups": 4,
            "bias": True,
            "conv_bias": False,
        },
    ],
    "mamba3": [
        {"state_size": 8},
        {"state_size": 7, "head_dim": 12, "groups": 2, "rank": 2, "rope_fraction": 1.0, "out_norm": True},
    ],
    "linformer": [
        {},
        {"sharing": "layerwise", "layers": 2, "hidden": 30, "projected": 5},
        {"sharing": "none", "projection": "conv", "length": 1504, "projected": 188},
        {"projection": "max", "length": 1504, "projected": 188, "layers": 1, "norm_position": "pre"},
    ],
    "flurka": [
        {},
        {"heads": 3, "sharing": "none", "projected": 9, "feature_map": "favor", "features": 20},
    ],
    "low_rank_transformer": [
        {},
        {"heads": 3, "rank": 5, "hidden": 30, "norm_position": "pre", "bias": True, "activation": "gelu"},
        {"heads": 2, "causal": False, "position": None},
    ],
    "luna": [
        {},
        {"layers": 2, "heads": 1, "length": 5, "hidden": 20, "pack_activation": "elu", "tied": False, "position": None},
        {"layers": 2, "heads": 2, "causal": False},
        {"heads": 2, "length": 3, "tied": False, "causal": False, "position": None, "activation": "gelu"},
    ],
    "set_transformer": [
        {},
        {"inducing": 5, "heads": 2, "norm": None, "form": "authors"},
    ],
    "mla": [
        {},
        {
            "heads": 2,
            "kv_rank": 9,
            "q_rank": 7,
            "nope_dim": 5,
            "rope_dim": 6,
            "value_dim": 3,
            "bias": True,
            "position": {
                "kind": "rotary",
                "scaling": {
                    "kind": "yarn",
                    "factor": 8.0,
                    "original_context": 16,
                    "mscale": 0.7,
                    "mscale_all_dim": 1.0,
                },
            },
        },
        {"kv_rank": 3, "position": None},  # so small a latent that all calls are absorbed
        {"q_rank": 10, "causal": False},
    ],
    "funnel": [
        {},
        {"blocks": [1, "1x2"], "decoder_layers": 1, "heads": 4, "pooling": {"kind": "max", "q_only": False}},
        {"blocks": [1, 1, 1], "decoder_layers": 1, "pooling": {"cls": "truncate"}, "token_types": True, "hidden": 30},
        {"blocks": [1, 1], "decoder_layers": 0, "pooling": {"cls": "separate"}, "position": None, "activation": "relu"},
    ],
    "linear_attention": [
        {},
        {"heads": 2, "feature_map": "taylor", "position": {"kind": "rotary"}, "bias": True},
        {"feature_map": "softmax", "bias": True, "causal": False},
    ],
    "performer": [
        {},
        {"heads": 2, "features": 20, "hyperbolic": True, "position": {"kind": "rotary"}, "bias": True},
        {"orthogonal": False, "bias": True, "causal": False},
    ],
    "rfa": [
        {},
        {"heads": 2, "features": 10, "gate": True, "position": {"kind": "rotary"}, "bias": True},
        {"bias": True, "causal": False},
    ],
    "polysketch": [
        {},
        {"heads": 2, "block": 4, "degree": 6, "sketch_size": 5},
        {"heads": 2, "block": 7, "sketch": "learned", "sketch_size": 6, "position": None},
        {"block": 5, "causal": False},
    ],
    "sparse": [
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 6,
            "pattern": {"kind": "longformer", "window": 4, "dilation": [1, 2, 3, 1], "global_tokens": 2},
        },
        {"heads": 3, "pattern": {"kind": "fixed", "stride": 7, "summaries": 2}},
        {"heads": 2, "pattern": {"kind": "bigbird", "block": 4, "random": 2}, "position": None},
        {"heads": 2, "kv_heads": 1, "pattern": {"kind": "streaming", "window": 6, "sinks": 2}},
        {
            "heads": 2,
            "pattern": {"kind": "longformer", "window": 6, "global_tokens": 2},
            "bias": True,
            "global_projections": True,
            "causal": False,
        },
    ],
    "s4d": [
        {"state_size": 4},
        {"state_size": 6, "init": "legs", "discretisation": "bilinear", "gated": False, "activation": "silu"},
    ],
    "h3": [
        {"state_size": 4, "shift_size": 6},
        {"head_dim": 3, "state_size": 6, "shift_size": 1, "init": "legs", "discretisation": "zoh"},
    ],
    "bigs": [{"state_size": 8}, {"expand": 2, "state_size": 5, "init": "inv", "activation": "gelu_tanh"}],
    "s4": [{"state_size": 8}],
    "lssl": [
        {"state_size": 7},
        {"state_size": 5, "measure": "lagt", "outputs": 3, "fixed": True, "gated": True, "learning_rate": None},
    ],
    "liquid_s4": [{"state_size": 8}, {"state_size": 6, "degree": 3, "kernel": "kb", "gated": False}],
    "s5": [
        {"state_size": 16, "blocks": 2},
        {"state_size": 6, "blocks": 1, "discretisation": "bilinear", "gate": "full", "clip": False},
    ],
    "gss": [{"state_size": 16}, {"state_size": 5, "hidden": 20, "reduced": 7, "bias": True, "activation": "silu"}],
    "gated_conv": [{}, {"conv_width": 5, "bias": True}],
    "dss": [
        {"state_size": 3, "length": 20},  # shorter than the laws' sequences
        {"state_size": 4, "parametrisation": "exp", "separate_steps": True, "gated": True},
    ],
    "rg_lru": [{}, {"inner": 30, "heads": 5, "conv_width": 1, "c": 2.0, "decay_min": 0.2, "bias": False}],
    "retnet": [
        {},
        {"heads": 3, "key_dim": 12, "value_dim": 36, "decay": "linspace", "position": None}
        | {"norm": "rms", "norm_affine": True},
    ],
    "gla": [{}, {"heads": 3, "key_dim": 6, "value_dim": 15, "gate_rank": 2, "temperature": 1.0}],
    "hgrn2": [{}, {"head_dim": 4, "layer": 2, "layers": 6}],
    "delta_net": [{"heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_width": 2, "negative_eigenvalues": True}],
    "gated_delta_net": [{}, {"heads": 4, "key_heads": 2, "head_dim": 5, "value_head_dim": 3, "conv_width": 1}],
    "kda": [{"heads": 3, "value_head_dim": 5, "rank": 4, "gate_bias": True, "conv_width": 2}],
    "rwkv6": [{}, {"heads": 4, "mix_rank": 3, "decay_rank": 5, "layer": 2, "layers": 6}],
    "rwkv7": [
        {},
        {"layers": 3, "heads": 4, "decay_rank": 3, "rate_rank": 5, "value_rank": 2, "gate_rank": 7, "hidden": 30},
    ],
    "rwkv7_channel_mix": [{"hidden": 30, "layer": 1, "layers": 4}],
    "rwkv6_channel_mix": [{"hidden": 30, "layer": 1, "layers": 4}],
    "mlstm": [{}, {"heads": 3, "qk_dim": 6, "v_dim": 15, "soft_cap": None}],
    "slstm": [{"layer": 1, "layers": 3}, {"heads": 3, "conv_width": 1}],
    "aft": [
        {"window": 5, "heads": 3},
        {"variant": "simple", "bias": True},
        {"variant": "local", "window": 7, "length": 1504, "rank": 5},
        {"variant": "full", "length": 1504, "rank": 6},
        {"variant": "full", "length": 1504, "rank": 4, "bias": True, "causal": False},
        {"window": 4, "heads": 2, "causal": False},
    ],
    "parallel": [
        {},
        {
            "blocks": [
                {"kind": "gqa", "heads": 2, "kv_heads": 1, "window": 5},
                {"kind": "moe", "experts": 4, "expert": {"kind": "mlp", "bias": True}},
                {"kind": "rwkv4", "layer": 1, "layers": 3},
            ],
            "norm": "layer",
        },
        {"blocks": [{"kind": "gqa", "heads": 2, "causal": False}, "mlp"], "norm": "rms", "norm_eps": 0.1},
    ],
}
