"""What mlx-lm's Metal kernels for Muse Spark compute, in plain MLX, so that its experts can be compared on a CPU.

Only values that both sides of a comparison share go through here: nothing of it says that mlx-lm's kernels are right.
"""

import mlx.core as mx


def expert_routing(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return [chosen.astype(mx.uint32), weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale]


def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    normed = mx.fast.rms_norm(experts.astype(mx.float32) * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(-2).astype(experts.dtype)


def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    scaled = branch if post_weight is None else post_weight * branch
    stream = alpha * stream + beta * mx.fast.rms_norm(scaled.astype(mx.float32), None, post_eps)
    return stream, None if next_norm is None else pre_norm(stream, next_norm, dtype=branch.dtype)


def pre_norm(stream, norm, *, dtype):
    return mx.fast.rms_norm(stream, norm.weight, norm.eps).astype(dtype)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    heads = qkvg[..., : (n_heads + n_kv_heads) * head_dim].reshape(*qkvg.shape[:-1], -1, head_dim)
    heads = mx.fast.rms_norm(heads, None, eps)
    return [heads[..., :n_heads, :] * query_scale, heads[..., n_heads:, :]]


def qk_norm_rope(qkvg, *, rope_base, offset, **norm):
    def turn(heads):
        options = {"traditional": True, "base": rope_base, "scale": 1.0, "offset": offset}
        return mx.fast.rope(heads.swapaxes(1, 2), heads.shape[-1], **options).swapaxes(1, 2)

    return [turn(heads) for heads in qk_norm(qkvg, **norm)]


def rms_norm_sigmoid_gate(x, gate, *, eps):
    flat = mx.fast.rms_norm(x, None, eps).transpose(0, 2, 1, 3).reshape(gate.shape)
    return (flat * mx.sigmoid(gate)).astype(x.dtype)


KERNELS = (
    expert_routing,
    norm_add_norm,
    post_expert_norm_combine,
    pre_norm,
    qk_norm,
    qk_norm_rope,
    rms_norm_sigmoid_gate,
)
