"""The tape: one backward, of input gradients alone, from which every group's gradient by every parameter is made.

While the tape records, each layer that owns trained parameters gets an identity node behind it, a tap. In the backward
the tap sees G, the gradient of the layer's output, beside the saved input A. From the two a rule makes the gradients
group by group (`rules`), or the layer runs again on the groups' rows (`local`). README.md tells the idea.

Nothing is taken on trust. At every step the tape asks

- whether something changes gradients or mixes rows unseen: hooks on parameters, batch norm in training (`rules.unfit`);
- whether every use of a parameter lies within a layer that has a tap: autograd's graph (`graph.uses`);
- whether row r of what the module returns belongs to group r mod N: the outputs' derivatives by rows (`rows.odd_rows`);
- whether each layer receives the rows of the batch: its shape.

Once for each function of the outputs, kind of layout and mode of the model (`verdicts`), it compares all gradients with
autograd's, parameter by parameter, under another weight for each group. What holds for one group is not taken to hold
for more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from gapo.backends.torch.pairgrads.agreement import HALVES, coarse_arithmetic, compared
from gapo.backends.torch.pairgrads.gradients import GroupGradients
from gapo.backends.torch.pairgrads.graph import Edge, no_grads_left, uses, walk
from gapo.backends.torch.pairgrads.local import Rerun, Snapshot, differentiable, local_vjp
from gapo.backends.torch.pairgrads.parts import Outer
from gapo.backends.torch.pairgrads.refused import Refused
from gapo.backends.torch.pairgrads.rows import odd_rows, scaled_by, unequal
from gapo.backends.torch.pairgrads.rules import Rule, rule_for, trained, unfit
from gapo.backends.torch.pairgrads.verdicts import Verdicts, basis


class Tape:
    """Records a forward of `module` so that one backward gives the gradient of every group of rows.

    Row r of every batch belongs to group r mod N, so that a group has its rows N apart. A forward takes all rows, or
    one block of N after the other. Rows must not interact in the forward pass.

    Args:
        module: any `nn.Module`. Layers without a rule run again; see `register_rule`.
        groups: N; None for the number of entries of the first output.
        blocks: how many rows a group has.
        by_row: keep each row's gradient, so that weights may be (blocks, N). The explicit form takes `blocks` times the
            memory. With several outputs, output j must be that of block j.
        verdicts: what earlier tapes proved. Pass one `Verdicts()` to all tapes of a loop, and the comparison with
            autograd, which costs a second backward, is made once; without it, each tape proves itself.
        key: the function that makes the outputs of the module and a batch; a verdict holds for this one alone.
        once: names of parameters of which one weighted sum is asked. Their matrix products are put off until then: N
            explicit gradients would be written and read again for nothing.

    Raises:
        Refused: by `with` or `backward`, with the reason.

    >>> import torch
    >>> from torch import nn
    >>> from gapo.backends.torch.pairgrads import Tape
    >>> module, x, y = nn.Linear(3, 1), torch.randn(4, 3), torch.randn(4)
    >>> with Tape(module, groups=4) as tape:
    ...     losses = (module(x)[:, 0] - y) ** 2
    >>> grads = tape.backward(losses)
    >>> update = grads.weighted(torch.full((4,), 0.25))  # the gradient of the mean loss
    >>> influence = grads.along(update)  # of each example on it, (4,)
    >>> influence.shape
    torch.Size([4])
    """

    def __init__(
        self,
        module: nn.Module,
        groups: int | None = None,
        *,
        blocks: int = 1,
        by_row: bool = False,
        verdicts: Verdicts | None = None,
        key: Any = None,
        once: Iterable[str] = (),
    ) -> None:
        self._module, self._groups, self._blocks = module, groups, blocks
        self._by_row, self._once = by_row and blocks > 1, frozenset(once)
        self.parameters: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._verdicts = Verdicts() if verdicts is None else verdicts
        self._basis: Hashable = basis(key, module)
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._root = torch.zeros((), requires_grad=True)  # what the backward is asked for: it lies behind every tap
        self._covered: dict[Edge, str] = {}  # uses of parameters within layers that have a tap
        self._handles: list[RemovableHandle] = []
        self._recording = False
        self._silent = False  # whether layers run again, where taps are no part of the function
        self._sink: GroupGradients | None = None  # where the taps put what they see; None in other backwards
        self._differs: list[tuple[str, Tensor]] = []  # whether reruns gave something else, by type of layer
        self._coarse, self._count = False, 0
        self._reruns = False  # whether a layer behind the outputs has no rule
        self._spent = False  # whether the graph behind the outputs was propagated through

    def __enter__(self) -> Tape:
        # Hooks may come and go, so `unfit` is asked each time; verdicts are not.
        if why := self._verdicts.get("refused", self._module, self._basis) or unfit(self._module):
            raise Refused(why)
        for layer in self._module.modules():
            if trained(layer):
                # First of the layer's hooks: what others make of its output is not the rule's affair.
                handle = layer.register_forward_hook(_hook(self, rule_for(layer)), prepend=True, with_kwargs=True)
                self._handles.append(handle)
        # Hooks outlive the forward, since a checkpointed layer runs again in the backward. They go with the tape.
        weakref.finalize(self, _remove, self._handles)
        self._recording = True
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        self._recording = False
        if error is not None:
            self.close()

    def close(self) -> None:
        """Take the taps off the layers. The recorded forward stays right for autograd's own backwards."""
        _remove(self._handles)
        self._covered.clear()

    def backward(
        self,
        outputs: Tensor | Sequence[Tensor],
        seeds: Sequence[Tensor] | None = None,
        *,
        again: Callable[[], Sequence[Tensor]] | None = None,
    ) -> GroupGradients:
        """Propagate once, and return the gradients of `sum_j seeds[j] * outputs[j]`, group by group.

        Args:
            outputs: each (N,), entry i of group i's rows alone.
            seeds: each (N,); None for ones.
            again: runs the forward again and returns the same outputs. It lets the comparison with autograd succeed on
                graphs that can be propagated through once only.

        Raises:
            Refused: with the reason.
        """
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        seeds = [torch.ones_like(y) for y in outputs] if seeds is None else list(seeds)
        self._groups = int(outputs[0].shape[0]) if self._groups is None else self._groups
        try:
            return self._checked(outputs, seeds, again)
        except Refused as refusal:
            refusal.spent = self._spent
            if refusal.lasting:
                self._verdicts.keep("refused", self._module, self._basis, str(refusal))
            raise
        finally:
            self.close()

    def _checked(
        self, outputs: tuple[Tensor, ...], seeds: list[Tensor], again: Callable[[], Sequence[Tensor]] | None
    ) -> GroupGradients:
        calls, outside = self._look(outputs)
        self._coarse = any(call.half for call in calls) or coarse_arithmetic(
            (*self.parameters.values(), *outputs), outputs[0].device.type
        )
        layouts = frozenset((call.kind, call.ndim, call.rows // self._n, call.multiple) for call in calls)
        key = (self._basis, layouts, min(self._n, 2), self._by_row)
        odd = odd_rows(outputs, seeds, self._blocks, self._by_row, self._coarse)
        if outside:  # its gradient would differ from autograd's, which tells less
            raise Refused(outside)
        if not self._verdicts.get("proved", self._module, key):
            grads = self._prove(outputs, seeds, again)
            self._verdicts.keep("proved", self._module, key, True)
        elif not odd:
            grads = self._collect(outputs, seeds)
        if odd:
            raise Refused(odd)
        return grads

    @property
    def _n(self) -> int:
        assert self._groups is not None
        return self._groups

    def _look(self, outputs: Sequence[Tensor]) -> tuple[list[_Call], str | None]:
        """The calls whose taps lie behind `outputs`, in their order, and what uses a parameter outside of them.

        Raises:
            Refused: a layer did not receive the rows of the batch.
        """
        nodes = list(walk(outputs))
        # A call that leads nowhere, such as one whose output was detached, is no affair of the gradients.
        calls = sorted((n.call for n in nodes if _is_tap(n) and n.call.tape() is self), key=lambda call: call.index)
        outside = [name for edge, name in uses(nodes, self.parameters).items() if edge not in self._covered]
        self._covered.clear()
        # What follows needs a look at all calls: (rows, tokens) of one tells whether another one's axis is both.
        shapes = {(call.shape[0], call.shape[1]) for call in calls if call.ndim > 2 and self._by_rows(call.shape[0])}
        for call in calls:
            if why := call.why or self._lay_out(call, shapes):
                raise Refused(why)
        if self._by_row:
            self._tell_blocks(calls)
        self._reruns = any(call.grads is None for call in calls)
        return calls, f"{outside[0]} is used outside of its layer too" if outside else None

    def _by_rows(self, length: int) -> bool:
        return length % self._n == 0 and length // self._n <= self._blocks

    def _lay_out(self, call: _Call, shapes: set[tuple[int, int]]) -> str | None:
        """Tell the call how many rows it has, and how many tokens where its first axis holds both.

        That axis may also be a multiple of rows times tokens, as where norms take heads one by one. Unpadded tokens
        could be another multiple by chance: so the verdict is of this one.
        """
        length = call.shape[0]
        flat = sorted({shape for shape in shapes if shape[0] * shape[1] == length})
        several = {shape for shape in shapes if length % (shape[0] * shape[1]) == 0}
        plain = self._by_rows(length)
        if call.ndim < 3:  # (rows, width), or (rows * tokens, width)
            plain = plain and (length in {rows for rows, _ in shapes} if shapes else length == self._n * self._blocks)
            if plain and flat and flat != [(length, 1)]:
                return f"{call.kind} receives {call.shape}, where rows and tokens cannot be told apart"
        if plain:
            call.rows = length
        elif len(flat) == 1 or (not flat and len({rows for rows, _ in several}) == 1):
            rows, tokens = max(flat or several)
            call.rows, call.tokens, call.multiple = rows, length // rows, length // (rows * tokens)
        else:
            return f"{call.kind} receives {call.shape}: its first axis is not the rows of {self._n} groups"
        return None

    def _tell_blocks(self, calls: Sequence[_Call]) -> None:
        """Where forwards take a block each, the calls of a layer come in the order of the blocks."""
        by_layer: dict[int, list[_Call]] = {}
        for call in calls:
            if call.rows != self._n * self._blocks:
                by_layer.setdefault(id(call.layer), []).append(call)
        for part in by_layer.values():
            if len(part) % self._blocks or any(call.rows != self._n for call in part):
                raise Refused(f"{part[0].kind} is called {len(part)} times for {self._blocks} blocks of rows")
            for i, call in enumerate(part):
                call.block = i * self._blocks // len(part)

    def _prove(
        self, outputs: tuple[Tensor, ...], seeds: list[Tensor], again: Callable[[], Sequence[Tensor]] | None
    ) -> GroupGradients:
        """Propagate, and compare with autograd's own gradients.

        Under equal weights a wrong order of the rows would be unseen, so each group has another one. The comparison is
        of a weighted sum: to compare the N gradients one by one would take N backwards.
        """
        weights = unequal(outputs, self._by_row, seed=0)
        expected, lasts = self._expected(outputs, scaled_by(weights, seeds))
        if not lasts and again is not None:
            outputs = self._again(again)
        grads = self._collect(outputs, seeds)
        same, why = self._compare(grads, weights, expected)
        if same is False and again is not None:
            # Or the first backward spoilt the graph for the second. One pass needs only one.
            grads = self._collect(self._again(again), seeds)
            same, why = self._compare(grads, weights, expected)
        if not same:
            refusal = Refused(why or "gradients that are 0 or not finite prove nothing")
            refusal.lasting = same is False
            raise refusal
        return grads

    def _expected(self, outputs: Sequence[Tensor], cotangents: list[Tensor]) -> tuple[dict[str, Tensor], bool]:
        """Autograd's own gradients, and whether the graph is there for another backward."""
        inputs, lasts = list(self.parameters.values()), True
        with no_grads_left(self.parameters):
            try:
                grads = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True)
            except RuntimeError as error:
                if "donated buffer" not in str(error):  # of a compiled graph, which cannot be kept
                    raise
                grads = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)
                lasts, self._spent = False, True
        return dict(zip(self.parameters, grads, strict=True)), lasts

    def _compare(self, grads: GroupGradients, weights: Tensor, expected: dict[str, Tensor]) -> tuple[bool | None, str]:
        weights = weights if self._by_row and len(weights) > 1 else weights[0]
        return compared(
            lambda name: grads.weighted(weights, [name])[name], expected, than="autograd's", coarse=self._coarse
        )

    def _again(self, again: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        self._recording = True
        try:
            outputs = tuple(again())
        finally:
            self._recording = False
        self._look(outputs)
        return outputs

    def _collect(self, outputs: Sequence[Tensor], seeds: list[Tensor]) -> GroupGradients:
        """The one backward. Asked for the root's gradient only, the engine skips every product of weights."""
        self._spent = True
        self._sink = grads = GroupGradients(self.parameters, outputs[0], self._n, self._blocks, self._by_row)
        try:
            with no_grads_left(self.parameters), self._random_numbers_kept():
                torch.autograd.grad(outputs, self._root, seeds, allow_unused=True)
            if self._differs and bool(torch.stack([differs for _, differs in self._differs]).any()):
                kind = next(kind for kind, differs in self._differs if bool(differs))
                raise Refused(f"{kind} has no rule, and gives something else when it runs again on one group's rows")
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise Refused("the model writes to the input of a layer") from error
        finally:
            self._sink = None
            self._differs = []
        return grads

    def _random_numbers_kept(self) -> Any:
        """A layer that draws random numbers, and is refused for it, draws them once all the same."""
        if not self._reruns:
            return nullcontext()
        devices = {p.device.index for p in self.parameters.values() if p.device.type == "cuda"}
        return torch.random.fork_rng(devices=sorted(devices))

    def _record(
        self, layer: nn.Module, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Put a tap behind one call of `layer`."""
        outputs = differentiable(output)
        if not outputs:
            return None
        grads, saved = self._read(layer, rule, args, kwargs, output)
        tensors = Snapshot.tensors(args, kwargs)
        call = _Call(weakref.ref(self), layer, grads, as_groups=rule is not None and rule.reads is None)
        saved = saved if isinstance(saved, tuple) else (saved,)
        if grads is None:
            saved = tuple(tensors)
        if self._recording:  # else a checkpointed layer runs again, and the taps of its first run tell what they saved
            self._describe(call, outputs, tensors, saved[0] if grads is not None and saved else outputs[0])
            if grads is None:
                call.snapshot = Snapshot(layer, args, kwargs, outputs)
        if grads is not None and set(trained(layer)) == {"bias"} and rule is not None and rule.reads is None:
            saved = ()  # a bias needs no input, and autograd keeps none for it: the model may write to it
        # Detached: the tap must lead nowhere that the layer does not. Versions are shared, so writes are noticed.
        taps = _Tap.apply(call, self._root, len(outputs), *outputs, *(x.detach() for x in saved))
        if isinstance(output, Tensor):
            return taps[0]
        leaves, structure = tree_flatten(output)
        by_id = {id(x): tap for x, tap in zip(outputs, taps, strict=True)}
        return tree_unflatten([by_id.get(id(x), x) for x in leaves], structure)

    def _read(
        self, layer: nn.Module, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Any, Any]:
        """The way to make the gradients of this call, and the tensors that it reads; (None, ()) without a rule."""
        if rule is None:
            return None, ()
        if rule.reads is not None:
            read = rule.reads(layer, args, kwargs)
        elif len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
            read = args[0]
        else:
            return None, ()
        if rule.confirms is None:
            return rule.grads, read
        # Asked once for each layer, since on a GPU every look at a number waits for the work before it.
        key = (rule, type(layer).forward, layer.training)
        answer = self._verdicts.get("confirmed", layer, key)
        if answer is None:
            detached = tuple(x.detach() for x in read) if isinstance(read, tuple) else read.detach()
            try:
                answer = rule.confirms(layer, detached, output.detach() if isinstance(output, Tensor) else output)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # shapes that it does not know, say
                answer = False
            self._verdicts.keep("confirmed", layer, key, answer)
        return (rule.grads if answer is True else answer, read) if answer else (None, ())

    def _describe(self, call: _Call, outputs: list[Tensor], inputs: list[Tensor], rows: Tensor) -> None:
        """Note what the call used, and the shape of what tells its rows."""
        call.index = self._count = self._count + 1
        call.half = any(y.dtype in HALVES for y in outputs)
        call.shape, call.ndim = tuple(rows.shape), rows.ndim + (not rows.is_floating_point())
        behind = {x.grad_fn for x in inputs if x.grad_fn is not None}
        nodes = [node for node in walk(outputs, behind.__contains__) if node not in behind]
        if call.grads is not None:
            own = trained(call.layer)
            call.own = {part: self._names[id(p)] for part, p in own.items()}
            self._covered.update(uses(nodes, {self._names[id(p)]: p for p in own.values()}))
            return
        # Without a rule: also the parameters of layers inside that it uses itself, not through their forward.
        inside: dict[str, Tensor] = {self._names[id(p)]: p for p in call.layer.parameters() if p.requires_grad}
        used = uses(nodes, inside)
        others = {name for edge, name in used.items() if edge in self._covered}
        own_edges = {edge: name for edge, name in used.items() if name not in others}
        call.own = {name: name for name in own_edges.values()}
        self._covered.update(own_edges)
        if call.layer._forward_pre_hooks:
            call.why = f"{call.kind} has no rule, and forward pre-hooks"
        elif any(y.ndim == 0 or y.shape[0] != rows.shape[0] for y in outputs):
            call.why = f"{call.kind} has no rule, and outputs of different lengths"

    def _receive(self, call: _Call, saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
        """Make the parts of one call of its A and G, in the backward."""
        assert self._sink is not None
        # By row, each row of the call is a group of its own.
        groups = call.rows if self._by_row else self._n

        def split(x: Tensor) -> Tensor | None:
            if call.tokens is not None and x.ndim and x.shape[0] == call.rows:
                return x.unflatten(0, (-1, groups))  # the layer itself flattens rows and tokens
            if x.ndim == 0 or x.shape[0] != call.shape[0]:
                return None
            x = x if call.tokens is None else x.unflatten(0, (call.rows, call.tokens))
            return x.unflatten(0, (-1, groups))

        def by_tokens(x: Tensor) -> Tensor:
            """(blocks, N, tokens, width), or (blocks, N, tokens) of integers."""
            if not x.is_floating_point():
                return x.reshape(-1, groups, x.numel() // call.rows)
            return x.reshape(-1, groups, x.numel() // (call.rows * x.shape[-1]), x.shape[-1])

        if call.grads is None:
            assert call.snapshot is not None
            rerun = Rerun(call.snapshot, saved, gradients, split, self._coarse)
            own = {name: self.parameters[name] for name in call.own}
            self._silent = True
            try:
                parts = list(local_vjp(rerun, own, groups, self._differs))
            finally:
                self._silent = False
        else:
            a: Any = saved[0] if len(saved) == 1 else saved or None
            if call.as_groups and a is not None:
                a = by_tokens(a)
            parts = list(call.grads(call.layer, a, by_tokens(gradients[0])))
        for own_name, part in parts:
            name = call.own[own_name]
            form = part.smaller() if isinstance(part, Outer) and name not in self._once else part
            self._sink.parts[name].append((call.block, form))


class _Call:
    """One call of a layer: how its gradients are made, whose rows it holds, what it used."""

    def __init__(self, tape: weakref.ref[Tape], layer: nn.Module, grads: Any, as_groups: bool) -> None:
        self.tape, self.layer, self.grads, self.as_groups = tape, layer, grads, as_groups
        self.kind = type(layer).__name__
        self.snapshot: Snapshot | None = None
        self.own: dict[str, str] = {}  # the names of its parameters: to the rule, and to the module
        self.index, self.ndim, self.half = 0, 0, False
        self.shape: tuple[int, ...] = ()
        self.why: str | None = None  # it cannot be
        self.rows = 0
        self.tokens: int | None = None  # of each row, where the first axis is rows times tokens
        self.multiple = 0  # of the tokens that other layers have, there
        self.block: int | None = None


class _Tap(torch.autograd.Function):
    """The identity behind one call of a layer: in the backward it hands G over, beside what the call saved.

    Its second input is the tape's root, a scalar that no result depends on. A backward that asks for the root's
    gradient alone must come through every tap, and needs no gradient of weights: autograd leaves their products out.
    The root's gradient itself is None.
    """

    rows_first = True  # `rows.odd_rows` looks at the outputs' derivative by what this returns

    @staticmethod
    def forward(ctx: Any, call: _Call, root: Tensor, count: int, *tensors: Tensor) -> Any:
        # Through autograd's saved tensors, so that those of a checkpointed layer come from its second run. `call` is of
        # the first.
        ctx.save_for_backward(*tensors[count:])
        ctx.call, ctx.inputs = call, len(tensors) - count
        return tuple(y.detach() for y in tensors[:count])  # the same memory, but no view: models may write to it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tape = ctx.call.tape()
        if tape is not None and tape._sink is not None:  # autograd's own backwards pass here too
            with torch.no_grad():
                tape._receive(ctx.call, ctx.saved_tensors, gradients)
        return None, None, None, *gradients, *[None] * ctx.inputs


def _is_tap(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) is _Tap


def _hook(tape: Tape, rule: Rule | None) -> Any:
    # The taps in the graph hold their calls. Were a call to hold the tape, and its owner the outputs, a cycle through
    # the graph would be closed, which Python's collector cannot see.
    alive = weakref.ref(tape)

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tape = alive()
        if tape is None or tape._silent or not torch.is_grad_enabled():
            return None
        return tape._record(layer, rule, args, kwargs, output)

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
