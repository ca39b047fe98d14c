"""The perturbation: its radius in both geometries, small numbers, zeros."""

import math

import numpy as np
from frameworks import Library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import namespace_of

from gapo import geometry

FLOATS = st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-3)
TREES = st.lists(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES, rho=st.floats(1e-3, 10))
def test_radius_is_rho_over_all_parameters_together(library: Library, tree: list, rho: float) -> None:
    xp = namespace_of(library)
    for adaptive in (True, False):
        leaves = [tuple(library.asarray(np.array(column, dtype=float)) for column in zip(*rows)) for rows in tree]  # noqa: B905
        norms = [geometry.norm(geometry.scaled_gradient(t, g, adaptive), xp) for t, g in leaves]
        step_size = geometry.step_size(rho, geometry.norm(xp.stack(norms), xp), xp)
        total, moves, radii = 0.0, False, []
        for rows, (theta, g) in zip(tree, leaves, strict=True):
            delta = geometry.delta(theta, g, step_size, adaptive)
            for (t, slope), d in zip(rows, library.numpy(delta).tolist(), strict=True):
                scale = abs(t) if adaptive else 1.0
                moves |= scale * slope != 0
                total += (d / scale) ** 2 if scale else 0.0
                assert d == 0 or math.copysign(1, d) == math.copysign(1, slope)  # uphill in the probe's loss
            radii.append(geometry.norm(geometry.unscaled_delta(theta, delta, adaptive, xp), xp))
        expected = rho if moves else 0.0
        np.testing.assert_allclose(math.sqrt(total), expected, rtol=1e-5)
        np.testing.assert_allclose(library.numpy(geometry.norm(xp.stack(radii), xp)), expected, rtol=1e-5)


def test_norm_of_numbers_whose_squares_vanish_or_overflow(library: Library) -> None:
    xp = namespace_of(library)
    for scale in (1e-30, 1e30):
        x = library.asarray(np.array([3.0, 4.0]) * scale, "float32")
        np.testing.assert_allclose(library.numpy(geometry.norm(x, xp)), 5 * scale, rtol=1e-5)
        for size in (1.5, 4.0, 1e6):  # an estimate of the largest entry
            known = geometry.norm(x, xp, library.asarray(np.array(size * scale), "float32"))
            np.testing.assert_allclose(library.numpy(known), 5 * scale, rtol=1e-5)
    none = library.asarray(np.zeros(()), "float32")
    assert library.numpy(geometry.norm(library.asarray(np.zeros((2, 2)), "float32"), xp, none)) == 0
    assert library.numpy(geometry.norm(library.asarray(np.zeros((2, 2)), "float32"), xp)) == 0


def test_step_size_of_a_gradient_of_zero_is_zero(library: Library) -> None:
    zero = library.asarray(np.zeros(()), "float32")
    assert library.numpy(geometry.step_size(0.5, zero, namespace_of(library))) == 0
