"""How the estimate depends on the number of sequences, from blocks made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kelib.convergence import convergence
from kelib.errors import KelibError
from kelib.jackknife import BLOCKS, Sums
from kelib.measurement import EntropyMeasurement, shannon_entropy


def measured(layers, each=2):
    """A measurement of ``each`` sequences a block with the given sums, ``(64, m)`` per layer."""
    sequences = np.full(BLOCKS, float(each))
    sums = tuple(layer.sum(axis=0) for layer in layers)
    blocks = Sums(sequences, tuple(layers))
    return EntropyMeasurement(sums, BLOCKS * each, 10 * BLOCKS * each, blocks=blocks)


@pytest.fixture
def varied():
    generator = np.random.default_rng(5)
    return measured([generator.gamma(0.5, size=(BLOCKS, 20)) for _ in range(3)])


def test_sizes_and_groups(varied):
    table = convergence(varied)
    assert table["sequences"].tolist() == [2, 4, 8, 16, 32, 64, 128]
    assert table["groups"].tolist() == [64, 32, 16, 8, 4, 2, 1]


def test_the_last_row_is_the_whole_data_set(varied):
    last = convergence(varied).iloc[-1]
    assert last["mean"] == pytest.approx(varied.knowledge_entropy.sum(), rel=1e-12)
    assert np.isnan(last["deviation"])


def test_each_row_against_the_plain_way(varied):
    for row in convergence(varied).itertuples():
        joined = BLOCKS // row.groups
        found = [
            sum(
                float(shannon_entropy(layer[first : first + joined].sum(axis=0)))
                for layer in varied.blocks.coefficients
            )
            for first in range(0, BLOCKS, joined)
        ]
        assert row.mean == pytest.approx(np.mean(found), rel=1e-12)
        if row.groups > 1:
            assert row.deviation == pytest.approx(np.std(found, ddof=1), rel=1e-12)


def test_small_samples_come_out_too_low(varied):
    assert (convergence(varied)["mean"].diff().dropna() > 0).all()  # entropy is concave


def test_blocks_that_are_alike_need_no_more_sequences():
    table = convergence(measured([np.tile(np.arange(1.0, 9.0), (BLOCKS, 1))]))
    assert table["mean"].max() - table["mean"].min() < 1e-12
    assert table["deviation"].dropna().max() < 1e-12


def test_refusals(varied):
    with pytest.raises(KelibError, match=r"no blocks to join: .* with uncertainty=True"):
        convergence(dataclasses.replace(varied, blocks=None))
    with pytest.raises(
        KelibError, match=r"40 sequences do not fill 64 blocks; measure at least 64"
    ):
        convergence(dataclasses.replace(varied, sequences=40))
