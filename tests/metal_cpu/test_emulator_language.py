"""Mode ``as``: what Metal's compiler refuses must be refused, what it takes must be taken."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_cpu import Launch, emulate, required, sample
from metal_cpu.lint import lint
from metal_cpu.sample import edited

pytestmark = required

MLX_KERNELS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
ACC = "float acc = 0.0f;"


def in_header(extra: str) -> dict[str, str]:
    return {"header": sample.HEADER + extra}


def after(text: str) -> dict[str, str]:
    return {"source": edited(ACC, ACC + text)}


ACCEPTED = {
    "the clean kernel": {},
    "pointers with their spaces": after(
        " const device T* p = x; threadgroup float* q = partial; acc += float(p[0]) + float(q != nullptr);"
    ),
    "vectors and swizzles": after(
        " float4 v = float4(float2(1.0f, acc), 2.0f, 3.0f); acc += 0.0f * v.wzyx.x + dot(v.xy, v.zw);"
    ),
    "half literals": after(" half h = 1.5h; acc += float(h) * 0.0f;"),
    "vector loads": after(" uint4 q = *(const device uint4*)w; acc += float(q.x & 0u);"),
    "template function over address spaces": {
        "header": sample.HEADER + "template <typename P> inline float first(P p) { return float(p[0]); }\n",
        "source": edited(ACC, "float acc = 0.0f * first(x) + 0.0f * first(w_shape);"),
    },
    "constants with their space": {
        "header": sample.HEADER
        + "constant constexpr uint two = 2;\nstruct Size { static constant constexpr uint n = 4; };\n",
        "source": edited(ACC, "constexpr uint three = 3; float acc = 0.0f * float(two * three & Size::n);"),
    },
    "products and masks are not pointers": after(
        " uint a = rows, b = words; acc += 0.0f * float(a * b + (a & b) + uint(a) * b);"
    ),
    "constant table": {
        "header": sample.HEADER + "constant float table[4] = {0.0f, 1.0f, 2.0f, 3.0f};\n",
        "source": edited(ACC, "float acc = 0.0f * table[lane & 3];"),
    },
    "as_type": after(
        " acc += 0.0f * as_type<float>(w[0] & 0x3fffffffu) + float(as_type<half2>(w[0] & 0x3bff3bffu).x);"
    ),
    "helper that is not recursive": in_header(
        "inline uint twice(uint n) { return 2u * n; }\ninline uint four(uint n) { return twice(twice(n)); }\n"
    ),
}

REFUSED = {
    "threadgroup pointer to device memory": ("ADDRESS-SPACE", after(" threadgroup T* p = x; acc += float(p[0]);")),
    "argument in another space": ("COMPILE", {"source": edited("x + j * 16", "spare")}),
    "pointer without a space": ("ADDRESS-SPACE", after(" const T* p = x; acc += float(p[0]);")),
    "reference drops the space": ("ADDRESS-SPACE", after(" thread const T& r = x[0]; acc += float(r);")),
    "returned pointer drops the space": (
        "ADDRESS-SPACE",
        in_header("inline thread float* f(device float* p) { return p; }\n"),
    ),
    "C cast to another space": (
        "ADDRESS-SPACE",
        after(" const device half* p = (const device half*)spare; acc += float(p[0]);"),
    ),
    "write through a const input": ("COMPILE", after(" x[0] = T(0);")),
    "double": ("COMPILE", {"source": edited(ACC, "double acc = 0.0f;")}),
    "std::": ("COMPILE", after(" std::size_t z = 0; acc += z;")),
    "throw": ("COMPILE", after(" if (rows == 0) throw 1;")),
    "new": ("COMPILE", after(" thread float* z = new float[4]; acc += z[0];")),
    "goto": ("COMPILE", after(" goto end; end: acc += 0.0f;")),
    "virtual": ("COMPILE", in_header("struct B { virtual float f() { return 0; } };\n")),
    "a header of C++": ("COMPILE", {"header": "#include <vector>\n" + sample.HEADER}),
    "recursion": (
        "RECURSION",
        {
            "header": sample.HEADER
            + "inline uint rec(uint n) { return n > 1u ? n * rec(n - 1) + rec(n / 2u) : 1u; }\n",
            "source": edited(ACC, "float acc = 0.0f * float(rec(rows));"),
        },
    ),
    "64-bit simd_sum": ("COMPILE", after(" acc += float(simd_sum(ulong(lane)));")),
    "atomic half": ("COMPILE", after(" threadgroup atomic<half> c[1];")),
    "as_type of another size": ("COMPILE", after(" acc += as_type<float>(ushort(3));")),
    "initialised threadgroup array": ("LANGUAGE", {"source": edited("spare[4];", "spare[4] = {0};")}),
    "threadgroup array in a helper": (
        "LANGUAGE",
        in_header("inline float f() {\n  threadgroup float t[4];\n  return t[0];\n}\n"),
    ),
    "float becomes bfloat": ("COMPILE", after(" bfloat b = acc; acc += float(b);")),
    "half becomes bfloat": ("COMPILE", after(" half h = 1.0h; bfloat b = h; acc += float(b);")),
    "misspelt position": ("COMPILE", {"source": edited("thread_index_in_simdgroup", "thread_index_in_simd_group")}),
    "unknown simd operation": ("COMPILE", {"source": edited("acc = simd_sum(acc);", "acc = simd_median(acc);")}),
    "pointer to a local without a space": ("LANGUAGE", after(" float* p = &acc; p[0] += 1.0f;")),
    "reference parameter without a space": (
        "LANGUAGE",
        in_header("template <typename T> inline void f(T& a, const uint b) { a += b; }\n"),
    ),
    "struct reference without a space": (
        "LANGUAGE",
        in_header("struct Pair { uint a; };\ninline uint f(const Pair& p) { return p.a; }\n"),
    ),
    "cast to a pointer without a space": ("LANGUAGE", after(" acc += *(float*)&acc;")),
    "global that is not constant": ("LANGUAGE", in_header("constexpr float half_pi = 1.5f;\n")),
    "static member that is not constant": ("LANGUAGE", in_header("struct Size { static constexpr uint n = 4; };\n")),
    "static local": ("LANGUAGE", after(" static uint count = 0; acc += count;")),
    "lambda": ("LANGUAGE", after(" auto f = [&](float z) { return z + acc; }; acc += f(0.0f);")),
    "array of variable length": ("COMPILE", after(" float v[rows]; acc += v[0];")),
    "variable that is never set": ("COMPILE", after(" float never; acc += never;")),
    "unsuffixed literal computes in double": ("COMPILE", after(" acc = acc * 0.3;")),
    "transcendental of an integer": ("COMPILE", after(" acc += float(exp(rows));")),
    "min of two types": ("COMPILE", after(" acc += float(min(rows, 3));")),
    "too many vector components": ("COMPILE", after(" float2 v = float2(acc, acc, acc); acc += v.x;")),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_metal_is_accepted(name):
    _, report = sample.check(mode="as", **ACCEPTED[name])
    assert not report.problems, report


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_metal_is_refused(name):
    kind, text = REFUSED[name]
    _, report = sample.check(mode="as", **text)
    assert report.kinds[kind], report


def test_mlx_own_kernels_break_no_rule_that_is_read_from_the_text():
    """They are compiled for every Mac. The nax kernels are left out: they are Metal 4, which has lambdas."""
    headers = sorted(f for f in MLX_KERNELS.rglob("*.h") if "nax" not in f.name)
    if not headers:
        pytest.skip("this mlx wheel has no kernel headers")
    found = [
        f"{file.name}:{number} {message}"
        for file in headers
        for number, message in lint(Launch("", file.read_text() + "\nvoid ();", (1, 1, 1), (1, 1, 1), (), ()))
        if "in the kernel function" not in message  # these files hold many kernels
    ]
    assert not found


def test_an_input_of_fewer_than_8_elements_is_constant():
    """MLX passes it as ``constant``, so a function that takes ``const device T*`` does not compile for it."""
    launch = sample.make()
    _, report = emulate(launch, *sample.inputs(rows=1, columns=64), mode="as")  # one scale
    assert not report.problems, report  # scales[] is used in place
    takes_device = edited("float(scales[row * (words / 4) + j / 4])", "float(first(scales))")
    header = sample.HEADER + "template <typename T> inline T first(const device T* p) { return p[0]; }\n"
    _, report = emulate(sample.make(takes_device, header), *sample.inputs(rows=1, columns=64), mode="as")
    assert report.kinds["COMPILE"] and "first(scales)" in report.problems[0], report


def test_problem_names_the_line():
    _, report = sample.check(mode="as", **after("\n  threadgroup T* p = x;"))
    assert any("`threadgroup T* p = x;`" in line for line in report.problems), report


def test_the_other_modes_raise_what_clang_says():
    with pytest.raises(SyntaxError, match="simd_median"):
        sample.check(edited("acc = simd_sum(acc);", "acc = simd_median(acc);"))


def test_function_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="should launch a Metal kernel"):
        emulate(lambda x: x + 1, mx.zeros((8,)))
