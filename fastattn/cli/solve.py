"""`fastattn solve`: one puzzle, solved by a trained HRM and drawn."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(solve)


def solve(
    puzzle: Annotated[
        str,
        typer.Argument(
            help="Sudoku: its digits row by row, 0 or . for a blank; spaces and the lines of a drawing are skipped. "
            "Others: --alphabet's characters, or token numbers with spaces. - reads standard input, @FILE a file. "
            "ARC, with --data: the name of a held-out task, or @FILE, a task's JSON."
        ),
    ],
    model: Annotated[Path, typer.Option(help="Folder made by `fastattn train --model hrm` or `convert`.")],
    alphabet: Annotated[
        str | None,
        typer.Option(help="Characters of the tokens 1, 2, ... in the model's data; mazes of HRM: '# SGo'."),
    ] = None,
    puzzle_id: Annotated[int, typer.Option(help="Identifier of the puzzle's vector.")] = 0,
    segments: Annotated[int, typer.Option(help="Segments to think; each refines the answer.")] = 16,
    data: Annotated[
        Path | None,
        typer.Option(help="ARC: folder of puzzles that the model was trained on (`fastattn build arc`)."),
    ] = None,
    augmentations: Annotated[
        int | None, typer.Option(help="ARC: images of the task beside itself. Default: all in --data.")
    ] = None,
) -> None:
    """Solve one puzzle and draw the answer. Exits with 1 where a Sudoku's answer breaks its rules or its givens.

    Of an ARC task every test is solved under each of its images, and the answers that most of them agree on are drawn.
    """
    import torch

    from fastattn.cli import _arc, _puzzles
    from fastattn.train.data import sudoku

    if segments < 1:
        raise ValueError(f"--segments is {segments}; it must be at least 1")
    if augmentations is not None and (augmentations < 0 or data is None):
        raise ValueError(
            "--augmentations is for --data"
            if data is None
            else f"--augmentations is {augmentations}; it must be at least 0"
        )
    net = _puzzles.solver(model)
    if data is not None:
        if alphabet is not None or puzzle_id:
            raise ValueError("--data is for ARC, which takes no --alphabet and no --puzzle-id")
        _arc.solve(net, puzzle, data, segments, augmentations)
        return
    if puzzle == "-":
        puzzle = sys.stdin.read()
    elif puzzle.startswith("@"):
        path = Path(puzzle[1:])
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        puzzle = path.read_text(encoding="utf-8")
    config = net.config
    box = next(
        (n for n in (2, 3, 4) if config.seq_len == n**4 and config.vocab_size == sudoku.vocab_size(n)), None
    )
    is_sudoku = box is not None and alphabet is None
    tokens = _sudoku_tokens(puzzle, box) if is_sudoku else _tokens(puzzle, alphabet)
    if len(tokens) != config.seq_len:
        raise ValueError(f"puzzle: has {len(tokens)} cells; this model's have {config.seq_len}")
    if not all(0 <= token < config.vocab_size for token in tokens):
        raise ValueError(
            f"puzzle: holds the token {max(tokens)}; this model's are from 0 to {config.vocab_size - 1}"
        )
    if not 0 <= puzzle_id < config.num_puzzles:
        raise ValueError(f"--puzzle-id is {puzzle_id}; this model's are from 0 to {config.num_puzzles - 1}")
    given = torch.tensor([tokens])
    before, lines = given, []
    for number, (answer, q_halt) in enumerate(
        net.solve(given, torch.tensor([puzzle_id]), segments=segments), 1
    ):
        changed = int((answer != before).sum())
        lines.append(f"segment {number}: {changed} cells changed, sure {float(q_halt.sigmoid()):.2f}")
        before = answer
    if not is_sudoku:
        print(_drawn(before[0].tolist(), alphabet))
        print("\n".join(lines), file=sys.stderr)
        return
    start, end = (sudoku.from_tokens(board[0].numpy()) for board in (given, before))
    kept = ((start == 0) | (start == end)).all()
    solved = bool(kept and sudoku.is_solution(end))
    print(sudoku.draw(start), *lines, sudoku.draw(end), sep="\n")
    print(
        "solved"
        if solved
        else "not solved: " + ("rows, columns or boxes repeat digits" if kept else "givens changed")
    )
    if not solved:
        raise typer.Exit(1)


def _sudoku_tokens(text: str, box: int) -> list[int]:
    """Of digits, and letters from the tenth digit on."""
    tokens = []
    for character in text:
        if character.isspace() or character in "|-+":
            continue
        digit = (
            0
            if character in ".0_"
            else int(character, 36)
            if character.isalnum() and character.isascii()
            else -1
        )
        if not 0 <= digit <= box**2:
            raise ValueError(
                f"puzzle: {character!r} is no cell of a Sudoku with digits 1 to {box**2}; 0 or . is a blank"
            )
        tokens.append(digit + 1)
    return tokens


def _tokens(text: str, alphabet: str | None) -> list[int]:
    if alphabet is None:
        words = text.split()
        if not all(word.isdigit() for word in words):
            raise ValueError("puzzle: must be token numbers with spaces between them, or give --alphabet")
        return [int(word) for word in words]
    known = {character: token for token, character in enumerate(alphabet, 1)}
    tokens = []
    for character in text:
        if character in known:
            tokens.append(known[character])
        elif not character.isspace():
            raise ValueError(f"puzzle: {character!r} is not in --alphabet {alphabet!r}")
    return tokens


def _drawn(tokens: list[int], alphabet: str | None) -> str:
    """Square puzzles in rows; the alphabet's characters, or numbers."""
    side = round(len(tokens) ** 0.5)
    side = side if side * side == len(tokens) else len(tokens)
    if alphabet is None:
        width = len(str(max(tokens)))
        rows = [
            " ".join(str(t).rjust(width) for t in tokens[i : i + side]) for i in range(0, len(tokens), side)
        ]
    else:
        cells = [alphabet[t - 1] if 1 <= t <= len(alphabet) else "?" for t in tokens]
        rows = ["".join(cells[i : i + side]) for i in range(0, len(cells), side)]
    return "\n".join(rows)
