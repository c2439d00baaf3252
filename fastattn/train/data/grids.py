"""The eight symmetries of a rectangle of cells, numbered as in HRM's data sets."""

import numpy as np

SYMMETRIES = 8
_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def symmetry(grid: np.ndarray, number: int) -> np.ndarray:
    """The image of a grid (rows, columns): 0 itself; 1, 2, 3 that many quarter turns against the clock; 4 left and right
    swapped; 5 top and bottom swapped; 6 transposed; 7 transposed over the other diagonal."""
    if number == 4:
        return grid[:, ::-1]
    if number == 5:
        return grid[::-1]
    if number == 6:
        return grid.T
    if number == 7:
        return np.rot90(grid)[:, ::-1]
    if not 0 <= number < 4:
        raise ValueError(f"symmetry: number is {number}; it must be from 0 to {SYMMETRIES - 1}")
    return np.rot90(grid, number)


def undone(grid: np.ndarray, number: int) -> np.ndarray:
    """The grid whose image under :func:`symmetry` is ``grid``."""
    return symmetry(grid, _INVERSE[number])
