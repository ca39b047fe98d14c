"""A griffe extension: the reference shows the objectives' public functions.

griffe reads the source, where `gapo.objectives.dpo` is a formula of one `LogProbs`. The decorator `objective` turns it
into a function of arrays, with a signature and a docstring of its own. Users call that function.
"""

import inspect
from typing import Any

import griffe

_DECORATOR = "gapo.objectives.formulas.objective"


class PublicSignatures(griffe.Extension):
    """Take signature and docstring of each decorated function from the imported module."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite one function; griffe calls this hook for each that it has loaded."""
        if all(decorator.callable_path != _DECORATOR for decorator in func.decorators):
            return
        public = griffe.dynamic_import(func.path)
        func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(public).parameters.values()))
        func.docstring = griffe.Docstring(inspect.getdoc(public) or "", parent=func)


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    return griffe.Parameter(
        parameter.name,
        annotation=str(parameter.annotation),
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        default=None if parameter.default is parameter.empty else repr(parameter.default),
    )
