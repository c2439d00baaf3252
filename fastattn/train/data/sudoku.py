"""Sudoku of any box size: a solver that counts, puzzles with one solution, and the symmetries of a puzzle.

Boards are int64 arrays (n * n, n * n) for boxes of n x n cells: digits 1 to n * n, 0 for a blank.
"""

import functools
import itertools

import numpy as np

PAD = 0


def to_tokens(boards: np.ndarray) -> np.ndarray:
    """Boards (..., side, side) to tokens (..., side * side): padding 0, blank 1, digit d is d + 1."""
    return boards.reshape(*boards.shape[:-2], -1) + 1


def from_tokens(tokens: np.ndarray) -> np.ndarray:
    """Tokens (..., side * side) to boards; padding counts as blank."""
    side = int(tokens.shape[-1] ** 0.5)
    return np.maximum(np.asarray(tokens) - 1, 0).reshape(*tokens.shape[:-1], side, side)


def vocab_size(box: int) -> int:
    return box * box + 2


def solutions(board: np.ndarray, *, limit: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Up to ``limit`` completions of a board, none if its digits contradict each other.

    Depth first on the blank with the fewest candidates; with ``rng`` candidates are tried in random order.
    """
    side = _side(board)
    box = int(side**0.5)
    full = (1 << side) - 1
    grid = [int(digit) for digit in np.asarray(board).ravel()]
    rows, columns, boxes = [0] * side, [0] * side, [0] * side  # bit d - 1: digit d is used
    blanks = []
    for cell, digit in enumerate(grid):
        r, c = divmod(cell, side)
        b = r // box * box + c // box
        if digit == 0:
            blanks.append((cell, r, c, b))
            continue
        bit = 1 << (digit - 1)
        if (rows[r] | columns[c] | boxes[b]) & bit:
            return []
        rows[r] |= bit
        columns[c] |= bit
        boxes[b] |= bit
    found: list[np.ndarray] = []

    def descend() -> None:
        if not blanks:
            found.append(np.array(grid, dtype=np.int64).reshape(side, side))
            return
        best, fewest = 0, side + 1
        for i, (_, r, c, b) in enumerate(blanks):
            count = (full & ~(rows[r] | columns[c] | boxes[b])).bit_count()
            if count < fewest:
                best, fewest = i, count
                if count <= 1:
                    break
        cell, r, c, b = blanks.pop(best)
        free = full & ~(rows[r] | columns[c] | boxes[b])
        digits = [d for d in range(1, side + 1) if free >> (d - 1) & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            bit = 1 << (digit - 1)
            rows[r] |= bit
            columns[c] |= bit
            boxes[b] |= bit
            grid[cell] = digit
            descend()
            rows[r] ^= bit
            columns[c] ^= bit
            boxes[b] ^= bit
            if len(found) >= limit:
                break
        grid[cell] = 0
        blanks.insert(best, (cell, r, c, b))

    descend()
    return found


def random_grid(box: int, rng: np.random.Generator) -> np.ndarray:
    """A complete board."""
    return solutions(np.zeros((box * box, box * box), dtype=np.int64), limit=1, rng=rng)[0]


def make_puzzle(grid: np.ndarray, blanks: int, rng: np.random.Generator) -> np.ndarray:
    """Blanks out cells of a complete board in random order while it stays the only solution, ``blanks`` at
    most."""
    puzzle = grid.copy()
    flat = puzzle.reshape(-1)
    left = blanks
    for cell in rng.permutation(flat.size):
        if left == 0:
            break
        digit, flat[cell] = flat[cell], 0
        if len(solutions(puzzle, limit=2)) == 1:
            left -= 1
        else:
            flat[cell] = digit
    return puzzle


def shuffle(puzzle: np.ndarray, grid: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same random symmetry of both: digits renamed, transposed or not, bands and stacks permuted, rows and
    columns permuted within them."""
    side = _side(puzzle)
    box = int(side**0.5)
    digits = np.concatenate([[0], rng.permutation(side) + 1])
    transpose = rng.random() < 0.5

    def lines() -> np.ndarray:
        return np.concatenate([band * box + rng.permutation(box) for band in rng.permutation(box)])

    rows, columns = lines(), lines()

    def move(board: np.ndarray) -> np.ndarray:
        board = board.T if transpose else board
        return digits[board[rows][:, columns]]

    return move(puzzle), move(grid)


@functools.cache
def _placements() -> np.ndarray:
    """(128, 16): for each symmetry of a 4 x 4 board that keeps its digits, the cell that comes to each place."""
    cells = np.arange(16).reshape(4, 4)
    lines = [
        [2 * band + line for band, order in zip(bands, orders, strict=True) for line in order]
        for bands in itertools.permutations(range(2))
        for orders in itertools.product(itertools.permutations(range(2)), repeat=2)
    ]
    every = itertools.product((cells, cells.T), lines, lines)
    return np.array([board[rows][:, columns].ravel() for board, rows, columns in every])


def canonical(board: np.ndarray) -> int:
    """A number that a 4 x 4 board shares with its images under :func:`shuffle`, and with no other board.

    The least of its 128 placements with digits renamed in order of appearance, read in base 5.
    """
    if _side(board) != 4:
        raise ValueError(f"sudoku: canonical is for 4 x 4 boards, given {board.shape}")
    images = board.ravel()[_placements()]  # (128, 16)
    first = np.stack([np.where((images == d).any(1), (images == d).argmax(1), 16) for d in range(1, 5)], 1)
    names = 1 + (first[:, None, :] < first[:, :, None]).sum(2)  # (128, 4), of each digit
    names = np.concatenate([np.zeros((128, 1), dtype=np.int64), names], 1)
    return int((np.take_along_axis(names, images, 1) @ 5 ** np.arange(15, -1, -1)).min())


def is_solution(board: np.ndarray) -> bool:
    """Every row, column and box holds each digit once."""
    side = _side(board)
    box = int(side**0.5)
    boxes = board.reshape(box, box, box, box).swapaxes(1, 2).reshape(side, side)
    every = np.arange(1, side + 1)
    return all((np.sort(lines, axis=1) == every).all() for lines in (board, board.T, boxes))


def draw(board: np.ndarray, grid: np.ndarray | None = None) -> str:
    """The board as text with lines between boxes; blanks are dots. Given the right ``grid``, what differs from
    it is followed by ``!``."""
    side = _side(board)
    box = int(side**0.5)
    width = len(str(side))
    lines = []
    for r in range(side):
        if r and r % box == 0:
            lines.append("+".join(["-" * (box * (width + 1) + 1)] * box))
        cells = []
        for c in range(side):
            digit = int(board[r, c])
            wrong = digit != 0 and grid is not None and digit != grid[r, c]
            cells.append(("." if digit == 0 else str(digit)).rjust(width) + ("!" if wrong else " "))
        lines.append("|".join(" " + "".join(cells[i : i + box]) for i in range(0, side, box)).rstrip())
    return "\n".join(lines)


def _side(board: np.ndarray) -> int:
    side = board.shape[-1]
    box = round(side**0.5)
    if board.ndim != 2 or board.shape != (side, side) or box * box != side:
        raise ValueError(f"sudoku: the board has shape {board.shape}; it must be square, with a square side")
    return side
