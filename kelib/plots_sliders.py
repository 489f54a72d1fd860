"""Resuscitation at any p and q: axes for its effects, and sliders that move through them."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kelib.errors import KelibError
from kelib.plots import COLOURS, MARKERS, panels
from kelib.sliders import FACTORS, PLACES, RATIOS, Effect, Effects


def grid_map(table: pd.DataFrame, ax: Axes, value: str, label: str) -> Axes:
    """``value``, a change, for every p (across) and q (up), in its cell; darker is larger.

    White is 0. With values of both signs those below 0 have another hue and a hatch, and the bar of
    colours a line at 0. ``table`` has columns ratio, factor and ``value``; p = 0 is left out.
    """
    cells = table[table["ratio"] > 0].pivot(index="factor", columns="ratio", values=value)
    most, both = float(np.nanmax(np.abs(cells.to_numpy()))), bool((cells < 0).any(axis=None))
    style: dict[str, Any] = {"cmap": "PuOr" if both else "Greys", "vmin": -most * both}
    image = ax.imshow(cells, origin="lower", aspect="auto", vmax=most, **style)
    for y, row in enumerate(cells.to_numpy()):
        for x, number in enumerate(row):
            dark = abs(number) > 0.6 * most
            if number < 0:
                hatch: dict[str, Any] = {"fill": False, "hatch": "////", "ec": "0.75", "lw": 0}
                ax.add_patch(mpl.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, **hatch))
            text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            ax.text(x, y, f"{number:+.2f}", color="white" if dark else "black", **text)
    ax.set_xticks(range(cells.shape[1]), [f"{100 * p:g}" for p in cells.columns])
    ax.set_yticks(range(cells.shape[0]), [f"{q:g}" for q in cells.index])
    ax.set_xlabel("p: share of memories woken (%)")
    ax.set_ylabel("q")
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, label=label)
    if both:
        bar.ax.axhline(0, color="black", lw=1)
    return ax


def before_and_after(before: Effect, after: Effect, axes: Any, layer: int) -> None:
    """Two axes: the activity of the memories of one ``layer`` (from 1), and the entropy by layer,
    of the model as it is and after resuscitation.
    """
    left, right = axes
    for index, (one, label) in enumerate(((before, "as it is"), (after, "woken"))):
        style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "ms": 4}
        left.plot(PLACES, one.activity[layer - 1], label=label, **style)
        right.plot(range(1, len(one.entropy) + 1), one.entropy, label=label, **style)
    left.axhline(1, color="0.5", ls=":", lw=0.9)
    right.plot(range(1, len(before.bound) + 1), before.bound, ":", color="0.5", label="bound")
    left.set_yscale("log")
    left.set_xlabel("memories, most active first (%)")
    left.set_ylabel("activity ÷ mean of the layer")
    left.set_title(f"layer {layer}")
    right.set_xlabel("layer")
    right.set_ylabel("entropy (nats)")
    right.set_xticks(range(1, len(before.bound) + 1))
    right.legend(fontsize=7)


def said(before: Effect, after: Effect) -> str:
    """Entropy and loss before and after, in a line."""
    entropy = f"entropy {before.entropy.sum():.3f} -> {after.entropy.sum():.3f} nats"
    loss = f"loss {before.loss:.3f} -> {after.loss:.3f} nats per token"
    return f"p = {after.ratio:.0%}, q = {after.factor:g}: {entropy}; {loss}"


def sliders(effects: Effects, ratio: float, factor: float, layer: int, live: bool) -> Any:
    """Sliders for p, q and the layer over what they give: a line and a picture, made anew at each
    change.

    With ``live`` p and q are continuous and computed when a slider is let go, else those of the
    table. An ipywidgets box of the three sliders, the line and the picture. What a model cannot
    undergo (see :func:`kelib.resuscitate`) is said in the line.
    """
    import ipywidgets as widgets  # type: ignore[import-untyped]
    from matplotlib import pyplot as plt

    before = effects.at(0.0, 1.0)
    start: dict[str, Any] = {"continuous_update": False}
    if live:
        p = widgets.FloatSlider(value=ratio, min=0, max=0.95, step=0.05, description="p", **start)
        q = widgets.FloatLogSlider(value=factor, min=-1, max=1, description="q", **start)
    else:
        p = widgets.SelectionSlider(value=ratio, options=RATIOS, description="p", **start)
        q = widgets.SelectionSlider(value=factor, options=FACTORS, description="q", **start)
    last = len(before.entropy)
    which = widgets.IntSlider(value=layer, min=1, max=last, description="layer", **start)
    line, picture = widgets.Label(), widgets.Image(format="png")

    def show(_: Any = None) -> None:
        try:
            after = effects.at(p.value, q.value)
        except KelibError as error:
            line.value = str(error)
            return
        figure, axes = panels(2)
        before_and_after(before, after, axes[0], which.value)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        plt.close(figure)
        line.value, picture.value = said(before, after), drawn.getvalue()

    for slider in (p, q, which):
        slider.observe(show, names="value")
    show()
    return widgets.VBox([p, q, which, line, picture])
