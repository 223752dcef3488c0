"""A hybrid's logits in numpy, token by token, from parameters by name alone; it shares no code with the model.

Letters: t time, d model, f hidden, h heads, k head size, g groups, p Mamba head size, n state, e experts, v vocabulary.
"""

import numpy as np

# One layer's parameters by name, such as `norm.weight` and `mixer.up`.
Layer = dict[str, np.ndarray]


def logits(config, layers: list[Layer], rest: Layer, tokens_t) -> list[np.ndarray]:
    """(t, v) of the model, then of each multi-token-prediction depth, whose next tokens come round at the end."""
    eps, embedded_td, main = config.layer_norm_epsilon, rest["embedding.weight"][tokens_t], config.layers.main
    states = [_rms(_stack(config, layers[: len(main)], main, embedded_td), rest["norm.weight"], eps)]
    for depth in range(1, config.mtp_depths + 1):
        both = [np.roll(embedded_td, -depth, 0), states[-1]]
        names = "embedding", "hidden"
        normed = [_rms(x, rest[f"mtp.{name}_norm.weight"], eps) for x, name in zip(both, names, strict=True)]
        h_td = _stack(config, layers[len(main) :], config.layers.mtp, np.concatenate(normed, -1) @ rest["mtp.project"])
        states.append(_rms(h_td, rest["mtp.final_norm.weight"], eps))
    return [h_td @ rest["head.weight"] for h_td in states]


def _stack(config, layers, letters, x_td):
    for layer, letter in zip(layers, letters, strict=True):
        inside = {name.removeprefix("mixer."): layer[name] for name in layer if name.startswith("mixer.")}
        x_td = x_td + MIXERS[letter](config, inside, _rms(x_td, layer["norm.weight"], config.layer_norm_epsilon))
    return x_td


def _rms(x, weight, eps):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight


def _relu2(x):
    return np.square(np.maximum(x, 0))


def _silu(x):
    return x / (1 + np.exp(-x))


def _mlp(config, p, h_td):
    return _relu2(h_td @ p["up"]) @ p["down"]


def _attention(config, p, h_td):
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_thk = (h_td @ p["query"]).reshape(-1, heads, size)
    k_thk, v_thk = (np.repeat((h_td @ p[n]).reshape(-1, groups, size), heads // groups, 1) for n in ("key", "value"))
    score_hts = np.einsum("thk,shk->hts", q_thk, k_thk) / size**0.5
    weight_hts = np.exp(np.where(np.tri(len(h_td), dtype=bool), score_hts, -np.inf))
    weight_hts /= weight_hts.sum(-1, keepdims=True)
    return np.einsum("hts,shk->thk", weight_hts, v_thk).reshape(len(h_td), -1) @ p["out"]


def _conv(p, name, x_tc):
    weight_ck = p[f"conv_{name}.weight"]
    padded = np.pad(x_tc, ((weight_ck.shape[1] - 1, 0), (0, 0)))
    taps = [padded[tap : tap + len(x_tc)] * weight_ck[:, tap] for tap in range(weight_ck.shape[1])]
    return _silu(sum(taps) + p[f"conv_{name}.bias"])


def _mamba(config, p, h_td):
    heads, groups = config.mamba_num_heads, config.n_groups
    x_ti, B_tc, C_tc = (_conv(p, name, h_td @ p[name]) for name in "xBC")
    x_thp = x_ti.reshape(len(h_td), heads, -1)
    B_thn, C_thn = (np.repeat(a.reshape(len(h_td), groups, -1), heads // groups, 1) for a in (B_tc, C_tc))
    dt_th = np.logaddexp(0, h_td @ p["dt"] + p["dt_bias"])
    decay_th, state_hpn, rows = np.exp(-dt_th * np.exp(p["A_log"])), 0.0, []
    for decay_h, dt_h, x_hp, B_hn, C_hn in zip(decay_th, dt_th, x_thp, B_thn, C_thn, strict=True):
        state_hpn = state_hpn * decay_h[:, None, None] + np.einsum("h,hp,hn->hpn", dt_h, x_hp, B_hn)
        rows.append(np.einsum("hpn,hn->hp", state_hpn, C_hn) + p["D"][:, None] * x_hp)
    y_tgc = (np.stack(rows).reshape(len(h_td), -1) * _silu(h_td @ p["z"])).reshape(len(h_td), groups, -1)
    y_ti = _rms(y_tgc, 1.0, config.layer_norm_epsilon).reshape(len(h_td), -1) * p["norm.weight"]
    return y_ti @ p["out"]


def _experts(config, p, h_td):
    """One routing group; the latent is required."""
    score_te = 1 / (1 + np.exp(-h_td @ p["router.gate"]))
    u_tw, y_td = h_td @ p["latent_down"], []
    for score_e, u_w in zip(score_te, u_tw, strict=True):
        chosen = np.argsort(-(score_e + p["router.bias"]), kind="stable")[: config.num_experts_per_tok]
        outputs = [_relu2(u_w @ p["experts.up"][e]) @ p["experts.down"][e] for e in chosen]
        weights = score_e[chosen] / score_e[chosen].sum() * config.routed_scaling_factor
        y_td.append(weights @ outputs @ p["latent_up"])
    return np.stack(y_td) + _relu2(h_td @ p["shared.up"]) @ p["shared.down"]


MIXERS = {"-": _mlp, "*": _attention, "M": _mamba, "E": _experts}
