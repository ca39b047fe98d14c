"""Sequence log-probabilities against loops over tokens."""

import math

import numpy as np
import pytest
from frameworks import require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gapo
from gapo.logps import response_lengths

over_libraries = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def oracle(logits: np.ndarray, labels: np.ndarray, average: bool) -> list[float]:
    sums = []
    for row, targets in zip(logits, labels, strict=True):
        terms = []
        for position in range(1, len(targets)):
            if targets[position] == -100:
                continue
            scores = row[position - 1].tolist()
            peak = max(scores)
            normaliser = peak + math.log(math.fsum(math.exp(s - peak) for s in scores))
            terms.append(scores[targets[position]] - normaliser)
        sums.append(math.fsum(terms) / (len(terms) if average else 1))
    return sums


@st.composite
def batches(draw):
    batch, seq, vocab = draw(st.sampled_from([(1, 2, 2), (2, 5, 3), (3, 6, 5)]))  # few: JAX compiles for each
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(batch, seq, vocab)) * draw(st.sampled_from([0.1, 3.0, 50.0]))
    labels = rng.integers(0, vocab, (batch, seq))
    labels[rng.random((batch, seq)) < draw(st.sampled_from([0.0, 0.5]))] = -100
    labels[:, draw(st.integers(1, seq - 1))] = 0  # at least one token counts
    return logits, labels


@over_libraries
@given(batch=batches(), average=st.booleans())
def test_equals_loops_over_tokens(library, batch, average):
    logits, labels = batch
    got = gapo.sequence_logps(library.asarray(logits), library.asarray(labels), average=average)
    np.testing.assert_allclose(library.numpy(got), oracle(logits, labels, average), rtol=2e-5, atol=1e-5)
    if library.name != "mlx":
        np.testing.assert_allclose(library.numpy(got), oracle(logits, labels, average), rtol=1e-11, atol=1e-11)


@over_libraries
@given(batch=batches())
def test_gradient_is_one_hot_minus_softmax(autodiff, batch):
    logits, labels = batch
    got = autodiff.grad(lambda x: gapo.sequence_logps(x, autodiff.asarray(labels)).sum(), autodiff.asarray(logits))[0]
    expected = np.zeros_like(logits)
    for i, row in enumerate(labels):
        counted = [t for t in range(1, len(row)) if row[t] != -100]
        for t in counted:
            p = np.exp(logits[i, t - 1] - logits[i, t - 1].max())
            expected[i, t - 1] = (np.eye(len(p))[row[t]] - p / p.sum()) / len(counted)
    np.testing.assert_allclose(got, expected, atol=1e-5 if autodiff.name == "mlx" else 1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_logits_are_reduced_in_float32(autodiff, dtype):
    logits = autodiff.asarray(np.zeros((1, 2049, 8)), dtype)  # 2,048 tokens of log 8 each: 4,258, beyond 16 bits' steps
    labels = autodiff.asarray(np.zeros((1, 2049), dtype=np.int64))
    got = gapo.sequence_logps(logits, labels, average=False)
    assert "float32" in str(got.dtype)
    np.testing.assert_allclose(autodiff.numpy(got), [-2048 * math.log(8)], rtol=1e-4)


def test_bad_rows_are_named(library):
    logits = library.asarray(np.zeros((2, 3, 4)))

    def labels(*rows):
        return library.asarray(np.array(rows, dtype=np.int64))

    with pytest.raises(ValueError, match=r"row 1 of labels has no token that counts"):
        gapo.sequence_logps(logits, labels([-100, 1, 2], [3, -100, -100]))
    with pytest.raises(ValueError, match=r"row 0 of labels holds a token id outside 0\.\.3"):
        gapo.sequence_logps(logits, labels([-100, 4, 2], [0, 1, 2]))
    with pytest.raises(ValueError, match=r"row 1 .*outside"):
        gapo.sequence_logps(logits, labels([-100, 1, 2], [0, -1, 2]))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(2, 2\)"):
        gapo.sequence_logps(logits, labels([1, 2], [1, 2]))
    with pytest.raises(TypeError, match="labels must be integers"):
        gapo.sequence_logps(logits, library.asarray(np.zeros((2, 3))))


def test_under_jit_an_empty_row_is_nan():
    jax = require("jax")
    labels = jax.numpy.array([[-100, 1, 2], [-100, -100, -100]])
    for average in (True, False):
        got = jax.jit(lambda x, y: gapo.sequence_logps(x, y, average=average))(jax.numpy.zeros((2, 3, 4)), labels)  # noqa: B023
        assert np.isfinite(got[0])
        assert np.isnan(got[1])


def test_lengths_are_what_the_average_divides_by(library):
    labels = np.array([[-100, 1, 2, -100], [3, -100, 0, -100]])
    lengths = response_lengths(library.asarray(labels))
    assert library.numpy(lengths).tolist() == [2, 1]  # nothing predicts the label at position 0
    logits = library.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)))
    mean, total = (gapo.sequence_logps(logits, library.asarray(labels), average=average) for average in (True, False))
    np.testing.assert_allclose(library.numpy(mean) * [2, 1], library.numpy(total), rtol=1e-5)
