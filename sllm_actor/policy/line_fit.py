"""Learn a straight line from points that come one by one: least squares that forget, with outliers cut. Pure."""

from __future__ import annotations

from typing import NamedTuple

# What a point still counts once another has come: about the last thirty make the line.
KEPT = 0.97
# A point further away than so many median deviations is drawn in to there, once there are a few.
MAX_DEVIATIONS = 4.0
STEP = 1.15
SURE_AFTER = 5
# Points that lie closer together than this part of their distance from zero say nothing of the slope.
LEAST_SPREAD = 0.05


class Line(NamedTuple):
    """The moments of the points so far, each weighted by how long ago it came."""

    points: int = 0
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    deviation: float = 0.0

    @property
    def slope(self) -> float:
        """How much y grows with x; 0.0 where all x are alike."""
        if not self.points:
            return 0.0
        mean_x = self.x / self.weight
        variance = self.xx / self.weight - mean_x * mean_x
        if variance <= (LEAST_SPREAD * mean_x) ** 2:
            return 0.0
        return (self.xy / self.weight - mean_x * self.y / self.weight) / variance

    @property
    def rising(self) -> tuple[float, float]:
        """The slope and the constant, neither of them negative."""
        if not self.points:
            return 0.0, 0.0
        slope = max(0.0, self.slope)
        return slope, max(0.0, (self.y - slope * self.x) / self.weight)

    def at(self, x: float) -> float:
        """Give the line's y; 0.0 before the first point."""
        if not self.points:
            return 0.0
        return (self.y + self.slope * (x * self.weight - self.x)) / self.weight


def learned(line: Line, x: float, y: float) -> Line:
    """Take in a point."""
    expected = line.at(x)
    distance = y - expected if line.points else 0.0
    deviation = max(line.deviation, 1e-3 * abs(expected))
    if line.points < SURE_AFTER:
        deviation = max(line.deviation, abs(distance))
    else:
        most = MAX_DEVIATIONS * deviation
        y = expected + min(most, max(-most, distance))
        # Half of all points lie nearer: one that is far off moves that by a step, however far it is.
        deviation *= STEP if abs(distance) > deviation else 1 / STEP
    return Line(
        points=line.points + 1,
        weight=KEPT * line.weight + 1.0,
        x=KEPT * line.x + x,
        y=KEPT * line.y + y,
        xx=KEPT * line.xx + x * x,
        xy=KEPT * line.xy + x * y,
        deviation=deviation,
    )
