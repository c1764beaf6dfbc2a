"""From a PyTorch model to a plan, by ``torch.export``."""

from __future__ import annotations

import contextlib
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from rarefy._transformer import traceable_transformers
from rarefy.act.functional import kept_operators
from rarefy.engine import named, nodes, operators, recurrent, views
from rarefy.engine.batch_first import batch_first
from rarefy.engine.explicit import explicit_dtypes
from rarefy.engine.plan import Operator, Plan, Ref, Step, Value
from rarefy.engine.structure import Flat
from rarefy.engine.tracing import CaptureError, OthersAlone, export, uncollected

_NAMES = {function: name for name, function in named.FUNCTIONS.items()}


#: Operators whose result, or whether they work at all, depends on the strides of their operand.
_LAID_OUT = frozenset(
    f"aten.{name}"
    for name in ("view_as_complex.default", "view.dtype", "as_strided.default", "as_strided_scatter.default")
)


#: Operators of several results of which a step gives the first.
_FIRST = ("aten._native_batch_norm", "aten.batch_norm", "aten.max.dim", "aten.min.dim", "aten.embedding_bag")


def capture(model: nn.Module, inputs: Sequence[Tensor], fixed_because: str | None = None) -> Plan:
    """The plan of a model, as it computes on inputs of these shapes and dtypes, for any batch size where it can.

    Where ``fixed_because`` says why, it is for the batch size of the inputs alone.

    Raises CaptureError for a model that ``torch.export`` does not trace, or that does more than to compute tensors from
    tensors.
    """
    with (
        contextlib.redirect_stderr(cast(TextIO, OthersAlone(sys.stderr))),
        torch.no_grad(),
        kept_operators(),
        recurrent.by_layers(),
        traceable_transformers(),
        uncollected(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch.export warns of its own parts
        program, fixed_because = export(model, tuple(inputs), fixed_because)
        if fixed_because is None and recurrent.along_batch(program.graph):
            program, fixed_because = export(model, tuple(inputs), "a recurrent layer's sequence is along it")
        return _Graph(program, fixed_because, model).plan()


class _Graph:
    """An exported graph on its way to a plan."""

    def __init__(self, program: ExportedProgram, fixed_because: str | None, model: nn.Module) -> None:
        self.program = program
        self.fixed_because = fixed_because
        self.constants: dict[str, Tensor] = {}
        self.folded: dict[str, Sequence[Tensor]] = {}  # what operators with several results make of constants
        self.sources: dict[str, str] = {}
        self.scales: dict[str, Tensor] = {}  # of the output channels of weights that come as whole numbers
        self.aliases: dict[str, fx.Node] = {}
        self.operands: dict[str, str] = {}  # what a node reads in place of its first argument
        self.results: dict[str, tuple[str, ...]] = {}  # of nodes with several, where each is a value of the plan
        self.roots: dict[str, fx.Node] = {}  # what a reshaped node has the numbers of
        self.forms: dict[str, dict[str, fx.Node]] = {}  # the nodes with the numbers of a root, by their shapes
        self.inputs: list[str] = []
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                self.inputs.append(spec.arg.name)
            else:
                held: Mapping[str, Any] = program.state_dict if spec.target in program.state_dict else program.constants
                source = spec.target.removeprefix(Flat.PREFIX) if isinstance(model, Flat) else spec.target
                self._add_constant(spec.arg.name, held[spec.target], source)
        nodes = {node.name: node for node in program.graph.nodes}
        labels = {name: name for name in self.inputs}
        if isinstance(model, Flat):  # whose arguments have no names of their own
            for name, label in zip(self.inputs, model.takes.labels(), strict=True):
                nodes[name]._rename(label)
                labels[name] = nodes[name].name
        for output in program.graph_signature.output_specs:
            if output.kind is OutputKind.USER_INPUT_MUTATION:
                raise CaptureError(
                    f"the model changes its input {labels[str(output.target)]!r} in place; an engine leaves its inputs "
                    "alone: let the model change a copy, x.clone()"
                )
            if output.kind is not OutputKind.USER_OUTPUT:
                raise CaptureError(
                    f"the model changes {output.target!r} in its forward; an engine keeps no state: give it as an input"
                )
        shape = nodes[self.inputs[0]].meta["val"].shape
        self.inputs = [*labels.values()]
        self.batch = str(shape[0]) if shape else "1"
        explicit_dtypes(program.graph)
        recurrent.without_cells(program.graph)
        if fixed_because is None:
            batch_first(program.graph, self.inputs)

    def _add_constant(self, name: str, value: Any, source: str) -> None:
        if not isinstance(value, Tensor):
            raise CaptureError(f"the model holds {source!r}, a {type(value).__name__}: an engine holds tensors alone")
        self.constants[name], self.sources[name] = value.detach(), source

    def plan(self) -> Plan:
        steps: list[Step] = []
        values: dict[str, Value] = {}
        result: Any = ()
        for node in self.program.graph.nodes:
            operand = node.args[0] if node.args else None
            node.args = fx.map_arg(node.args, self._original)
            node.kwargs = fx.map_arg(node.kwargs, self._original)
            if node.op == "output":
                result = node.args[0]
            elif node.op == "call_function" and not self._vanishes(node):
                steps += self._laid_out(node, operand)
                steps += self._recurrent(node, values) or [self._step(node)]
            if isinstance(node.meta.get("val"), Tensor):
                value = node.meta["val"]
                rows = str(tuple(value.shape[:-1]))
                shape, fold, inner = nodes.sample_shapes(node, self.batch)
                values[node.name] = Value(shape, value.dtype, rows, fold=fold, inner=inner)
        outputs, single = self._outputs(result)
        read = {name for step in steps for name in step.inputs} | {*outputs}
        return Plan(
            inputs=tuple(self.inputs),
            outputs=outputs,
            single=single,
            steps=tuple(steps),
            values={name: values[name] for name in (*self.inputs, *(s.output for s in steps), *read) if name in values},
            constants={name: value for name, value in self.constants.items() if name in read},
            batch=None if self.fixed_because is None else int(self.batch),
            fixed_because=self.fixed_because,
        )

    def _original(self, node: fx.Node) -> fx.Node:
        return self.aliases.get(node.name, node)

    def _vanishes(self, node: fx.Node) -> bool:
        """Whether the node needs no step: nobody uses it, it gives back its input, or it is a constant."""
        target = str(node.target)
        if not node.users and "_assert" not in target:
            return True
        first = node.args[0] if node.args else None
        # A copy of a constant is made now, and then lies as asked.
        copied = target in ("aten.contiguous.default", "aten.clone.default") and (
            isinstance(first, fx.Node) and first.name in self.constants
        )
        if self._has_been(node):
            return True
        if (target in nodes.IDENTITIES or _is_whole(node)) and isinstance(first, fx.Node) and not copied:
            self.aliases[node.name] = first
            return True
        if node.target is operator.getitem:
            made, index = node.args
            assert isinstance(made, fx.Node)
            if made.name in self.results:
                value = self.results[made.name][cast(int, index)]
                if value != node.name:
                    self.aliases[node.name] = next(user for user in made.users if user.name == value)
                return True
            if isinstance(made.meta["val"], Tensor):  # whose step gives the first of several tensors alone
                self.aliases[node.name] = made
                return True
            if made.name in self.folded:
                self.constants[node.name] = operator.getitem(self.folded[made.name], index)
                return True
        known = all(each.name in self.constants for each in node.all_input_nodes)
        if not known or not isinstance(node.target, OpOverload):
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        result = node.meta.get("val")
        if isinstance(result, Tensor):
            self.constants[node.name] = self._computed(node)
            self._note_scale(node)
        elif isinstance(result, (list, tuple)) and all(isinstance(each, Tensor) for each in result):
            self.folded[node.name] = self._computed(node)
        else:
            return False
        if len(node.all_input_nodes) == 1:  # what is made of one layer's weight alone still belongs to the layer
            self.sources[node.name] = self.sources.get(node.all_input_nodes[0].name, "")
        return True

    def _has_been(self, node: fx.Node) -> bool:
        """Whether reshapes come back to a shape that the same numbers had before: then it is the tensor of then."""
        if not nodes.keeps_order(node):
            return False
        x = cast(fx.Node, node.args[0])
        if x.name in self.constants:
            return False
        root = self.roots.get(x.name, x)
        forms = self.forms.setdefault(root.name, {_size(root): root})
        first = forms.setdefault(_size(node), node)
        self.roots[node.name] = root
        if first is not node:
            self.aliases[node.name] = first
        return first is not node

    def _note_scale(self, node: fx.Node) -> None:
        """Remember by what scales a constant was dequantised: the zero points of weights are 0."""
        given: list[Any] = [self.constants[a.name] if isinstance(a, fx.Node) else a for a in node.args]
        match str(node.target), given:
            case "quantized_decomposed.dequantize_per_channel.default", [_, scale, zero, 0, *_]:
                if zero is None or not zero.any():
                    self.scales[node.name] = scale.float()
            case "quantized_decomposed.dequantize_per_tensor.default", [weight, float() as scale, 0, *_]:
                self.scales[node.name] = torch.full(tuple(weight.shape[:1]), scale, dtype=torch.float32)

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: self.constants[each.name])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _step(self, node: fx.Node) -> Step:
        if isinstance(node.target, OpOverload):
            handler = operators.handler(str(node.target))
            float32 = getattr(node.meta.get("val"), "dtype", None) is torch.float32
            first = str(node.target).startswith(_FIRST)
            if handler is not None and (float32 or first):
                step = handler(self._call(node))
                if step is not None:
                    if not float32:
                        node.meta["val"] = node.meta["val"][0]
                    return step
        return views.captured(self._call, node) or self._operator(node)

    def _recurrent(self, node: fx.Node, values: dict[str, Value]) -> Sequence[Step]:
        """The steps of a recurrent layer; none for another node."""
        if not isinstance(node.target, OpOverload):
            return ()
        found = recurrent.steps_of(self._call(node))
        if found is None:
            return ()
        self.results |= {node.name: found.results} if found.results else {}
        values.update({name: values[like] for name, like in found.like.items()})
        return found.steps

    def _call(self, node: fx.Node) -> operators.Call:
        return operators.Call(node, _arguments(node), self.constants, self.sources, self.batch, self.scales)

    def _laid_out(self, node: fx.Node, operand: Any) -> list[Operator]:
        """What lays the operand out in memory as in the graph, for an operator that depends on it; it reads that then.

        Copies vanish, and steps give what is contiguous: nothing else depends on where numbers lie.
        """
        target = str(node.target)
        if target in ("aten.sym_stride.int", "aten.sym_storage_offset.default"):
            raise CaptureError(f"the model reads {target.split('.')[1]}, where numbers lie in memory{_where(node)}")
        if target not in _LAID_OUT or not isinstance(operand, fx.Node):
            return []
        x, value = self._original(operand), operand.meta["val"]
        order = list(range(value.dim()))
        if "as_strided" in target:
            if target == "aten.as_strided.default":
                order.sort(key=lambda axis: -value.stride(axis))
            fills = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            if not fills or not value.permute(order).is_contiguous():
                raise CaptureError(
                    f"{target} reads more than the numbers of its operand{_where(node)}: give it a contiguous tensor"
                )
        # The others have the meaning of their operand's numbers alone, which need only lie as they take them.
        copied = {"memory_format": torch.contiguous_format}
        first = Operator(
            name=f"{node.name}_order",
            output=f"{node.name}_order",
            target="aten.permute.default",
            args=(Ref(x.name), order),
        )
        moved = order != sorted(order)
        read = Ref(first.output if moved else x.name)
        second = Operator(
            name=f"{node.name}_operand",
            output=f"{node.name}_operand",
            target="aten.clone.default",
            args=(read,),
            kwargs=copied,
        )
        self.operands[node.name] = second.output
        return [first, second] if moved else [second]

    def _operator(self, node: fx.Node) -> Operator:
        args, kwargs = _plain(node.args), _plain(node.kwargs)
        if node.name in self.operands:
            args = (Ref(self.operands[node.name]), *args[1:])
        return Operator(name=node.name, output=node.name, target=_target(node), args=args, kwargs=kwargs)

    def _outputs(self, result: Any) -> tuple[tuple[str, ...], bool]:
        single = self.program.call_spec.out_spec.is_leaf()
        flat = self.program.call_spec.out_spec.type in (tuple, list) and all(
            spec.is_leaf() for spec in self.program.call_spec.out_spec.children()
        )
        tensors = all(isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) for node in result)
        if not (single or flat) or not tensors:
            kinds = ", ".join(
                "tensor" if isinstance(value, Tensor) else type(value).__name__.replace("SymInt", "size")
                for value in (node.meta.get("val") if isinstance(node, fx.Node) else node for node in result)
            )
            raise CaptureError(
                f"the model gives back something else than a tensor or a tuple of tensors ({kinds}"
                f"{', in a dict or in tuples of tuples' if tensors else ''}); wrap it in a "
                "module that takes the tensors out"
            )
        return tuple(node.name for node in result), single


def _size(node: fx.Node) -> str:
    return str(tuple(node.meta["val"].shape))


def _is_whole(node: fx.Node) -> bool:
    """Whether the node is a slice that takes everything, a padding by nothing or a conversion to the same type."""
    target, x = str(node.target), node.args[0] if node.args else None
    if target in ("aten.pad.default", "aten.constant_pad_nd.default"):
        return not any(cast(Sequence[Any], node.args[1]))
    if target in ("aten.type_as.default", "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout"):
        before, after = (each.meta.get("val") for each in (cast(fx.Node, x), node))
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
    if str(node.target) != "aten.slice.Tensor":
        return False
    given = _arguments(node)
    return given["start"] in (None, 0) and given["end"] in (None, sys.maxsize) and given["step"] == 1


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by the names of its operator's schema, defaults filled in."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    return {**given, **node.kwargs}


def _where(node: fx.Node) -> str:
    """Where in the model's code a node comes from."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
    return f" at {lines[-1]}" if lines else ""


def _target(node: fx.Node) -> str:
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    if isinstance(target, OpOverload):
        # What a step gives is not always laid out as in the graph, so that a view may need a copy.
        name = str(target)
        return "aten.reshape.default" if name in ("aten.view.default", "aten._unsafe_view.default") else name
    if target in _NAMES:
        return _NAMES[target]
    raise CaptureError(f"the engine cannot run the operator {target}{_where(node)}")


def _plain(argument: Any) -> Any:
    """An argument of the graph as the plan has it."""
    if isinstance(argument, fx.Node):
        return Ref(argument.name)
    if isinstance(argument, dict):
        return {name: _plain(value) for name, value in argument.items()}
    if isinstance(argument, (list, tuple)):
        return (list if isinstance(argument, list) else tuple)(_plain(each) for each in argument)
    return argument
