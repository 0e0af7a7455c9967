import numpy as np
from attrs import frozen
from hypothesis import assume, given
from hypothesis import strategies as st

from tangram.core.records import IGNORE
from tangram.plugins.data.packing import Epoch, Int64, epoch_of, pack, permutation, windows_of

BOS, EOS, PAD = 0, 1, 2
seeds = st.integers(0, 2**40)


@frozen(eq=False)
class Case:
    """A corpus whose tokens are all told apart by their place, and how to cut it."""

    starts: Int64
    n_tokens: int
    length: int
    seed: int

    def epoch(self, number: int) -> Epoch:
        return epoch_of(self.starts, self.n_tokens, self.length, self.seed, number)

    @property
    def n_windows(self) -> int:
        return windows_of(self.n_tokens, self.length)

    def all_places(self, number: int) -> Int64:
        return self.epoch(number).places(np.arange(self.n_windows))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(3, 20), min_size=1, max_size=12))
    starts = np.cumsum([0, *sizes[:-1]])
    case = Case(starts, sum(sizes), draw(st.integers(1, 12)), draw(seeds))
    assume(case.n_windows > 0)
    return case


@st.composite
def windows(draw: st.DrawFn) -> Int64:
    """Rows of documents, BOS always before and EOS always after text."""
    rng = np.random.default_rng(draw(seeds))
    rows, length = draw(st.integers(1, 4)), draw(st.integers(2, 24))
    stream: list[int] = []
    while len(stream) < rows * length + 1:
        stream += [BOS, *rng.integers(3, 50, rng.integers(1, 9)), EOS]
    skipped = int(rng.integers(0, 2))
    return np.array([stream[i : i + length + 1] for i in range(0, rows * length, length)])[:, skipped:]


@given(cases(), st.integers(0, 5))
def test_every_token_is_a_target_once_an_epoch_but_for_the_first_and_the_rest(case: Case, epoch: int) -> None:
    targets = case.all_places(epoch)[:, 1:].ravel()
    assert len(set(targets.tolist())) == len(targets) == case.n_windows * case.length
    assert set(targets.tolist()) <= set(range(case.n_tokens))
    assert case.n_tokens - len(targets) <= case.length  # the first, and less than one window


@given(cases(), st.integers(0, 5))
def test_a_token_is_followed_by_its_successor_or_at_a_documents_end_by_a_documents_start(
    case: Case, epoch: int
) -> None:
    places = case.all_places(epoch)
    before, after = places[:, :-1], places[:, 1:]
    ends = np.isin(before + 1, [*case.starts, case.n_tokens])
    assert (after[~ends] == before[~ends] + 1).all()
    assert np.isin(after[ends], case.starts).all()


@given(cases(), st.integers(0, 5))
def test_windows_share_one_token_with_their_successor_in_the_stream(case: Case, epoch: int) -> None:
    stream = case.all_places(epoch)[np.argsort(case.epoch(epoch).windows)]
    assert (stream[1:, 0] == stream[:-1, -1]).all()


@given(cases(), st.integers(0, 5), st.data())
def test_a_sequence_depends_on_the_seed_and_its_number_alone(case: Case, epoch: int, data: st.DataObject) -> None:
    wanted = np.array(data.draw(st.lists(st.integers(0, case.n_windows - 1), min_size=1, max_size=5)))
    assert np.array_equal(case.epoch(epoch).places(wanted), case.all_places(epoch)[wanted])


def test_epochs_and_seeds_order_documents_and_windows_anew() -> None:
    starts = np.arange(0, 1000, 10)
    epochs = [epoch_of(starts, 1000, 7, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(epochs):
        assert not np.array_equal(one.windows, np.sort(one.windows))
        assert not (one.shifts == 0).all()
        for other in epochs[:i]:
            assert not np.array_equal(one.windows, other.windows)
            assert not np.array_equal(one.shifts, other.shifts)


@given(st.integers(0, 50), seeds)
def test_a_permutation_holds_every_number_once(n: int, seed: int) -> None:
    assert sorted(permutation(n, seed, 3)) == list(range(n))


def test_a_permutation_never_changes_between_releases() -> None:
    assert permutation(10, 1, 2, 3).tolist() == [8, 1, 9, 3, 7, 5, 2, 0, 4, 6]


def test_every_order_of_three_is_about_as_likely() -> None:
    n = 1200
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(n):
        order = tuple(permutation(3, seed, 0, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    sigma = (n * 1 / 6 * 5 / 6) ** 0.5
    assert len(counts) == 6
    assert all(abs(count - n / 6) < 5 * sigma for count in counts.values())


@given(windows())
def test_a_packed_row_is_one_segment_that_predicts_every_next_token(rows: Int64) -> None:
    batch = pack(rows)
    assert batch.targets is not None
    assert batch.tokens.tolist() == rows[:, :-1].tolist()
    assert batch.targets.tolist() == rows[:, 1:].tolist()
    assert batch.positions.tolist() == [list(range(rows.shape[1] - 1))] * len(rows)
    assert not batch.segments.any()
    assert (batch.n_targets, batch.n_sequences) == (batch.targets.numel(), len(rows))


@given(windows())
def test_isolated_documents_are_segments_that_never_predict_each_other(rows: Int64) -> None:
    batch = pack(rows, bos=BOS)
    assert batch.targets is not None
    assert batch.tokens.tolist() == rows[:, :-1].tolist()
    assert not batch.segments[:, 0].any()
    assert not batch.positions[:, 0].any()
    steps = batch.segments.diff(dim=1)
    new = batch.tokens[:, 1:] == BOS
    assert (steps == new.long()).all()
    assert (batch.positions[:, 1:][new] == 0).all()
    assert (batch.positions.diff(dim=1)[~new] == 1).all()
    ignored = batch.targets == IGNORE
    assert (ignored[:, :-1] == new).all()
    assert ignored[:, -1].tolist() == (rows[:, -1] == BOS).tolist()
    assert (batch.targets.numpy() == rows[:, 1:])[~ignored.numpy()].all()
    assert batch.n_targets == int((~ignored).sum())


@given(windows(), st.integers(1, 5))
def test_padding_is_never_a_target(rows: Int64, n_padding: int) -> None:
    rows = np.pad(rows, ((0, 0), (0, n_padding)), constant_values=PAD)
    batch = pack(rows, pad=PAD)
    assert batch.targets is not None
    assert (batch.targets[:, -n_padding:] == IGNORE).all()
    assert batch.n_targets == batch.targets.numel() - n_padding * len(rows)
