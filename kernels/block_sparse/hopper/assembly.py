"""PTX for what Gluon has no operation for, on numbers of a thread in the order of its registers."""

from triton.experimental.gluon import language as gl

# Four weights as e4m3, in one word.
AS_WORD = gl.constexpr("""
{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}
""")

# A word, which is there four times, as its four bytes.
AS_BYTES = gl.constexpr("mov.b32 $0, $1;")


def _landmark(count: int) -> str:
    """A store of one of two weights that never happens, since weights are small: ptxas, which does
    not know, moves no wait for a product up past it."""
    one, other = count // 2 - 4, count // 2 - 3
    return f"""
{{
.reg .pred huge;
.reg .f32 x;
.reg .b32 nowhere;
min.f32 x, ${one}, ${other};
setp.gt.f32 huge, x, 0f7F000000;
mov.b32 nowhere, 0;
@huge st.volatile.shared.f32 [nowhere], x;
}}
"""


def _in_place(count: int) -> str:
    """Constraints of `count` numbers that stay where they are."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


# A thread's weights of steps of 64 and of 128 keys.
LANDMARK_32, IN_PLACE_32 = gl.constexpr(_landmark(32)), gl.constexpr(_in_place(32))
LANDMARK_64, IN_PLACE_64 = gl.constexpr(_landmark(64)), gl.constexpr(_in_place(64))


def _rescaled(count: int) -> str:
    """Accumulators times their rows' factors, of which a thread has two in turns of two numbers;
    nothing is done where all of a warp's are 1."""
    first, second = f"${2 * count}", f"${2 * count + 2}"
    products = [f"mul.rn.f32 ${i}, ${i}, {(first, second)[i // 2 % 2]};" for i in range(count)]
    return "\n".join(
        [
            "{",
            ".reg .pred one, other;",
            f"setp.neu.f32 one, {first}, 0f3F800000;",
            f"setp.neu.or.f32 other, {second}, 0f3F800000, one;",
            "vote.sync.any.pred one, other, -1;",
            "@!one bra.uni unchanged;",
            *products,
            "unchanged:",
            "}",
        ]
    )


# A thread's accumulators of 64 and of 128 channels.
RESCALED_32, WITH_FACTORS_32 = (
    gl.constexpr(_rescaled(32)),
    gl.constexpr(_in_place(32) + ",f" * 32),
)
RESCALED_64, WITH_FACTORS_64 = (
    gl.constexpr(_rescaled(64)),
    gl.constexpr(_in_place(64) + ",f" * 64),
)
