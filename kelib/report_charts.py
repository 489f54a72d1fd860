"""Charts of the report that a reader can ask: entropy by layer, entropy against an outcome, the
claims. Each is a Vega-Lite specification, built from tables, and the same drawn once as SVG.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kelib.report_rows import OUTCOMES, entropy_rows, outcome_rows, primary
from kelib.results import Tables
from kelib.verdicts import NOT_TESTABLE

# hues that keep a contrast of 3 : 1 on the light and on the dark page
COLOURS = ("#1b83c2", "#d55e00", "#029e73", "#b35fa3", "#7a8794", "#a36b2c", "#6b7bd6")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left")
PRINTED = 700  # width of the SVG that stands for a chart on paper and without a script, pixels
EVERY = "all"


@dataclass(frozen=True)
class Chart:
    """One chart: what it asks, how to read it, its specification and its still picture (SVG)."""

    name: str
    title: str
    lead: str
    description: str
    spec: dict[str, Any]
    picture: str


def charts(tables: Tables, claims: pd.DataFrame | None) -> list[Chart]:
    """The charts that the tables of a profile allow, in reading order; there may be none."""
    found = [_entropy_chart(tables), _outcome_chart(tables), _claims_chart(claims)]
    return [chart for chart in found if chart is not None]


@functools.cache
def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines ``vegaEmbed``; no network."""
    import vl_convert

    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # inside an element <script> these would begin a comment or end it
    return code.replace("<!--", r"\x3c!--").replace("</script", r"\x3c/script")


# --- knowledge entropy along pretraining -------------------------------------------------------


def _entropy_chart(tables: Tables) -> Chart | None:
    rows = entropy_rows(tables)
    if rows is None:
        return None
    import altair as alt

    steps = rows["x"].max() > 100  # and not layers
    menu = "Recipes of" if rows["choice"].iloc[0].startswith("seed") else "Layer"
    pick = _menu("choice", menu, list(dict.fromkeys(rows["choice"])))
    values = [0, *(10**n for n in range(7) if 10**n <= rows["x"].max())] if steps else None
    axis = alt.Axis(values=values, format=",d") if steps else alt.Axis(tickMinStep=1)
    scale = alt.Scale(type="symlog", constant=1) if steps else alt.Scale(zero=False)
    x_title = "step of pretraining (symlog)" if steps else "layer"
    shown = rows.assign(share=rows["nats"] / rows["bound"])
    base = (
        alt.Chart(_values(shown))
        .transform_filter("datum.choice === choice")
        .encode(
            x=alt.X("x:Q", title=x_title, scale=scale, axis=axis),
            y=alt.Y("nats:Q", title="knowledge entropy (nats)", scale=alt.Scale(zero=False)),
            color=_colour("series", dict.fromkeys(rows["series"])),
        )
    )
    tips = [
        alt.Tooltip("series:N", title="line"),
        alt.Tooltip("choice:N", title=menu.lower()),
        alt.Tooltip("x:Q", title="step" if steps else "layer", format=",.0f"),
        alt.Tooltip("nats:Q", title="entropy (nats)", format=".3f"),
        alt.Tooltip("share:Q", title="of its bound", format=".1%"),
    ]
    near = alt.selection_point(
        name="near", nearest=True, on="pointerover", fields=["x", "series"], empty=False
    )
    layers = [base.mark_line(strokeWidth=1.6)]
    if rows["stage"].any():
        stages = base.transform_filter("datum.stage")
        layers.append(stages.mark_point(shape="diamond", size=130, strokeWidth=1.4))
    points = base.mark_point(filled=True, opacity=1).encode(
        size=alt.condition(near, alt.value(120), alt.value(26)),
        shape=_shape("series", dict.fromkeys(rows["series"])),
        tooltip=tips,
    )
    layers.append(points.add_params(near))
    lines = ", ".join(dict.fromkeys(rows["series"]))
    stages = " Diamonds mark the stages that are continued." if rows["stage"].any() else ""
    return _chart(
        "entropy",
        "How does knowledge entropy move, and in which layer?" if steps else "Which layer?",
        f"One line for each of: {lines}. Choose what is drawn; point at a line for its values."
        + stages,
        f"Line chart: knowledge entropy in nats against the {x_title}, lines for {lines}.",
        alt.layer(*layers).add_params(pick),
        330,
    )


# --- entropy against an outcome ----------------------------------------------------------------


def _outcome_chart(tables: Tables) -> Chart | None:
    rows = outcome_rows(tables)
    if rows is None:
        return None
    import altair as alt

    found = [name for name in OUTCOMES if name in rows and rows[name].notna().any()]
    by_step = rows.sort_values("stage_step")
    rates = [f"{rate:g}" for rate in sorted(set(rows["learning_rate"]), reverse=True)]
    stages = list(dict.fromkeys(by_step["stage_label"]))
    rows = rows.assign(rate=rows["learning_rate"].map("{:g}".format), seed=rows["seed"].astype(str))
    base = (
        alt.Chart(_values(rows))
        .transform_filter(
            f"datum.rate === rate && (stage === '{EVERY}' || datum.stage_label === stage)"
        )
        .transform_calculate(outcome_value="datum[outcome]")
        .transform_filter("isValid(datum.outcome_value)")
        .encode(
            x=alt.X(
                "entropy_pt:Q",
                title="knowledge entropy before continual learning (nats)",
                scale=alt.Scale(zero=False),
            ),
            y=alt.Y("outcome_value:Q", title="the chosen outcome", scale=alt.Scale(zero=False)),
            color=_colour("series", dict.fromkeys(rows["series"])),
        )
    )
    tips = [
        alt.Tooltip("series:N", title="line"),
        alt.Tooltip("seed:N", title="pretraining seed"),
        alt.Tooltip("stage_label:N", title="stage"),
        alt.Tooltip("stage_step:Q", title="step", format=",.0f"),
        alt.Tooltip("entropy_pt:Q", title="entropy (nats)", format=".3f"),
        alt.Tooltip("outcome_value:Q", title="outcome", format=".3f"),
    ]
    lines = base.mark_line(strokeWidth=1, opacity=0.55).encode(
        detail=["series:N", "seed:N"], order="stage_step:Q"
    )
    points = base.mark_point(filled=True, opacity=1, size=85).encode(
        shape=_shape("stage_label", stages, "stage"), tooltip=tips
    )
    menus = [
        _menu("outcome", "Outcome", {name: OUTCOMES[name][0] for name in found}),
        _menu("rate", "CL rate", rates),
        _menu("stage", "Stages", [EVERY, *stages]),
    ]
    return _chart(
        "outcomes",
        "Does what is learnt or forgotten follow the entropy?",
        "A point for each pretraining seed and stage, joined in the order of pretraining: means "
        "over the seeds of continual learning. Choose the outcome and the peak learning rate of "
        "continual learning. Along a line everything else that training changes moves too; "
        "points of one shape are of one stage.",
        f"Scatter plot: a chosen outcome of continual learning, at first {OUTCOMES[found[0]][0]}, "
        "against the knowledge entropy before it, a colour for each line, a shape for each stage.",
        alt.layer(lines, points).add_params(*menus),
        360,
    )


# --- the claims --------------------------------------------------------------------------------


def _claims_chart(claims: pd.DataFrame | None) -> Chart | None:
    if claims is None or primary(claims)["mean"].isna().all():
        return None
    import altair as alt

    rows = primary(claims).dropna(subset=["mean"])
    unit = rows["direction"] / rows["smallest_effect"]
    low, high = (rows[name].fillna(rows["mean"]) * unit for name in ("low95", "high95"))
    interval = rows["low95"].map("{:+.3f}".format) + " … " + rows["high95"].map("{:+.3f}".format)
    rows = rows.assign(
        claim=rows["claim"].str.replace("_", " "),
        rate=rows["learning_rate"].map("{:g}".format),
        scaled=rows["mean"] * unit,
        low=pd.concat([low, high], axis=1).min(axis=1),
        high=pd.concat([low, high], axis=1).max(axis=1),
        effect=rows["mean"].map("{:+.3f} ".format) + rows["unit"],
        interval=interval.where(rows["low95"].notna(), "none: one seed"),
        tested=rows["verdict"] != NOT_TESTABLE,
    )
    kept = ["claim", "statement", "rate", "scaled", "low", "high", "effect", "interval"]
    rates, names = list(dict.fromkeys(rows["rate"])), list(dict.fromkeys(rows["claim"]))
    data = _values(rows[[*kept, "verdict", "tested", "paper_value"]])
    # names and title are broken, so that a phone has room for the effects
    title = ["effect in the paper's direction,", "in smallest effects that matter"]
    words = alt.Axis(labelExpr="split(datum.label, ' ')")
    base = alt.Chart(data).encode(
        y=alt.Y("claim:N", title=None, sort=names, axis=words),
        yOffset=alt.YOffset("rate:N", sort=rates),
        color=_colour("rate", rates, "CL rate"),
    )
    tips = [
        alt.Tooltip(f"{name}:N", title=words)
        for name, words in (
            *(("statement", "claim"), ("rate", "CL rate"), ("effect", "effect")),
            *(("interval", "95 % interval"), ("verdict", "verdict"), ("paper_value", "the paper")),
        )
    ]
    band = alt.Chart(alt.Data(values=[{"from": -1, "to": 1}]))
    band = band.mark_rect(color="#8a94a0", opacity=0.22).encode(x="from:Q", x2="to:Q")
    zero = alt.Chart(alt.Data(values=[{"at": 0}])).mark_rule(color="#8a94a0").encode(x="at:Q")
    lines = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    points = base.mark_point(size=95, strokeWidth=2).encode(
        x="scaled:Q",
        shape=_shape("rate", rates, "CL rate"),
        fill=alt.condition(
            "datum.tested", _colour("rate", rates, "CL rate"), alt.value("transparent")
        ),
        tooltip=tips,
    )
    return _chart(
        "claims",
        "How large are the effects, beside what would matter?",
        "Effects with 95 % intervals in multiples of the smallest effect that matters (the band), "
        "the paper's direction to the right. Hollow points are not testable at their rate. Point "
        "at one for the claim in words, the effect in its unit and the verdict.",
        "Interval plot: effects of the primary claims by learning rate of continual learning, in "
        "multiples of the smallest effect that matters; the table of the claims has the numbers.",
        alt.layer(band, zero, lines, points),
        30 + 24 * len(rows),
    )


# --- what they share ---------------------------------------------------------------------------


def _menu(name: str, label: str, options: list[str] | dict[str, str]) -> Any:
    """What a reader chooses from: values, or values with what the menu calls them."""
    import altair as alt

    values, words = list(options), list(options.values() if isinstance(options, dict) else options)
    if len(values) == 1:  # nothing to choose
        return alt.param(name=name, value=values[0])
    bound = alt.binding_select(options=values, labels=words, name=f"{label} ")
    return alt.param(name=name, bind=bound, value=values[0])


def _colour(field: str, values: Iterable[str], title: str | None = None) -> Any:
    return _told_apart("Color", COLOURS, field, values, title)


def _shape(field: str, values: Iterable[str], title: str | None = None) -> Any:
    return _told_apart("Shape", SHAPES, field, values, title)


def _told_apart(
    channel: str, looks: Sequence[str], field: str, values: Iterable[str], title: str | None
) -> Any:
    import altair as alt

    names = list(values)
    return getattr(alt, channel)(
        f"{field}:N",
        title=title,
        sort=names,
        scale=alt.Scale(domain=names, range=[looks[n % len(looks)] for n in range(len(names))]),
        legend=_legend(names, "bottom" if title == "stage" else "top"),
    )


def _legend(names: list[str], orient: Any = "top") -> Any:
    """Above the chart (stages below), in as many columns as a phone has room for."""
    import altair as alt

    columns = 3 if max(map(len, names)) < 9 else 2
    return alt.Legend(orient=orient, columns=columns, symbolOpacity=1)


def _values(rows: pd.DataFrame) -> Any:
    """Rows as data of a chart: six significant digits, no value for NaN."""
    import altair as alt

    text = rows.to_json(orient="records", double_precision=6)
    return alt.Data(values=json.loads(text))


def _chart(name: str, title: str, lead: str, description: str, drawn: Any, height: float) -> Chart:
    """A specification as wide as its place, and the SVG of its first state."""
    import vl_convert

    drawn = drawn.properties(width="container", height=height, description=description)
    drawn = (
        drawn.configure(font="system-ui, sans-serif", background="transparent")
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_legend(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
    )
    spec = drawn.to_dict()
    svg = vl_convert.vegalite_to_svg({**spec, "width": PRINTED - 90})
    # several pictures share a page, so none may use the names of another
    picture = re.sub(r'(\bid="|url\(#)', rf"\g<1>{name}-", svg)
    return Chart(name, title, lead, description, spec, picture)
