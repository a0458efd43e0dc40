"""Charts as inline SVG. Colours come from CSS classes of the page, so light and dark need one drawing."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

Format = Callable[[float], str]
_TITLE_PX, _CHARACTER_PX = 30.0, 7.0
"""Room for the title of the vertical axis, and of one character of a tick beside it."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One marker.

    Attributes:
        x: horizontal value.
        y: vertical value.
        label: shown beside the marker; empty for none.
        title: shown when the pointer rests on the marker.
        kind: CSS class of the marker: `baseline`, `step`, `result`, `measured`.
        x_interval: drawn as a horizontal bar.
        y_interval: drawn as a vertical bar.
    """

    x: float
    y: float
    label: str = ""
    title: str = ""
    kind: str = "step"
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Limit:
    """A line at a limit: `axis` is `x` or `y`."""

    axis: str
    value: float
    label: str


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    span = high - low
    if not span > 0.0:
        return [low]
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    x_format: Format,
    y_format: Format,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]] = (),
    limits: Sequence[Limit] = (),
    include: tuple[Sequence[float], Sequence[float]] = ((), ()),
    bounds: tuple[tuple[float, float], tuple[float, float]] = ((-math.inf, math.inf), (-math.inf, math.inf)),
    size: tuple[int, int] = (720, 320),
) -> str:
    """A chart of markers and lines on two linear axes.

    Args:
        points: markers.
        x_title: title of the horizontal axis, with its unit.
        y_title: title of the vertical axis, with its unit.
        x_format: text of a tick.
        y_format: text of a tick.
        lines: `(CSS class, vertices)`.
        limits: straight lines across the chart.
        include: values that the axes must show besides the data.
        bounds: values beyond which the axes never go, such as (0, 1) for a score.
        size: width and height, user units.
    """
    width, height = size
    right, top, bottom = 20, 24, 46
    xs = [p.x for p in points] + [x for _, line in lines for x, _ in line] + list(include[0])
    ys = [p.y for p in points] + [y for _, line in lines for _, y in line] + list(include[1])
    for point in points:
        xs.extend(point.x_interval or ())
        ys.extend(point.y_interval or ())
    xs += [limit.value for limit in limits if limit.axis == "x"]
    ys += [limit.value for limit in limits if limit.axis == "y"]
    x_low, x_high = _padded(xs, bounds[0])
    y_low, y_high = _padded(ys, bounds[1])
    y_ticks = {tick: y_format(tick) for tick in ticks(y_low, y_high, 5)}
    left = max(64, _TITLE_PX + _CHARACTER_PX * max(map(len, y_ticks.values()), default=0))

    def at_x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (value - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for tick, text in y_ticks.items():
        y = at_y(tick)
        parts.append(_line(left, y, width - right, y, "grid"))
        parts.append(_text(left - 8, y + 4, text, "tick end"))
    for tick in ticks(x_low, x_high, 7):
        x = at_x(tick)
        parts.append(_line(x, top, x, height - bottom, "grid"))
        parts.append(_text(x, height - bottom + 17, x_format(tick), "tick middle"))
    parts.append(_text((left + width - right) / 2, height - 8, x_title, "axis middle"))
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text class="axis middle" transform="translate(14 {middle:.1f}) rotate(-90)">'
        f"{_escape(y_title)}</text>"
    )
    for limit in limits:
        if limit.axis == "x":
            x = at_x(limit.value)
            parts.append(_line(x, top, x, height - bottom, "limit"))
            parts.append(_text(x + 5, height - bottom - 6, limit.label, "limit-label"))
        else:
            y = at_y(limit.value)
            parts.append(_line(left, y, width - right, y, "limit"))
            parts.append(_text(left + 6, y + 15, limit.label, "limit-label"))
    for kind, line in lines:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="line {_escape(kind)}" points="{path}"/>')
    for point in points:
        parts.append(_marker(point, at_x, at_y, width))
    return _svg(width, height, f"{y_title} against {x_title}", parts)


def bars(rows: Sequence[tuple[str, int, int]], *, label_width: int = 230, width: int = 720) -> str:
    """Horizontal bars `(name, before, after)`: the after in front of the before."""
    row, bar = 22, 12
    height = row * len(rows) + 6
    largest = max((before for _, before, _ in rows), default=1) or 1
    room = width - label_width - 110
    parts = []
    for number, (name, before, after) in enumerate(rows):
        y = row * number + 5
        long, short = max(1.0, before / largest * room), after / largest * room
        kind = "same" if after == before else "after"
        shown = name if len(name) <= 34 else "…" + name[-33:]
        parts.append(
            f"<g><title>{_escape(f'{name}: {before} became {after}')}</title>"
            + _text(label_width - 10, y + bar - 1, shown, "name end")
            + _bar(label_width, y, long, bar, "before")
            + (_bar(label_width, y, short, bar, kind) if after else "")
            + _text(
                label_width + long + 8,
                y + bar - 1,
                str(before) if after == before else f"{before} → {after}",
                "tick",
            )
            + "</g>"
        )
    return _svg(width, height, "Width per layer before and after", parts)


def curve(
    points: Sequence[Point],
    *,
    y_range: tuple[float, float],
    reference: float,
    title: str,
    x_format: Format,
    y_format: Format,
    size: tuple[int, int] = (290, 120),
) -> str:
    """A small chart of one line from x = 0, one of many that are compared: their axes are the same.

    Args:
        points: markers, by ascending x in (0, 1).
        y_range: lowest and highest value of the axis.
        reference: where the line begins; drawn across the chart, too.
        title: for readers that do not see.
        x_format: text of a tick.
        y_format: text of a tick.
        size: width and height, user units.
    """
    width, height = size
    left, right, top, bottom = 46, 12, 8, 20
    low, high = y_range

    def at_x(value: float) -> float:
        return left + value * (width - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (value - low) / ((high - low) or 1.0) * (height - top - bottom)

    parts = []
    for tick in (low, high):
        parts.append(_line(left, at_y(tick), width - right, at_y(tick), "grid"))
        parts.append(_text(left - 6, at_y(tick) + 4, y_format(tick), "tick end"))
    for point in points:
        parts.append(_text(at_x(point.x), height - 5, x_format(point.x), "tick middle"))
    parts.append(_line(left, at_y(reference), width - right, at_y(reference), "reference"))
    vertices = [(0.0, reference), *((point.x, point.y) for point in points)]
    path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in vertices)
    parts.append(f'<polyline class="line" points="{path}"/>')
    parts += [_marker(point, at_x, at_y, width) for point in points]
    return _svg(width, height, title, parts)


def _padded(values: Sequence[float], bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.07 * (high - low) or max(0.05 * abs(high), 1e-3)
    return max(low - pad, bounds[0]), min(high + pad, bounds[1])


def _marker(point: Point, at_x: Callable[[float], float], at_y: Callable[[float], float], width: int) -> str:
    x, y = at_x(point.x), at_y(point.y)
    kind = _escape(point.kind)
    parts = [f"<g><title>{_escape(point.title)}</title>" if point.title else "<g>"]
    if point.x_interval:
        parts.append(_line(at_x(point.x_interval[0]), y, at_x(point.x_interval[1]), y, f"interval {kind}"))
    if point.y_interval:
        parts.append(_line(x, at_y(point.y_interval[0]), x, at_y(point.y_interval[1]), f"interval {kind}"))
    radius = 3.5 if point.kind in ("step", "measured") else 6
    parts.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')
    if point.label:
        near_edge = x > 0.9 * width  # centred text would leave the chart
        below = point.kind == "result"
        kind = "point end" if near_edge else "point middle"
        parts.append(_text(x + 8 if near_edge else x, y + 23 if below else y - 12, point.label, kind))
    return "".join(parts) + "</g>"


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_escape(title)}">{"".join(parts)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="bar {kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="2"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_escape(text)}</text>'


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
