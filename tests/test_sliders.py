"""Effects of resuscitation at any p and q: live and stored ones, and the sliders over them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from kelib import plots_sliders, sliders
from kelib.errors import KelibError
from kelib.measurement import shannon_entropy
from kelib.sliders import PLACES, Effect, LiveEffects, StoredEffects, changes, tables_of

ROWS = np.random.default_rng(0).integers(1, 60, (6, 12))


@pytest.fixture(scope="module")
def live(model_of: Callable) -> LiveEffects:
    return LiveEffects(model_of("olmo"), ROWS)


def test_live_effects_are_those_of_the_definition(live: LiveEffects) -> None:
    before, after = live.at(0.0, 3.0), live.at(0.5, 2.0)
    assert before.factor == 1 and before.loss != after.loss
    expected = [shannon_entropy(mean) for mean in live.mean_coefficients]
    np.testing.assert_allclose(before.entropy, expected, rtol=1e-12)
    # nothing before the first layer changes, and there woken memories all come to q times the mean
    mean = live.mean_coefficients[0]
    woken = np.where(mean <= np.quantile(mean, 0.5), 2 * mean.mean(), mean)
    assert after.entropy[0] == pytest.approx(float(shannon_entropy(woken)), abs=1e-6)
    assert (after.entropy <= after.bound).all() and after.activity.shape == (2, len(PLACES))
    assert live.at(0.5, 2.0) is after
    with pytest.raises(KelibError, match="must lie between 0 and 1"):
        live.at(1.5, 1.0)


def effect(ratio: float, factor: float) -> Effect:
    entropy, bound = np.array([3.0, 2.0]) + ratio * factor / 10, np.log([50, 60])
    return Effect(ratio, factor, entropy, bound, 4 + ratio, np.full((2, len(PLACES)), factor))


EFFECTS = [effect(0.0, 1.0), *(effect(p, q) for p in (0.1, 0.5) for q in (0.5, 1.0, 5.0))]


def test_stored_effects_are_what_was_written_or_the_nearest() -> None:
    stored = StoredEffects(tables_of(EFFECTS))
    for one in EFFECTS:
        back = stored.at(one.ratio, one.factor)
        for name, value in vars(one).items():
            np.testing.assert_array_equal(getattr(back, name), value)
    near = stored.at(0.9, 2.0)  # 2 is nearer to 1 than to 5 as a factor
    assert (near.ratio, near.factor) == (0.5, 1.0)
    assert stored.at(0.02, 4.0).ratio == 0
    assert len(stored.grid) == len(EFFECTS)
    for bad in ((-0.1, 1), (1.2, 1), (0.5, 0)):
        with pytest.raises(KelibError, match=r"between 0 and 1 and q = .* above 0"):
            stored.at(*bad)


def test_changes_are_against_no_resuscitation() -> None:
    table = changes(EFFECTS).set_index(["ratio", "factor"])
    assert table.loc[(0.0, 1.0)].tolist() == [0, 0]
    np.testing.assert_allclose(table.loc[(0.5, 5.0)], [2 * 0.25, 0.5])
    with pytest.raises(KelibError, match=r"p = 0 is missing among p = 0.1, 0.5"):
        changes(EFFECTS[1:])


def test_a_moved_slider_shows_what_it_was_moved_to(canvas: None) -> None:
    stored = StoredEffects(tables_of(EFFECTS))
    box = plots_sliders.sliders(stored, 0.1, 1.0, 1, live=False)
    ratio, factor, layer, line, picture = box.children
    assert (ratio.options, factor.options) == (sliders.RATIOS, sliders.FACTORS)
    pictures = [picture.value]
    ratio.value = 0.5
    assert line.value == (
        "p = 50%, q = 1: entropy 5.000 -> 5.100 nats; loss 4.000 -> 4.500 nats per token"
    )
    pictures.append(picture.value)
    layer.value = 2
    assert len({*pictures, picture.value}) == 3


def test_what_a_model_cannot_undergo_is_said_under_the_sliders(canvas: None) -> None:
    class Refusing(StoredEffects):
        def at(self, ratio: float, factor: float) -> Effect:
            if ratio == 0.5:
                raise KelibError("3 memories have a mean coefficient of 0")
            return super().at(ratio, factor)

    box = plots_sliders.sliders(Refusing(tables_of(EFFECTS)), 0.1, 1.0, 1, live=False)
    box.children[0].value = 0.5
    assert box.children[3].value == "3 memories have a mean coefficient of 0"


def test_maps_of_changes_are_white_at_zero_and_tell_both_signs_apart(ax: Axes) -> None:
    table = pd.DataFrame({"ratio": [0.0, 0.5, 0.5], "factor": [1.0, 0.5, 1.0]})
    plots_sliders.grid_map(table.assign(change=[0.0, -1.0, 4.0]), ax, "change", "nats")
    (image,) = ax.images
    assert image.norm(0.0) == 0.5 and image.get_array().tolist() == [[-1], [4]]
    assert [text.get_text() for text in ax.texts] == ["-1.00", "+4.00"] and len(ax.patches) == 1
    assert any(set(line.get_ydata()) == {0} for line in image.colorbar.ax.get_lines())
    ax.clear()
    plots_sliders.grid_map(table.assign(change=[0.0, 1.0, 4.0]), ax, "change", "nats")
    assert ax.images[0].norm(0.0) == 0 and not ax.patches
