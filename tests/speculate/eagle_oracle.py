"""The published EAGLE networks in float64 numpy, whole sequences at once, written from the description alone."""

import numpy as np


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    """x [T, heads, D], row t at position t; pairs (i, i + D/2)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(x, w, prefix, heads, kv_heads, theta):
    """Causal, x [T, in] -> [T, heads * D]."""
    q, k, v = (x @ w[f"{prefix}.self_attn.{n}_proj.weight"].T for n in "qkv")
    dim = q.shape[1] // heads
    q, k = rotate(q.reshape(len(x), heads, dim), theta), rotate(k.reshape(len(x), kv_heads, dim), theta)
    v = v.reshape(len(x), kv_heads, dim)
    out = np.zeros_like(q)
    for head in range(heads):
        group = head * kv_heads // heads
        scores = q[:, head] @ k[:, group].T / np.sqrt(dim)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, group]
    return out.reshape(len(x), -1)


def mlp(x, w, prefix):
    gate = x @ w[f"{prefix}.mlp.gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[f"{prefix}.mlp.up_proj.weight"].T)) @ w[f"{prefix}.mlp.down_proj.weight"].T


def eagle1(w, raw, embed, tokens, features):
    """tokens [T] following features [T, M] -> predicted features [T, M]."""
    x = np.concatenate([embed[tokens], features], -1) @ w["fc.weight"].T + w.get("fc.bias", 0.0)
    prefix, kv = "layers.0", raw["num_key_value_heads"]
    h = attention(x, w, prefix, raw["num_attention_heads"], kv, raw.get("rope_theta", 1e4))
    x = x + h @ w[f"{prefix}.self_attn.o_proj.weight"].T
    return x + mlp(rms(x, w[f"{prefix}.post_attention_layernorm.weight"], raw["rms_norm_eps"]), w, prefix)


def eagle3(w, raw, embed, tokens, fused):
    """tokens [T] following fused features [T, M], fc already applied -> outputs [T, M], before the norm or, norm_output, after."""
    prefix, eps = "midlayer", raw["rms_norm_eps"]
    parts = rms(embed[tokens], w["midlayer.input_layernorm.weight"], eps), rms(fused, w["midlayer.hidden_norm.weight"], eps)
    x = np.concatenate(parts, -1)
    fused = parts[1] if raw.get("norm_before_residual") else fused
    kv = raw["num_key_value_heads"]
    h = attention(x, w, prefix, raw["num_attention_heads"], kv, raw.get("rope_theta", 1e4))
    x = fused + h @ w[f"{prefix}.self_attn.o_proj.weight"].T
    x = x + mlp(rms(x, w[f"{prefix}.post_attention_layernorm.weight"], eps), w, prefix)
    return rms(x, w["norm.weight"], eps) if raw.get("norm_output") else x


def chain(network, text, features, length, choose):
    """Greedy draft after `text` [n], given the target's fused features [n - 1, M] of all but its last token.

    network: (tokens, features) -> outputs; choose: output [M] -> token. Each step recomputes everything, without a cache.
    """
    drafted, features = [], list(features)
    for _ in range(length):
        tokens = np.array([*text[1:], *drafted])
        output = network(tokens, np.array(features))[-1]
        drafted.append(choose(output))
        features.append(output)
    return drafted
