"""ARC: task files, images and their inverses, folders against a plain builder, votes and pass@k."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastattn.train.data import arc
from fastattn.train.data.arc import Image, Task, Votes, from_tokens, image_name, named_image, to_tokens
from fastattn.train.data.arc_folder import build_arc, read_votes
from fastattn.train.data.grids import symmetry, undone
from fastattn.train.data.puzzles import PuzzleFolder, write_split

grids = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 9))
)
images = st.builds(Image, st.integers(0, 7), st.permutations(range(1, 10)).map(lambda colors: (0, *colors)))


def test_the_eight_symmetries_differ_and_are_undone():
    grid = np.arange(6).reshape(2, 3)
    seen = {symmetry(grid, number).tobytes() + bytes(symmetry(grid, number).shape) for number in range(8)}
    assert len(seen) == 8
    for number in range(8):
        np.testing.assert_array_equal(undone(symmetry(grid, number), number), grid)
    # against the clock; left and right; top and bottom; the main diagonal; the other one
    corners = [symmetry(grid, number)[0, 0] for number in range(8)]
    assert corners == [
        grid[0, 0],
        grid[0, 2],
        grid[1, 2],
        grid[1, 0],
        grid[0, 2],
        grid[1, 0],
        grid[0, 0],
        grid[1, 2],
    ]
    with pytest.raises(ValueError, match="number is 8; it must be from 0 to 7"):
        symmetry(grid, 8)


@given(grids, images, st.sampled_from(["|||", "_"]))
def test_images_are_undone_and_named(grid, image, separator):
    np.testing.assert_array_equal(image.back(image.of(grid)), grid)
    assert (image.of(grid) == 0).sum() == (grid == 0).sum()  # black stays
    name = image_name("task_1", image)
    assert named_image(name) == ("task_1", image)
    if image != Image() and separator == "_":  # as HRM writes it
        assert named_image(name.replace("|||", "_")) == ("task_1", image)


def test_names_that_are_no_images():
    for name in ("00576224", "a_b", "a_t3_0123", "a|||t3|||0123456788", "a|||t9|||0123456789"):
        assert named_image(name) == (name, Image())


@given(grids, st.data())
def test_tokens_hold_the_grid_between_its_edges(grid, data):
    rows, columns = grid.shape
    side = data.draw(st.integers(max(rows, columns), 8))
    row, column = data.draw(st.integers(0, side - rows)), data.draw(st.integers(0, side - columns))
    board = to_tokens(grid, side, row, column).reshape(side, side)
    np.testing.assert_array_equal(board[row : row + rows, column : column + columns], grid + 2)
    edge = np.zeros((side, side), bool)
    edge[row + rows : row + rows + 1, column : column + columns] = True
    edge[row : row + rows, column + columns : column + columns + 1] = True
    np.testing.assert_array_equal(board == 1, edge)
    assert (board == 0).sum() == side * side - grid.size - edge.sum()
    np.testing.assert_array_equal(from_tokens(to_tokens(grid, side)), grid)


@given(arrays(np.int64, (5, 5), elements=st.sampled_from([0, 1, 2, 5, 11, 12])))
def test_the_largest_rectangle_is_read(board):
    best = (0, None)
    for rows in range(1, 6):
        for columns in range(1, 6):
            part = board[:rows, :columns]
            if ((part >= 2) & (part <= 11)).all() and part.size > best[0]:
                best = (part.size, part - 2)
    got = from_tokens(board.ravel())
    if best[1] is None:
        assert got is None
    else:
        np.testing.assert_array_equal(got, best[1])


def task_json(seed, tests=1, outputs=True, side=4):
    rng = np.random.default_rng(seed)

    def pair(output):
        given, answer = (rng.integers(0, 10, rng.integers(1, side + 1, 2)).tolist() for _ in range(2))
        return {"input": given} | ({"output": answer} if output else {})

    return {"train": [pair(True) for _ in range(3)], "test": [pair(outputs) for _ in range(tests)]}


@pytest.fixture
def raw(tmp_path):
    """Three training tasks and two held-out ones, a file each."""
    for number, set_name in enumerate(["training"] * 3 + ["evaluation"] * 2):
        path = tmp_path / "raw" / "data" / set_name / f"task_{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task_json(number, tests=1 + number % 2)))
    return tmp_path / "raw"


def as_key(pair):
    return tuple((grid.shape, grid.tobytes()) for grid in pair)


def test_a_folder_has_every_pair_of_every_image_where_it_belongs(raw, tmp_path):
    said = build_arc([raw], tmp_path / "out", augmentations=7, side=6, seed=3)
    assert said == [
        "train: 5 tasks, 40 with their images, 152 pairs",
        "test: 2 tasks, 16 with their images, 24 pairs",
    ]
    names = json.loads((tmp_path / "out" / "identifiers.json").read_text())
    assert names[0] == "<blank>" and len(set(names)) == len(names) == 41
    tasks = {task.name: task for task in arc.read_tasks([raw])}
    found = {}
    for split in ("train", "test"):
        folder = PuzzleFolder(tmp_path / "out", split)
        metadata = folder.metadata
        assert (metadata.vocab_size, metadata.seq_len, metadata.num_puzzle_identifiers) == (12, 36, 41)
        moved = Counter()
        for batch in folder.examples(16):
            for number, asked, answer in zip(
                batch["puzzle_ids"], batch["inputs"], batch["labels"], strict=True
            ):
                answer = np.where(answer == -100, 0, answer)
                boards = [tokens.reshape(6, 6) for tokens in (asked.numpy(), answer)]
                name, image = named_image(names[number])
                # one place for both, so that the first color is at the least row and column of either
                rows = min(np.nonzero((board > 1).any(1))[0][0] for board in boards)
                columns = min(np.nonzero((board > 1).any(0))[0][0] for board in boards)
                moved[int(number)] += bool(rows or columns)
                pair = [from_tokens(np.roll(board, (-rows, -columns), (0, 1)).ravel()) for board in boards]
                for grid, board in zip(pair, boards, strict=True):
                    np.testing.assert_array_equal(to_tokens(grid, 6, rows, columns).reshape(6, 6), board)
                found.setdefault((split, name), []).append(as_key([image.back(grid) for grid in pair]))
        if split == "test":
            assert not sum(moved.values())
        else:
            assert sum(moved.values()) > 60  # 112 pairs are free to move; most have two or more places
            for number, count in moved.items():
                held = tasks[named_image(names[number])[0]]
                total = len(held.train) + (len(held.test) if held.set == "training" else 0)
                assert count < total  # one stays
    for name, task in tasks.items():
        held = task.set == "evaluation"
        for split, pairs in (
            ("train", [*task.train, *([] if held else task.test)]),
            ("test", task.test if held else []),
        ):
            assert Counter(found.get((split, name), ())) == Counter({as_key(pair): 8 for pair in pairs})
    again = tmp_path / "again"
    build_arc([raw], again, augmentations=7, side=6, seed=3)
    for path in sorted((tmp_path / "out").rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "out")).read_bytes()


def test_images_are_all_different_and_as_many_as_there_are():
    one = Task("one", "s", [(np.zeros((1, 1), np.uint8), np.array([[1]], np.uint8))], [])
    looks = {
        int(image.of(np.array([[1]], np.uint8))[0, 0])
        for image in arc.images_of(one, 50, np.random.default_rng(0))
    }
    assert looks == set(range(1, 10)) and len(arc.images_of(one, 50, np.random.default_rng(0))) == 9


def test_kaggle_files_give_the_same_folder(raw, tmp_path):
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    for set_name in ("training", "evaluation"):
        challenges, solutions = {}, {}
        for path in sorted((raw / "data" / set_name).glob("*.json")):
            task = json.loads(path.read_text())
            solutions[path.stem] = [pair.pop("output") for pair in task["test"]]
            challenges[path.stem] = task
        (kaggle / f"arc-agi_{set_name}_challenges.json").write_text(json.dumps(challenges))
        (kaggle / f"arc-agi_{set_name}_solutions.json").write_text(json.dumps(solutions))
    options = {"augmentations": 2, "side": 6}
    build_arc([raw], tmp_path / "a", **options)
    build_arc([kaggle], tmp_path / "b", **options)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    (kaggle / "arc-agi_evaluation_solutions.json").unlink()
    build_arc([kaggle], tmp_path / "c", **options)
    assert all((batch["labels"] == -100).all() for batch in PuzzleFolder(tmp_path / "c", "test").examples(8))
    votes = read_votes(tmp_path / "c")
    assert votes.asked() == [] and votes.pass_at([1]) == {1: (0.0, 0.0)}


def test_what_is_left_out_is_said(raw, tmp_path):
    tasks = {path.stem: path.read_text() for path in raw.rglob("*.json")}
    (raw / "data" / "training" / "task_3.json").write_text(tasks["task_3"])  # held out, and trained on
    large = task_json(9)
    large["train"][0]["input"] = np.zeros((7, 2), int).tolist()
    (raw / "data" / "training" / "large.json").write_text(json.dumps(large))
    copied = task_json(10)
    copied["train"][1] = json.loads(tasks["task_4"])["test"][0]
    (raw / "data" / "training" / "copied.json").write_text(json.dumps(copied))
    said = build_arc([raw], tmp_path / "out", augmentations=0, side=6)
    assert said[:3] == [
        "1 tasks are there twice and are taken once, as held out if one is",
        "1 tasks have grids larger than 6 x 6 and are left out",
        "1 of the held-out tests are pairs that another task trains on: leave its set out with sets",
    ]
    assert said[4] == "test: 2 tasks, 2 with their images, 3 pairs"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"test_set": "test"}, "there is no set 'test'; there are evaluation, training"),
        (None, {"sets": ["training"]}, "the test set 'evaluation' must be one of the sets, training"),
        (None, {"sets": ["evaluation", "concept"]}, "there is no set 'concept'"),
        ("[1]", {}, "x.json: not an ARC task"),
        ('{"train": [], "test": []}', {}, "x.json: holds no pair"),
        ('{"train": [{"input": [[1]]}], "test": []}', {}, "x.json: train 1: has no output"),
        ('{"train": [], "test": [{"output": [[1]]}]}', {}, "x.json: test 1: an object with an input"),
        (
            '{"train": [], "test": [{"input": [[1], [1, 2]]}]}',
            {},
            "test 1: input: must be a list of rows of equal",
        ),
        ('{"train": [], "test": [{"input": [[10]]}]}', {}, "test 1: input: holds 10; colors are from 0 to 9"),
        ('{"train": [], "test": [{"input": [[true]]}]}', {}, "test 1: input: holds True"),
        (json.dumps({"train": [], "test": [{"input": [[1] * 31]}]}), {}, "is 1 x 31; at most 30 x 30"),
        ("{", {}, "x.json: not readable as JSON"),
        (json.dumps(task_json(77) | {"name": "task_0"}), {}, "a task of this name, with other pairs, is in"),
    ],
)
def test_bad_sources(raw, tmp_path, change, options, message):
    if change is not None:
        (raw / "data" / "training" / "x.json").write_text(change)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_arc([raw], tmp_path / "out", augmentations=0, **options)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        build_arc([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no ARC task"):
        build_arc([tmp_path / "empty"], tmp_path / "out")


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_votes_rank_by_number_then_by_certainty(seed):
    rng = np.random.default_rng(seed)
    given = [rng.integers(0, 10, (2, 3)).astype(np.uint8) for _ in range(2)]
    answers = [rng.integers(0, 10, (2, 2)).astype(np.uint8) for _ in range(3)]
    own = [Image(), *(Image.random(rng) for _ in range(9))]
    tests = [(given[0], answers[0]), (given[1], answers[1])]
    votes = Votes(
        ["<blank>", *(image_name("t", image) for image in own)], {"t": tests, "other": [(given[0], None)]}
    )
    expected: dict = {}
    for number in rng.permutation(10):
        for test in range(2):
            choice, sure = rng.integers(3), rng.random()
            answer = to_tokens(own[number].of(answers[choice]), 4)
            if rng.random() < 0.2:
                answer = np.zeros(16)  # holds no grid
            else:
                key = answers[choice].tobytes()
                expected.setdefault(test, {}).setdefault(key, []).append(sure)
            votes.add([number + 1], to_tokens(own[number].of(given[test]), 4)[None], answer[None], [sure])
    if given[0].tobytes() == given[1].tobytes():
        return
    places = []
    for test in range(2):
        order = sorted(
            expected.get(test, {}).items(), key=lambda item: (len(item[1]), np.mean(item[1])), reverse=True
        )
        got = votes.ranking("t", given[test])
        assert [grid.tobytes() for grid, *_ in got] == [key for key, _ in order]
        assert [count for _, count, _ in got] == [len(chances) for _, chances in order]
        places.append(
            [key for key, _ in order].index(answers[test].tobytes())
            if answers[test].tobytes() in dict(order)
            else 9
        )
    assert votes.asked() == ["t"]
    for k, (share, whole) in votes.pass_at([1, 2, 3]).items():
        assert share == np.mean([place < k for place in places])
        assert whole == all(place < k for place in places)
    submission = votes.submission()
    assert submission["other"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}]
    for test, attempts in enumerate(submission["t"]):
        ranked = [grid.tolist() for grid, *_ in votes.ranking("t", given[test])[:2]]
        assert [attempts["attempt_1"], attempts["attempt_2"]] == (ranked + ranked[:1] + [[[0]]] * 2)[:2]


def test_an_input_that_is_no_test_is_refused():
    votes = Votes(["<blank>", "t"], {"t": [(np.ones((2, 2), np.uint8), None)]})
    with pytest.raises(ValueError, match="an input of puzzle 1 is no test of task 't'"):
        votes.add([1], to_tokens(np.zeros((2, 2), np.uint8), 4)[None], np.zeros((1, 16)), [0.5])


def test_a_folder_of_hrm_s_own_has_its_tests_in_the_split(raw, tmp_path):
    """HRM's builder writes no test_puzzles.json and other names."""
    build_arc([raw], tmp_path / "out", augmentations=3, side=6)
    wanted = read_votes(tmp_path / "out")
    (tmp_path / "out" / "test_puzzles.json").unlink()
    path = tmp_path / "out" / "identifiers.json"
    path.write_text(path.read_text().replace("|||", "_"))
    got = read_votes(tmp_path / "out")
    assert list(got.tests) == list(wanted.tests)
    for name, pairs in wanted.tests.items():
        assert [as_key(pair) for pair in got.tests[name]] == [as_key(pair) for pair in pairs]


def test_a_folder_of_other_puzzles_has_no_votes(raw, tmp_path):
    build_arc([raw], tmp_path / "out", augmentations=0, side=6)
    path = tmp_path / "out" / "identifiers.json"
    path.write_text('["<blank>"]')
    assert read_votes(tmp_path / "out") is None
    path.write_text('["<blank>", "a"]')
    with pytest.raises(ValueError, match=r"has 2 names; dataset.json counts 6"):
        read_votes(tmp_path / "out")
    path.write_text("{}")
    with pytest.raises(ValueError, match="a list of names is needed"):
        read_votes(tmp_path / "out")
    path.unlink()
    assert read_votes(tmp_path / "out") is None


def test_a_split_with_too_few_rows_leaves_no_file(tmp_path):
    rows = np.zeros((2, 4), np.uint8)
    with pytest.raises(ValueError, match="there are 2 examples; puzzle_indices has 3"):
        write_split(
            *(tmp_path, "train", [(rows, rows)]),
            vocab_size=2,
            seq_len=4,
            puzzle_identifiers=np.zeros(3),
            puzzle_indices=np.arange(4),
            group_indices=np.arange(4),
        )
    assert list((tmp_path / "train").iterdir()) == []
