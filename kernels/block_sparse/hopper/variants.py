"""Which form of the Hopper kernel runs where: a table written by hand.

`python -m vdit_sparse.kernels.bench_hopper` measures the candidates; what came out is in
`kernels/LOG.md`.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variant:
    """One way to compile and launch the kernel.

    consumers: warpgroups of 64 queries each, 1 or 2; keys: keys of a step, tokens; stages: tiles of
    keys, and of values, in shared memory; lone: one tile of keys for two of values;
    persistent: as many programs as fit the GPU, each of which takes tile after tile from a common
    counter and loads the next tile's queries early; pingpong: consumers start their products in
    turns; landmark: half of a step's exponentials before the wait for the values of the last one
    (`parts.with_landmark`); longest_first: tiles of a head by falling length of their lists.
    producer_registers: of a thread of the producer's warp; registers: of a thread when the program
    starts, before the warps trade them, or None.
    """

    consumers: int
    keys: int
    stages: int
    lone: bool = False
    persistent: bool = False
    pingpong: bool = False
    landmark: bool = False
    longest_first: bool = False
    producer_registers: int = 24
    registers: int | None = None

    def __post_init__(self):
        if self.lone and self.stages != 2:
            raise ValueError(f"lone needs stages=2, got {self}.")

    @property
    def rows(self) -> int:
        """Queries of a tile."""
        return 64 * self.consumers

    @property
    def programs(self) -> int:
        """Programs that fit a multiprocessor."""
        return 1 if self.consumers == 2 else 2

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's constants of these names."""
        return {
            "BN": self.keys,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "KEY_STAGES": 1 if self.lone else self.stages,
            "PERSISTENT": self.persistent,
            "PINGPONG": self.pingpong,
            "LANDMARK": self.landmark,
            "REGISTERS": 240,
            "PRODUCER_REGISTERS": self.producer_registers,
        }

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": 4, **limit}


# Query blocks of 128 and of 64: D -> form.
PAIRS = {128: Variant(2, 128, 2), 64: Variant(2, 128, 3)}
SINGLES = {128: Variant(1, 64, 3, registers=128), 64: Variant(1, 128, 2, registers=128)}
# What was faster where it was measured, all without masked slots: (D, blocks, precision) -> form.
SHARED = {"persistent": True, "longest_first": True}
FASTER = {
    (128, (128, 128), "bf16"): Variant(2, 128, 2, landmark=True, **SHARED),
    (64, (128, 128), "bf16"): Variant(2, 128, 3, **SHARED),
    (128, (128, 64), "bf16"): Variant(2, 64, 3, **SHARED),
    # As fast as one stage of 128 keys on even lists, and 3 % faster on ragged ones.
    (128, (64, 128), "bf16"): Variant(1, 128, 2, lone=True, registers=128),
    (128, (128, 128), "int8_fp8"): Variant(2, 128, 3, pingpong=True, landmark=True, **SHARED),
    (128, (128, 128), "int8_bf16"): Variant(2, 128, 2, landmark=True, **SHARED),
}


def variant_for(
    D: int, blocks: tuple[int, int], precision: str = "bf16", valid: bool = False
) -> Variant:
    """The form for heads of D channels and (query, key) blocks of `blocks` tokens; valid: whether
    key blocks have masked slots inside."""
    if not valid and (D, blocks, precision) in FASTER:
        return FASTER[D, blocks, precision]
    variant = (PAIRS if blocks[0] == 128 else SINGLES)[D]
    if blocks[0] == 128 and (precision == "int8_fp8" or blocks[1] == 64):
        variant = replace(variant, stages=3)
    if valid:
        variant = replace(variant, producer_registers=32)
    return replace(variant, keys=min(variant.keys, blocks[1]))
