"""Suspect a peer by how unusual its silence is: a phi accrual failure detector.

Pure: the caller brings the time. Source: Hayashibara et al., "The φ accrual failure detector" (2004), with the
practice of Akka: two synthetic intervals to begin with, a least deviation, and a pause that is always acceptable.
"""

from __future__ import annotations

import math
from collections import deque

HISTORY_INTERVALS = 100
MIN_DEVIATION_SHARE = 0.1
# Behind the pause, nobody is borne with for longer than so many intervals, however irregular.
MOST_INTERVALS = 2


class FailureDetector:
    """Judges one peer by the intervals between its heartbeats."""

    def __init__(self, interval_s: float, acceptable_pause_s: float, now_s: float) -> None:
        self._intervals: deque[float] = deque(maxlen=HISTORY_INTERVALS)
        # One a little early, one a little late: a believable spread before anything is known.
        self._intervals.extend((interval_s * 0.75, interval_s * 1.25))
        self._min_deviation_s = interval_s * MIN_DEVIATION_SHARE
        self._acceptable_pause_s = acceptable_pause_s
        self._interval_s = interval_s
        self._last_s = now_s
        self._excused_s = 0.0

    def heartbeat(self, now_s: float) -> None:
        """Note a heartbeat. One that comes after an acceptable pause or after our own sleep teaches nothing."""
        interval_s = now_s - self._last_s
        if interval_s <= self._interval_s + self._acceptable_pause_s and not self._excused_s:
            self._intervals.append(interval_s)
        self._last_s = now_s
        self._excused_s = 0.0

    def excuse(self, late_s: float) -> None:
        """Widen the pause by the time that we ourselves were not listening."""
        self._excused_s += late_s

    def phi(self, now_s: float) -> float:
        """Give the suspicion: -log10 of the chance that a living peer is silent for so long."""
        count = len(self._intervals)
        mean_s = sum(self._intervals) / count
        variance = sum((interval - mean_s) ** 2 for interval in self._intervals) / count
        deviation_s = max(math.sqrt(variance), self._min_deviation_s)
        silent_s = now_s - self._last_s - self._excused_s - self._acceptable_pause_s
        if silent_s > MOST_INTERVALS * self._interval_s:
            return math.inf
        # The logistic approximation of the normal distribution's tail.
        y = (silent_s - mean_s) / deviation_s
        exponent = y * (1.5976 + 0.070566 * y * y)
        if exponent > 700:
            return math.inf
        tail = math.exp(-exponent) if exponent > -700 else math.inf
        if silent_s > mean_s:
            return -math.log10(tail / (1 + tail))
        return -math.log10(1 - 1 / (1 + tail)) if tail < math.inf else 0.0
