"""The interpreter of machine code, on kernels small enough to know what they do."""

from __future__ import annotations

import os
import re
import struct
from typing import Any

import pytest
from compiled_kernels import ARCHS, compile_text, find
from sass import Unknown, bits_of, float_of
from sass_thread import Event, Launch, Thread

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("NORMKIT_TEST_CODEGEN") == "0", reason="NORMKIT_TEST_CODEGEN=0 says so"
    ),
    pytest.mark.skipif(
        find("nvcc") is None or find("cuobjdump") is None, reason="there is no nvcc, or cuobjdump"
    ),
]

KERNELS = r"""
struct Args {
  unsigned* out;
  const float4* in;
  long long a, b;
  int n, m;
  float x, y;
  bool flag;
  char beside[7];
};
#define KERNEL extern "C" __global__ void
#define STORE(k, value) a.out[k] = static_cast<unsigned>(value), \
    a.out[k + 1] = static_cast<unsigned>(static_cast<unsigned long long>(value) >> 32)

KERNEL turns(Args a) {
  unsigned sum = 0;
#pragma unroll 1
  for (int i = 0; i < a.n; ++i) sum = sum * 3 + i;
  a.out[0] = sum;
}
KERNEL turns_of_a_bool(Args a) {
  unsigned sum = 0;
#pragma unroll 1
  for (int i = 0; i < a.flag; ++i) sum += a.n;
  a.out[0] = sum;
}
KERNEL indexed_argument(const __grid_constant__ Args a) {
  a.out[0] = static_cast<unsigned>(a.beside[a.n]) & 255;
}
KERNEL guarded_load(Args a) {
  float4 v{};
  if (threadIdx.x < a.n) v = a.in[threadIdx.x];
  a.out[0] = v.x > 0.5f;
}
KERNEL two_loads(Args a) {
  const float4 v = a.in[0], w = a.in[a.n];
  __syncthreads();
  a.out[0] = __float_as_uint(w.x);
  a.out[1] = __float_as_uint(v.x);
}
KERNEL quotient(Args a) { reinterpret_cast<float*>(a.out)[0] = a.x / a.y; }
__device__ __noinline__ unsigned callee(unsigned n) {
#pragma unroll 1
  for (unsigned i = n; i > 1; i /= 2) n = n * 7 + i;
  return n;
}
KERNEL calls(Args a) { a.out[0] = callee(a.n) + callee(a.m); }
KERNEL integers(Args a) {
  STORE(0, a.a + a.b);
  STORE(2, a.a - a.b);
  STORE(4, a.a * a.b);
  STORE(6, a.a < a.b ? a.n : a.m);
  STORE(8, static_cast<unsigned long long>(a.a) < static_cast<unsigned long long>(a.b) ? a.n : a.m);
  STORE(10, static_cast<unsigned>(a.n) / static_cast<unsigned>(a.m));
  STORE(12, a.n >> 3);
  STORE(14, a.a >> (a.m & 63));
  STORE(16, a.a << (a.m & 63));
  STORE(18, min(a.n, a.m) + max(a.n, -a.m));
  STORE(20, (a.n ^ a.m) | (a.n & 0x1234) | ~a.m);
  STORE(22, -a.a);
  STORE(24, static_cast<long long>(a.n) * a.m);
  STORE(26, __umulhi(a.n, a.m));
  STORE(28, __funnelshift_l(a.n, a.m, 11));
  unsigned permuted;
  asm("prmt.b32 %0, %1, %2, 0x6b14;" : "=r"(permuted) : "r"(a.n), "r"(a.m));
  STORE(30, permuted);
  STORE(32, abs(a.n));
  STORE(34, a.a == a.b || a.n > a.m ? a.a : a.b);
  STORE(36, static_cast<short>(a.n) + static_cast<signed char>(a.m));
  STORE(38, threadIdx.x % 32 + (threadIdx.x / 32 & 3) * 1000);
}
KERNEL place(Args a) {
  a.out[0] = blockIdx.x, a.out[1] = threadIdx.x, a.out[2] = threadIdx.y;
  a.out[3] = blockDim.x, a.out[4] = blockDim.y, a.out[5] = blockDim.z;
  a.out[6] = gridDim.x, a.out[7] = gridDim.y, a.out[8] = gridDim.z;
#if __CUDA_ARCH__ >= 900
  unsigned v;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  a.out[9] = v;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  a.out[10] = v;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(v));
  a.out[11] = v;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(v));
  a.out[12] = v;
#endif
}
KERNEL unknown(Args a) { a.out[0] = __brev(a.n); }
"""
OUT, IN = 1 << 40, 2 << 40
A, B, N, M = -(3 << 40) - 12345, (5 << 37) + 999, 0x7A3F51C9, 0x2B4D7F
ARCH = pytest.mark.parametrize("arch", [int(arch.removeprefix("sm_")) for arch in ARCHS])


def run(
    name: str, arch: int, *, n: int = N, m: int = M, x: float = 1.0, y: float = 1.0, flag: int = 1,
    thread: int = 0, at: int = 0, limit: int = 10_000, **shape: Any,
) -> Thread:  # fmt: skip
    # What lies beside the flag is set: a load of more than a byte would show.
    words = (OUT, IN, A, B, n, m, x, y, flag, b"\xff" * 7)
    launch = Launch(struct.pack("<QQqqiiffB7s", *words), **shape)
    program = compile_text(KERNELS, arch)[name]
    return Thread(program, launch, thread, at, {1: "out", 2: "in"}, limit, traced=True).run()


def stored(thread: Thread) -> dict[int, int]:
    """By index."""
    return {event.offset // 4: event.value for event in thread.events if event.kind == "store"}


@ARCH
def test_a_loop_has_its_turns(arch: int) -> None:
    sums, issued = [], []
    for n in (0, 1, 10, 20, 30):
        thread = run("turns", arch, n=n)
        want = 0
        for i in range(n):
            want = want * 3 + i & 0xFFFFFFFF
        sums.append(stored(thread)[0] == want)
        issued.append(thread.issued)
        assert thread.issued == thread.executed.total()
        assert n < 2 or max(thread.executed.values()) == n
    assert all(sums)
    assert issued[4] - issued[3] == issued[3] - issued[2] > 0


@ARCH
def test_a_byte_is_loaded_without_those_beside_it(arch: int) -> None:
    assert stored(run("turns_of_a_bool", arch, flag=1)) == {0: N}
    assert stored(run("turns_of_a_bool", arch, flag=0)) == {0: 0}


@ARCH
def test_an_argument_is_found_by_an_index(arch: int) -> None:
    for n in range(7):
        words = (OUT, IN, A, B, n, M, 1.0, 1.0, 1, bytes(range(100, 107)))
        launch = Launch(struct.pack("<QQqqiiffB7s", *words))
        program = compile_text(KERNELS, arch)["indexed_argument"]
        assert any(re.search(r"c\[0x0\]\[U?R", line) for _, line in program.lines), "not tried"
        assert stored(Thread(program, launch, tensors={1: "out"}).run()) == {0: 100 + n}


@ARCH
def test_a_load_counts_where_its_guard_holds(arch: int) -> None:
    def loads(thread: int) -> list[Event]:
        events = run("guarded_load", arch, n=4, thread=thread).events
        return [event for event in events if event.kind == "load"]

    assert [event.offset for event in loads(3)] == [48]
    assert loads(4) == []


@ARCH
def test_loads_and_their_first_uses_are_told_in_order(arch: int) -> None:
    events = run("two_loads", arch, n=5).events
    told = [(e.kind, e.tensor, e.offset) for e in events if e.kind != "store"]
    assert set(told[:2]) == {("load", "in", 0), ("load", "in", 80)}
    assert told[2] == ("barrier", "", 0)
    assert set(told[3:]) == {("use", "in", 0), ("use", "in", 80)}
    assert all(e.load == next(f.at for f in events if f.kind == "load" and f.offset == e.offset)
               for e in events if e.kind == "use")  # fmt: skip


@ARCH
@pytest.mark.parametrize(
    ("x", "y"), [(3.0, 7.0), (1e-39, 3.0), (1.0, 3e38), (3e38, 1e-3), (-5e-42, 2e-41), (2.0, 0.0)]
)
def test_a_quotient_is_right_also_by_the_call_for_rare_operands(
    arch: int, x: float, y: float
) -> None:
    thread = run("quotient", arch, x=x, y=y)
    x, y = float_of(bits_of(x)), float_of(bits_of(y))
    assert stored(thread)[0] == bits_of(x / y if y else float("inf"))
    rare = (x, y) != (3.0, 7.0)
    assert any(i.name == "RET" and on for i, on in thread.trace) == rare


@ARCH
def test_a_call_returns_to_where_it_came_from(arch: int) -> None:
    def callee(n: int) -> int:
        i = n
        while i > 1:
            n = n * 7 + i & 0xFFFFFFFF
            i //= 2
        return n

    thread = run("calls", arch, n=1000, m=77)
    assert stored(thread) == {0: callee(1000) + callee(77) & 0xFFFFFFFF}


def trunc(value: int, bits: int) -> int:
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def permuted(a: int, b: int, selector: int) -> int:
    sources = (a | b << 32).to_bytes(8, "little")
    nibbles = [selector >> 4 * k & 15 for k in range(4)]
    picked = [sources[k & 7] if k < 8 else 255 * (sources[k & 7] >> 7) for k in nibbles]
    return int.from_bytes(bytes(picked), "little")


@ARCH
def test_integers_are_exact(arch: int) -> None:
    # The upper words of B and of the last ones are equal.
    others = ((B - 1, N, M), (B + 1, N, M), (B + (1 << 31), N, M))
    for a, n, m in ((A, N, M), (-A, -N, M), (0, 0, -1), (B, M, -N), (-1, 1, 31), *others):
        words = (OUT, IN, a, B, n, m, 1.0, 1.0, 1, b"\xff" * 7)
        program = compile_text(KERNELS, arch)["integers"]
        launch = Launch(struct.pack("<QQqqiiffB7s", *words), block=(128, 1, 1))
        got = stored(Thread(program, launch, 77, 0, {1: "out", 2: "in"}).run())
        u32, u64 = (1 << 32) - 1, (1 << 64) - 1
        want = [
            a + B,
            a - B,
            a * B,
            n if a < B else m,
            n if a & u64 < B & u64 else m,
            (n & u32) // (m & u32),
            n >> 3,
            a >> (m & 63),
            a << (m & 63),
            trunc(min(n, m) + max(n, trunc(-m, 32)), 32),
            (n ^ m) | (n & 0x1234) | ~m,
            -a,
            n * m,
            (n & u32) * (m & u32) >> 32,
            ((m & u32) << 32 | (n & u32)) << 11 >> 32 & u32,
            permuted(n & u32, m & u32, 0x6B14),
            abs(n),
            a if a == B or n > m else B,
            trunc(n, 16) + trunc(m, 8),
            77 % 32 + (77 // 32 & 3) * 1000,
        ]
        pairs = [got[2 * k] | got[2 * k + 1] << 32 for k in range(len(want))]
        assert pairs == [value & u64 for value in want], (a, n, m)


@ARCH
def test_a_thread_knows_its_place(arch: int) -> None:
    cluster = 4 if arch >= 90 else 1
    shape: dict[str, Any] = {"grid": (24, 5, 7), "block": (64, 2, 3), "cluster": cluster}
    got = stored(run("place", arch, thread=64 + 9, at=14, **shape))
    want = [14, 9, 1, 64, 2, 3, 24, 5, 7, *((4, 2, 4, 6) if arch >= 90 else ())]
    assert got == dict(enumerate(want))


@ARCH
def test_what_is_not_known_is_named(arch: int) -> None:
    with pytest.raises(Unknown, match="BREV"):
        run("unknown", arch)
    with pytest.raises(Unknown, match="turns: 100 instructions, and no end"):
        run("turns", arch, n=1000, limit=100)
    program = compile_text(KERNELS, arch)["turns"]
    with pytest.raises(ValueError, match="expected 56 bytes, got 8"):
        Thread(program, Launch(bytes(8)))
    with pytest.raises(Unknown, match="is in no tensor"):
        Thread(program, Launch(bytes(56))).run()
