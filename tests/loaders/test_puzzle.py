"""Puzzles: functions of (seed, view, index), tiles cut bit for bit where they should be, and nothing by which to cheat."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttrain.loaders import Batch, Dataset, LoaderSpec, Puzzle, ViewPlan, evaluation, open_dataset, open_loader
from fasttrain.loaders.datasets.base import Pixels
from fasttrain.loaders.pack import pack
from fasttrain.loaders.permutations import permutations
from PIL import Image
from scipy.stats import chi2_contingency, chisquare

from .samples import pixels

PUZZLE = Puzzle(permutations=20)
N = 23


def dataset_of(image_NHWC: np.ndarray) -> Dataset:
    index_N = np.arange(len(image_NHWC))
    return Dataset("made up", ("a",), np.zeros_like(index_N), Pixels(image_NHWC), {"train": index_N}, "")


def spec_of(**changes) -> LoaderSpec:
    plan = ViewPlan(crop="random_resized", flip="both")
    base = LoaderSpec(dataset_of(pixels(N, 40)), np.arange(N), plan, size=34, stored=0, batch=6, seed=5, puzzle=PUZZLE)
    return replace(base, view_seed=9, **changes)


def served(spec: LoaderSpec, name: str = "resident", *, epoch: int = 0, workers: int = 0) -> list[Batch]:
    loader = open_loader(name, spec, workers=workers)
    loader.set_epoch(epoch)
    try:
        return list(loader)
    finally:
        loader.close()


def by_index(batches: list[Batch]) -> dict[int, tuple[int, torch.Tensor]]:
    """Index -> label and pixels."""
    return {
        int(i): (int(label), tile)
        for batch in batches
        for i, label, tile in zip(batch.index, batch.targets, batch.pixels, strict=True)
    }


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for index, (label, tile) in ours.items():
        assert label == theirs[index][0] and torch.equal(tile, theirs[index][1]), index


def many(puzzle: Puzzle, size: int, count: int = 20_000):
    """The pieces of so many samples."""
    return puzzle.pieces(size, seed=3, number_B=np.zeros(count, np.int64), index_B=np.arange(count))


def assert_even(values, below: int) -> None:
    """0 .. below - 1, each equally often."""
    count_K = np.bincount(np.ravel(values), minlength=below)
    assert len(count_K) == below and chisquare(count_K).pvalue > 1e-3, count_K


def by_hand(puzzle: Puzzle, image_BHWC: np.ndarray, pieces) -> np.ndarray:
    """Tile by tile: uint8 [B, P, T, T, 3]."""
    size = image_BHWC.shape[1]
    side, cell = puzzle.side(size), size // puzzle.grid
    out = np.zeros((len(image_BHWC), puzzle.places, side, side, 3), np.uint8)
    for b, place in np.ndindex(*out.shape[:2]):
        partner = b + 1 if b % 2 == 0 else b - 1
        image_HWC = image_BHWC[partner if pieces.other_BP[b, place] else b]
        row, column = divmod(int(pieces.cell_BP[b, place]), puzzle.grid)
        down, right = pieces.offset_BP2[b, place]
        for colour in range(3):
            more_down, more_right = pieces.shift_BPC2[b, place, colour]
            top, left = row * cell + down + more_down, column * cell + right + more_right
            out[b, place, :, :, colour] = image_HWC[top : top + side, left : left + side, colour]
        if pieces.grey_B[b]:
            red, green, blue = np.moveaxis(out[b, place].astype(np.float64), -1, 0)
            out[b, place] = np.floor((77 * red + 150 * green + 29 * blue) / 256 + 0.5)[..., None]
    return out


@pytest.mark.parametrize(
    ("size", "puzzle"),
    [
        (34, Puzzle()),
        (35, Puzzle(replaced=9, grey=0.5, channel_shift=0, tile=11)),
        (36, Puzzle(tile=1, channel_shift=11)),
        (31, Puzzle(grid=2, permutations=24, tile=5, replaced=4, grey=0)),
        (9, Puzzle(channel_shift=1, replaced=0, grey=1)),
    ],
)
def test_tiles_are_cut_bit_for_bit(size, puzzle):
    """Of batches of even and odd length: in an odd one the last has no neighbour, and all tiles are its own."""
    for count in (1, 4, 7):
        image_BHWC = pixels(count, size, seed=count)
        where_B2 = np.stack([np.arange(count) * 3, np.arange(count) % 2], axis=1)
        index, view = torch.from_numpy(where_B2).T
        batch = Batch(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2), torch.zeros(count), index, view, None, where_B2)
        made = puzzle(batch, seed=8)
        alone_B = np.arange(count) == (count - 1 if count % 2 else count)
        pieces = puzzle.pieces(size, seed=8, number_B=view.numpy(), index_B=index.numpy(), alone_B=alone_B)
        expected = by_hand(puzzle, image_BHWC, pieces)
        assert made.pixels.dtype == torch.uint8 and made.targets.dtype == torch.int64
        assert made.pixels.shape == (count, 3, puzzle.places, puzzle.side(size), puzzle.side(size))
        assert made.pixels.is_contiguous(memory_format=torch.channels_last_3d)
        assert (made.pixels.permute(0, 2, 3, 4, 1).numpy() == expected).all()
        assert made.targets.tolist() == pieces.label_B.tolist() and made.index is index and made.view is view
        if count % 2:
            assert not pieces.other_BP[-1].any()
        planes = replace(batch, pixels=batch.pixels.contiguous())
        assert torch.equal(puzzle(planes, seed=8).pixels, made.pixels)


def test_pieces_are_a_function_of_seed_view_and_index():
    """Whatever comes before, after and beside a sample; each of the three changes them."""
    index_B, number_B = np.arange(60) * 1_000_003, np.arange(60) % 3
    every = PUZZLE.pieces(40, seed=2**63 + 1, number_B=number_B, index_B=index_B)
    fields = vars(every)
    for part in (np.arange(60)[::-1], np.array([7]), np.arange(5, 50, 4)):
        its = PUZZLE.pieces(40, seed=2**63 + 1, number_B=number_B[part], index_B=index_B[part])
        for name, value in fields.items():
            assert (getattr(its, name) == value[part]).all(), name
    labels = PUZZLE.labels(seed=2**63 + 1, number_B=number_B, index_B=index_B)
    assert (labels == every.label_B).all() and labels.dtype == np.int64
    others = [(3, number_B, index_B), (2**63 + 1, number_B + 1, index_B), (2**63 + 1, number_B, index_B + 1)]
    for seed, number, index in others:
        its = PUZZLE.pieces(40, seed=seed, number_B=number, index_B=index)
        assert all((getattr(its, name) != value).any() for name, value in fields.items())


@pytest.mark.parametrize("batch", [6, 7, 5])
def test_ranks_and_loaders_serve_the_same_puzzles(batch):
    """The last batch has 5, 2 or 3 samples, and parts are empty."""
    spec = spec_of(batch=batch)
    whole = by_index(served(spec))
    assert len(whole) == N
    for workers in (0, 2):
        assert_same(by_index(served(spec, "torch", workers=workers)), whole)
    for ranks in (2, 3, 4):
        parts = [by_index(served(replace(spec, rank=r, ranks=ranks))) for r in range(ranks)]
        assert sum(map(len, parts)) == N
        assert_same({k: v for part in parts for k, v in part.items()}, whole)


def test_packed_images_make_the_same_puzzles(tmp_path, need):
    """Of batches of 5 on 2 ranks, whose last has 4: the second rank's part is 3, 3 and 2."""
    need("ffcv")
    for i, image_HWC in enumerate(pixels(14, 40)):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(image_HWC).save(tmp_path / "a" / f"{i:02}.png")
    pack(open_dataset("folder", tmp_path), tmp_path / "x.beton", workers=1)
    spec = spec_of(dataset=open_dataset("beton", tmp_path / "x.beton"), index_N=np.arange(14), batch=5)
    whole = by_index(served(spec, "torch"))
    part = by_index(served(replace(spec, rank=1, ranks=2), "ffcv", workers=1))
    assert len(part) == 8
    assert_same(part, {index: whole[index] for index in part})


def test_going_on_inside_an_epoch_gives_the_same_puzzles():
    for name in ("resident", "torch"):
        loader = open_loader(name, spec_of(), workers=0)
        loader.set_epoch(2)
        walk = iter(loader)
        next(walk), next(walk)
        state = loader.state_dict()
        rest = by_index(list(walk))
        other = open_loader(name, spec_of(), workers=0)
        other.load_state_dict(state)
        assert_same(by_index(list(other)), rest)
        assert len(rest) == N - 12


def test_every_epoch_has_new_puzzles_or_every_kth_the_same():
    for views, again in ((0, None), (2, 2)):
        plan = ViewPlan(crop="random_resized", views=views)
        epochs = [by_index(served(spec_of(plan=plan, shuffle=False), epoch=e)) for e in range(3)]
        labels = [[label for label, _ in epoch.values()] for epoch in epochs]
        assert labels[0] != labels[1]
        assert (labels[0] == labels[2]) == (again == 2)
        if again:
            assert_same(epochs[0], epochs[2])


def test_evaluation_has_one_puzzle_an_image():
    spec = spec_of(plan=evaluation(0.875), shuffle=False, batch=250)
    first, later = (by_index(served(spec, epoch=e)) for e in (0, 5))
    assert_same(first, later)
    labels = PUZZLE.labels(seed=9, number_B=np.zeros(N, np.int64), index_B=np.arange(N))
    assert [label for label, _ in first.values()] == labels.tolist()


@pytest.mark.parametrize("replaced", [0, 2, 9])
def test_no_cell_comes_twice(replaced):
    """Own tiles lie as the order says, another's are of as many different cells as there are of them."""
    puzzle = replace(PUZZLE, replaced=replaced)
    pieces = many(puzzle, 40, 3000)
    order_BP = permutations(3, 20)[pieces.label_B]
    own_BP = ~pieces.other_BP
    assert (pieces.cell_BP[own_BP] == order_BP[own_BP]).all()
    count_B = pieces.other_BP.sum(1)
    assert set(count_B.tolist()) == set(range(replaced + 1))
    for cell_P, other_P in zip(pieces.cell_BP, pieces.other_BP, strict=True):
        for part in (cell_P[other_P], cell_P[~other_P]):
            assert len(set(part.tolist())) == len(part)
    if not replaced:
        assert (np.sort(pieces.cell_BP, axis=1) == np.arange(9)).all()


def test_everything_is_drawn_evenly():
    puzzle = Puzzle(permutations=50, tile=6)
    pieces = many(puzzle, 34)  # cells of 11: 6 and a shift of 2 leave room for offsets of 0 to 3
    assert_even(pieces.label_B, 50)
    assert_even(pieces.other_BP.sum(1), 3)
    assert_even(np.nonzero(pieces.other_BP)[1], 9)
    assert_even(pieces.cell_BP[pieces.other_BP], 9)
    assert_even(pieces.offset_BP2, 4)
    assert_even(pieces.shift_BPC2, 3)
    for axis in (0, 1):
        assert_even(pieces.offset_BP2[:, 4, axis], 4)
        assert_even(pieces.shift_BPC2[:, 4, 1, axis], 3)
    grey = pieces.grey_B.mean()
    assert abs(grey - 0.7) < 4 * np.sqrt(0.7 * 0.3 / len(pieces.grey_B))


def test_what_is_drawn_has_nothing_to_do_with_the_order():
    """Colours' shifts, offsets, grey and the number of tiles replaced: independent of each other, of label, cell and place."""
    pieces = many(Puzzle(permutations=9, tile=6, replaced=2), 34)
    place_BP = np.broadcast_to(np.arange(9), pieces.cell_BP.shape)
    label_BP = np.broadcast_to(pieces.label_B[:, None], pieces.cell_BP.shape)
    down_BP, right_BP = np.moveaxis(pieces.offset_BP2, -1, 0)
    red_BP, green_BP = pieces.shift_BPC2[:, :, 0, 0], pieces.shift_BPC2[:, :, 1, 0]
    pairs = [(a, b) for a in (down_BP, red_BP, green_BP) for b in (pieces.cell_BP, place_BP, label_BP)]
    pairs += [(down_BP, right_BP), (red_BP, green_BP), (down_BP, red_BP), (red_BP, pieces.shift_BPC2[:, :, 0, 1])]
    pairs += [(red_BP[:, 0], red_BP[:, 1]), (down_BP[:, 3], down_BP[:, 4])]
    pairs += [(pieces.grey_B, pieces.label_B), (pieces.other_BP.sum(1), pieces.label_B)]
    pairs += [(pieces.other_BP.sum(1), pieces.grey_B), (pieces.other_BP, place_BP)]
    for number, (a, b) in enumerate(pairs):
        table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
        np.add.at(table, (a.astype(int).ravel(), b.astype(int).ravel()), 1)
        assert chi2_contingency(table).pvalue > 1e-3, number


@pytest.mark.parametrize(("size", "puzzle"), [(34, Puzzle()), (225, Puzzle(tile=64)), (31, Puzzle(grid=2))])
def test_tiles_lie_inside_their_cells(size, puzzle):
    """Anywhere in them, so that the gap between two that are neighbours in the image is from nothing to twice the room."""
    puzzle = replace(puzzle, permutations=2, replaced=0)
    pieces, cell, side = many(puzzle, size), size // puzzle.grid, puzzle.side(size)
    begin = pieces.offset_BP2[:, :, None] + pieces.shift_BPC2
    assert begin.min() == 0 and begin.max() == cell - side
    first_B = pieces.label_B == 0  # tiles 0 and 1 lie where they were
    gap = cell - begin[first_B, 0, 0, 1] - side + begin[first_B, 1, 0, 1]
    assert gap.min() <= 0.2 * (cell - side) and gap.max() >= 1.8 * (cell - side) and len(np.unique(gap)) > 3


def test_no_tile_shows_its_neighbours():
    """Of images whose cells have a value each, and the rest of it another, each tile has its own cell's."""
    cell_SS = np.full((34, 34), 200, np.uint8)
    for cell in range(9):
        row, column = divmod(cell, 3)
        cell_SS[row * 11 : row * 11 + 11, column * 11 : column * 11 + 11] = 20 * cell
    image_NHWC = np.repeat(np.stack([cell_SS] * N)[..., None], 3, axis=3)
    plan = ViewPlan(crop="pad", pad=0, flip="none")
    for batch in served(spec_of(dataset=dataset_of(image_NHWC), plan=plan)):
        alone_B = np.arange(len(batch)) == (len(batch) - 1 if len(batch) % 2 else len(batch))
        index_B, number_B = batch.where_B2.T
        pieces = PUZZLE.pieces(34, seed=9, number_B=number_B, index_B=index_B, alone_B=alone_B)
        own_BP = ~pieces.other_BP
        value_BP = batch.pixels[:, 0, :, 0, 0].numpy()
        assert (batch.pixels == batch.pixels[:, :1, :, :1, :1]).all()
        assert (value_BP[own_BP] == 20 * permutations(3, 20)[pieces.label_B][own_BP]).all()


def test_facing_edges_do_not_fit():
    """Of a ramp from left to right: between two neighbours some of it is missing, now more, now less."""
    image_NHWC = np.broadcast_to((np.arange(60) * 4).astype(np.uint8)[:, None], (400, 60, 60, 3)).copy()
    puzzle = Puzzle(permutations=2, replaced=0, channel_shift=0, grey=0)
    plan = ViewPlan(crop="pad", pad=0, flip="none")
    spec = spec_of(dataset=dataset_of(image_NHWC), index_N=np.arange(400), plan=plan, puzzle=puzzle, size=60, batch=400)
    (batch,) = served(spec)
    tiles = batch.pixels[batch.targets == 0, 0].int()
    missing = (tiles[:, 1, 0, 0] - tiles[:, 0, 0, -1]) // 4 - 1
    assert missing.min() >= 0 and missing.float().mean() == pytest.approx(5, abs=0.5) and len(missing.unique()) > 8


def test_grey_puzzles_have_no_colour():
    for grey in (0.0, 1.0):
        for batch in served(spec_of(puzzle=replace(PUZZLE, grey=grey))):
            same = (batch.pixels == batch.pixels[:, :1]).flatten(1).all(1)
            assert (same if grey else ~same).all()


def test_sides_of_tiles():
    """As asked, or three quarters of the cell, but no more than the shift of colours leaves."""
    assert [Puzzle().side(size) for size in (225, 75, 36, 24, 227)] == [56, 19, 9, 6, 56]
    assert Puzzle(channel_shift=5).side(24) == 3 and Puzzle(tile=64).side(225) == 64
    assert Puzzle(grid=2, permutations=2).side(31) == 11
    for puzzle, size in ((Puzzle(tile=10), 34), (Puzzle(channel_shift=11), 34), (Puzzle(), 8), (Puzzle(), 2)):
        with pytest.raises(ValueError, match=r"^pretext\.tile: tiles of .* do not fit into cells of \d+ pixels"):
            puzzle.side(size)


def test_names_are_the_orders():
    assert Puzzle(grid=2, permutations=3).names[0] == "1 2 3 4" and len(set(Puzzle().names)) == 701


def test_clips_are_refused():
    where_B2 = np.zeros((2, 2), np.int64)
    clip = Batch(torch.zeros(2, 3, 4, 34, 34, dtype=torch.uint8), *torch.zeros(3, 2).long(), None, where_B2)
    with pytest.raises(ValueError, match=r"^pretext\.task: .* set data\.frames to 0$"):
        PUZZLE(clip, seed=0)
