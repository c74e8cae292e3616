"""Grids and helpers that the two files of Radial's tests share."""

from vdit_sparse import Grid

# Frames that are no multiple of the block, frames much smaller than it, images, text.
ODD_GRIDS = [
    Grid(1, 9, 13),
    Grid(6, 4, 7),
    Grid(40, 1, 5),
    Grid(9, 9, 13, 17),
    Grid(7, 16, 28),
    Grid(12, 15, 20, 100),
    Grid(20, 10, 13),
]


def density(keep):
    return float(keep.double().mean())
