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
