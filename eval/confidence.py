"""Means of few numbers and how far off they may be."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two independent numbers, and half of its 95 % confidence interval
    (Student's t)."""
    quantile = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def student_quantile(probability: float, freedom: int) -> float:
    """The value that a t-distributed number of `freedom` degrees stays below with a probability of
    0.5 to 1; by bisection of its distribution function, Abramowitz and Stegun 26.7.3 and 26.7.4."""
    low, high = 0.0, 1.0
    while _student(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < probability else (low, middle)
    return high


def _student(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1 + odd, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inner = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inner) / 2
