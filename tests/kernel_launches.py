"""Every instance of every kernel that the package can launch, each as a call on small arrays.

An instance is what a compiler sees: template arguments, types of inputs, and for Metal their address spaces (inputs of
fewer than 8 elements are `constant`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from metal_cases import make_case
from qmoe_records import CODINGS, name_of, random_record

from tiny_qmoe_mlx import metal, metal_encode, metal_qmoe, metal_rans
from tiny_qmoe_mlx.codecs import rans

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
LENGTHS = (12, 14, 16)
COLUMNS = (64, 128, 256, 512, 1024, 2048)  # of which the Hadamard size is the same


@dataclass(frozen=True)
class Call:
    """`function(*arrays)` launches one kernel; pool and table of records are among the arrays."""

    name: str
    function: Callable
    arrays: tuple[mx.array, ...]


def rotations() -> Iterator[Call]:
    for columns in COLUMNS:
        for dtype in DTYPES:
            for result in dict.fromkeys((mx.float32, dtype)):
                arrays = mx.zeros((3, columns), dtype), mx.zeros((columns // 32,), mx.uint32)
                name = f"rotate {columns} {dtype} {result}".replace("mlx.core.", "")
                yield Call(name, lambda x, signs, result=result: metal.rotate(x, signs, result), arrays)


def products(experts: int = 9, ids_type: mx.Dtype = mx.uint32) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for tokens in (1, 8):
            ids, z = mx.zeros((tokens * 2,), ids_type), mx.zeros((tokens, 64))
            for activation in metal.ACTIVATIONS:
                case = make_case(rng, d=64, middle=32, experts=experts, length=length, name=activation)

                def gate_up(pool, table, z, ids, layer=case.layer, tokens=tokens):
                    return metal.gather_gate_up(z, ids, metal.Records(pool, table), layer, tokens)

                records = mx.array(case.pool), mx.array(case.table)
                name = f"gate_up {activation} L {length} tokens {tokens} ids {ids_type}".replace("mlx.core.", "")
                yield Call(name, gate_up, (*records, z, ids))
            for dtype in DTYPES:

                def qmv(pool, table, z, ids, layer=case.layer, tokens=tokens, dtype=dtype):
                    return metal.gather_qmv(z, ids, metal.Records(pool, table), layer, 0, tokens, dtype)

                name = f"qmv {dtype} L {length} tokens {tokens} ids {ids_type}".replace("mlx.core.", "")
                yield Call(name, qmv, (*records, z, ids))


def dequantizations(experts: int = 9, ids_type: mx.Dtype = mx.uint32) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        case = make_case(rng, d=64, middle=32, experts=experts, length=length)
        for dtype in DTYPES:

            def dequantize(pool, table, ids, layer=case.layer, dtype=dtype):
                return metal.dequantize(ids, metal.Records(pool, table), layer, 0, dtype)

            arrays = mx.array(case.pool), mx.array(case.table), mx.zeros((experts - 1,), ids_type)
            name = f"dequantize {dtype} L {length} ids {ids_type}".replace("mlx.core.", "")
            yield Call(name, dequantize, arrays)


def encoders() -> Iterator[Call]:
    for length in LENGTHS:
        for rate in range(1, 8):

            def search(x, rate=rate, length=length):
                return metal_encode.search(x, rate, length)

            yield Call(f"viterbi rate {rate} L {length}", search, (mx.zeros((1, 32, 16)),))


def codewords(experts: int = 9, ids_type: mx.Dtype = mx.uint32) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for coding in CODINGS:
        for bias in (False, True):
            record = random_record(rng, coding, [(4, 16)], bias, more=0)
            arrays = mx.array(record), mx.zeros((experts,), mx.uint32)
            for tokens in (1, 8):
                for dtype in DTYPES:
                    layer = metal_qmoe.Shapes(coding, (4, 16), bias)

                    def qmv(pool, table, x, ids, layer=layer, tokens=tokens):
                        return metal_qmoe.gather_qmv(x, ids, metal.Records(pool, table), layer, 0, tokens)

                    name = f"qmoe {name_of(coding)} bias {bias} {dtype} tokens {tokens} ids {ids_type}"
                    inputs = mx.zeros((tokens, 16), dtype), mx.zeros((tokens * 2,), ids_type)
                    yield Call(name.replace("mlx.core.", ""), qmv, (*arrays, *inputs))


def dense_codewords(experts: int = 9, ids_type: mx.Dtype = mx.uint32) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for coding in CODINGS:
        for bias in (False, True):
            arrays = mx.array(random_record(rng, coding, [(4, 16)], bias, more=0)), mx.zeros((experts,), mx.uint32)
            for dtype in DTYPES:
                layer = metal_qmoe.Shapes(coding, (4, 16), bias)

                def dequantize(pool, table, ids, layer=layer, dtype=dtype):
                    return metal_qmoe.dequantize(ids, metal.Records(pool, table), layer, 0, dtype)

                name = f"qmoe dequantize {name_of(coding)} bias {bias} {dtype} ids {ids_type}"
                yield Call(name.replace("mlx.core.", ""), dequantize, (*arrays, mx.zeros((experts - 1,), ids_type)))


def tiles() -> Iterator[Call]:
    payload = rans.encode(np.arange(256, dtype=np.uint8)).pack()
    coded = rans.parse(payload, 256, "here")
    decode = lambda pool: metal_rans.decode(pool, 0, 0, len(payload), coded, 256)[0]  # noqa: E731
    yield Call("rans", decode, (mx.array(payload),))


def every_call() -> list[Call]:
    """All of them; records of few and of many experts, ids as either kind of integer."""
    calls = [*rotations(), *encoders(), *tiles()]
    for experts, ids_type in ((9, mx.uint32), (3, mx.int32)):
        calls += [*products(experts, ids_type), *dequantizations(experts, ids_type), *codewords(experts, ids_type)]
        calls += dense_codewords(experts, ids_type)
    return calls
