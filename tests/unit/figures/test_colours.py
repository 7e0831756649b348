"""Colours of methods can be told apart, also by readers who see no red or no green."""

import itertools

import numpy as np
import pytest

from lowrank_lab.methods.registry import ROWS

TO_XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
WHITE = TO_XYZ.sum(axis=1)
SEEN = {  # linear sRGB as it is seen (Machado, Oliveira and Fernandes 2009, severity 1)
    "all colours": np.eye(3),
    "no green": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474],
                          [-0.0118, 0.0429, 0.9689]]),
    "no red": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992],
                        [-0.0039, -0.0481, 1.0520]]),
}  # fmt: skip


def lab(colour, seen):
    """CIE L*a*b* of a hexadecimal colour."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    share = TO_XYZ @ np.clip(seen @ linear, 0, 1) / WHITE
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("seen", "least"), [("all colours", 25), ("no green", 15), ("no red", 15)])
def test_two_methods_are_never_of_nearly_the_same_colour(seen, least):
    colours = {method.name: lab(method.colour, SEEN[seen]) for method in ROWS}
    distances = {
        (a, b): np.linalg.norm(colours[a] - colours[b])
        for a, b in itertools.combinations(colours, 2)
    }
    nearest = min(distances, key=distances.get)
    assert distances[nearest] >= least, (nearest, distances[nearest])


def test_each_method_can_be_seen_on_white():
    lightness = {method.name: lab(method.colour, SEEN["all colours"])[0] for method in ROWS}
    assert max(lightness.values()) < 75, lightness
