"""half, bfloat and float arithmetic must round as MLX does on the CPU: bit for bit."""

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import emulate, required

pytestmark = required

COUNT = 16384
EXPRESSIONS = {
    "a + b": lambda a, b, c: a + b,
    "a * b": lambda a, b, c: a * b,
    "a / b": lambda a, b, c: a / b,
    "a * b + c - a": lambda a, b, c: a * b + c - a,
    "T(float(a) * float(b) + float(c))": lambda a, b, c: (
        a.astype(mx.float32) * b.astype(mx.float32) + c.astype(mx.float32)
    ).astype(a.dtype),
    "max(a, b) - min(a, c)": lambda a, b, c: mx.maximum(a, b) - mx.minimum(a, c),
    "T(int(c * T(16)))": lambda a, b, c: (c * mx.array(16, c.dtype)).astype(mx.int32).astype(c.dtype),
}


def launch(x: mx.array, z: mx.array, w: mx.array) -> mx.array:
    lines = [f"y[{n} * {COUNT} + i] = {text};" for n, text in enumerate(EXPRESSIONS)]
    source = "uint i = thread_position_in_grid.x; T a = x[i], b = z[i], c = w[i];\n" + "\n".join(lines)
    kernel = mx.fast.metal_kernel(name="rounding", input_names=["x", "z", "w"], output_names=["y"], source=source)
    return kernel(inputs=[x, z, w], template=[("T", x.dtype)], grid=(COUNT, 1, 1), threadgroup=(256, 1, 1),
                  output_shapes=[(len(EXPRESSIONS), COUNT)], output_dtypes=[x.dtype])[0]  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_rounding_is_that_of_mlx(dtype):
    rng = np.random.default_rng(5)
    a, b, c = (
        mx.array((rng.normal(size=COUNT) * 10.0 ** rng.uniform(-3, 3, COUNT)).astype(np.float32)).astype(dtype)
        for _ in range(3)
    )
    y, report = emulate(launch, a, b, c)
    assert not report.problems, report
    bits = mx.uint32 if dtype == mx.float32 else mx.uint16
    for n, (text, expected) in enumerate(EXPRESSIONS.items()):
        want = np.array(expected(a, b, c).view(bits))
        np.testing.assert_array_equal(np.array(y[n].view(bits)), want, err_msg=text)
