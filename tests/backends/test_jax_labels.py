"""Labels of JAX's operations, against where the numbers of each group come out of the operation itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gapo.backends.jaxrows.labels import _RULES, Labels, Mixes, carry

ROWS = np.arange(4)[:, None]  # of an array (4, 6)
ZEROS = jnp.zeros((2, 6))
COLUMNS = jnp.array([[4], [1]])  # the same in each row, and one of its own for each row
OWN_COLUMNS = jnp.array([[[0], [2]], [[3], [1]], [[5], [4]], [[2], [2]]])
LOOK_UP = lax.GatherDimensionNumbers(offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(1,))
LOOK_UP_BY_ROW = lax.GatherDimensionNumbers(
    (), (1,), (1,), operand_batching_dims=(0,), start_indices_batching_dims=(0,)
)
PLACE = lax.ScatterDimensionNumbers(
    update_window_dims=(0,), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1,)
)
PLACE_BY_ROW = lax.ScatterDimensionNumbers(
    (), (1,), (1,), operand_batching_dims=(0,), scatter_indices_batching_dims=(0,)
)


def part(x: Any, start: int) -> Any:
    """Two rows of `x`, and 0 for the others."""
    return lax.pad(x[start : start + 2], 0.0, [(start, 2 - start, 0), (0, 0, 0)])


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "pad": lambda x: lax.pad(x, 0.0, [(1, 2, 0), (0, 3, 0)]),
    "pad_within": lambda x: lax.pad(x, 0.0, [(2, 1, 2), (0, 0, 1)]),
    "pad_cut": lambda x: lax.pad(x, 0.0, [(-1, -1, 1), (0, 0, 0)]),
    "pad_cut_at_the_end": lambda x: lax.pad(x, 0.0, [(1, -2, 0), (-1, 0, 0)]),
    "slice": lambda x: lax.slice(x, (1, 0), (4, 5)),
    "slice_by_steps": lambda x: lax.slice(x, (0, 1), (4, 6), (2, 2)),
    "rev": lambda x: lax.rev(x, (0,)),
    "rev_of_columns": lambda x: lax.rev(x, (1,)),
    "concatenate": lambda x: lax.concatenate([ZEROS, x, ZEROS[:1]], 0),
    "concatenate_columns": lambda x: lax.concatenate([x, x[:, :2]], 1),
    "split": lambda x: lax.split(x, (1, 3))[1],
    "split_columns": lambda x: lax.split(x, (1, 5), axis=1)[0],
    "cumsum": lambda x: lax.cumsum(x, 1),
    "transpose": lambda x: lax.transpose(x, (1, 0)),
    "broadcast": lambda x: lax.broadcast_in_dim(x, (2, 4, 3, 6), (1, 3)),
    "reduce": lambda x: lax.reduce_sum_p.bind(x, axes=(1,), out_sharding=None),
    "reshape": lambda x: lax.reshape(x, (2, 2, 3, 2)),
    "reshape_to_one_axis": lambda x: lax.reshape(x, (24,)),
    "dot": lambda x: lax.dot_general(x, jnp.ones((6, 5)), (((1,), (0,)), ((), ()))),
    "dot_from_the_right": lambda x: lax.dot_general(jnp.ones((5, 6)), x, (((1,), (1,)), ((), ()))),
    "dot_of_rows": lambda x: lax.dot_general(x, jnp.ones((4, 6, 2)), (((1,), (1,)), ((0,), (0,)))),
    "convolution": lambda x: lax.conv_general_dilated(x.reshape(4, 2, 3), jnp.ones((5, 2, 2)), (1,), "SAME"),
    "gather": lambda x: lax.gather(x, COLUMNS, LOOK_UP, (4, 1)),
    "gather_by_row": lambda x: lax.gather(x, OWN_COLUMNS, LOOK_UP_BY_ROW, (1, 1)),
    "scatter_add": lambda x: lax.scatter_add(jnp.zeros((4, 6)), COLUMNS, x[:, :2], PLACE),
    "scatter_add_by_row": lambda x: lax.scatter_add(x, OWN_COLUMNS, x[:, 2:4], PLACE_BY_ROW),
    "scatter_add_into_part": lambda x: lax.scatter_add(part(x, 0), OWN_COLUMNS, x[:, 2:4], PLACE_BY_ROW),
    "split_of_two_rows": lambda x: lax.split(x[:2], (1, 1))[1],
    "add_of_halves": lambda x: part(x, 0) + part(x, 2),
    "add_shifted": lambda x: x + lax.select(jnp.eye(4, 6) > 0, x, jnp.zeros((4, 6))),
}


def labels_by_hand(fn: Callable[[Any], Any]) -> np.ndarray:
    """The group whose numbers an entry of `fn(x)` holds, -1 for a 0; raises where there are several."""
    x = np.arange(1.0, 25.0).reshape(4, 6)
    parts = np.stack([np.asarray(fn(jnp.asarray(np.where(group == ROWS, x, 0.0)))) for group in range(4)])
    assert ((parts != 0).sum(0) <= 1).all()
    return np.where((parts != 0).any(0), (parts != 0).argmax(0), -1)


def labels_carried(fn: Callable[[Any], Any]) -> Labels:
    """The label of each entry of `fn(x)`, by the rules of its operations."""
    jaxpr = jax.make_jaxpr(fn)(jnp.zeros((4, 6))).jaxpr
    labels: dict[Any, Labels] = {jaxpr.invars[0]: ROWS}
    for eqn in jaxpr.eqns:
        own = [labels.get(atom) if type(atom).__name__ == "Var" else None for atom in eqn.invars]
        if any(x is not None for x in own):
            shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
            results = [tuple(v.aval.shape) for v in eqn.outvars]
            labels |= zip(eqn.outvars, carry(eqn.primitive.name, eqn.params, shapes, results, own), strict=True)
    (out,) = jaxpr.outvars
    return labels[out]


@pytest.mark.parametrize("name", OPERATIONS)
def test_labels_are_where_the_numbers_come_out(name: str) -> None:
    expected = labels_by_hand(OPERATIONS[name])
    carried = labels_carried(OPERATIONS[name])
    # Along an axis of length 1 the entries share their label: that of those which are not 0.
    shared = tuple(axis for axis, n in enumerate(carried.shape) if n == 1)
    np.testing.assert_array_equal(carried, expected.max(shared, keepdims=True))


def test_labels_are_refused_where_entries_meet() -> None:
    with pytest.raises(Mixes, match="sums over"):
        carry("reduce_sum", {"axes": (0,)}, [(4, 6)], [(6,)], [ROWS])
    with pytest.raises(Mixes, match="different groups"):
        carry("add", {}, [(4, 6), (4, 6)], [(4, 6)], [ROWS, ROWS[::-1]])
    with pytest.raises(Mixes, match="different groups"):
        carry("add", {}, [(4, 6), (4, 6)], [(4, 6)], [np.array([[1]]), np.array([[0]])])
    with pytest.raises(Mixes, match="two derivatives"):
        carry("mul", {}, [(4, 6), (4, 6)], [(4, 6)], [ROWS, ROWS])
    with pytest.raises(Mixes, match="not linear"):
        carry("div", {}, [(4, 6), (4, 6)], [(4, 6)], [None, ROWS])
    with pytest.raises(Mixes, match="not among the operations"):
        carry("exp", {}, [(4, 6)], [(4, 6)], [ROWS])
    with pytest.raises(Mixes, match="sums over"):
        carry("cumsum", {"axis": 0}, [(4, 6)], [(4, 6)], [ROWS])


@pytest.mark.parametrize("shape", [(3, 1), (4,), (4, 1, 1)])
def test_labels_that_do_not_fit_the_result_are_refused(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_RULES, "neg", lambda *_: np.arange(int(np.prod(shape))).reshape(shape))
    with pytest.raises(Mixes, match="another shape than its result"):
        carry("neg", {}, [(4, 6)], [(4, 6)], [ROWS])
