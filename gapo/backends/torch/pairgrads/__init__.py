"""The gradient of every group of rows, by every parameter of any `nn.Module`, from one backward. See README.md."""

from gapo.backends.torch.pairgrads.gradients import GroupGradients
from gapo.backends.torch.pairgrads.parts import Explicit, Lookup, Outer, Part
from gapo.backends.torch.pairgrads.refused import Refused
from gapo.backends.torch.pairgrads.rules import register_rule
from gapo.backends.torch.pairgrads.tape import Tape
from gapo.backends.torch.pairgrads.verdicts import Verdicts

__all__ = ["Explicit", "GroupGradients", "Lookup", "Outer", "Part", "Refused", "Tape", "Verdicts", "register_rule"]
