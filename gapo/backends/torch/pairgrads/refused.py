"""The error of the tape."""


class Refused(ValueError):
    """The tape cannot tell the groups' gradients apart, or they are not autograd's: use autograd's own.

    `lasting`: the answer stays the same for every batch, while the module and the function are as they are.
    `spent`: the graph behind the outputs was propagated through, and is gone.
    """

    lasting = True
    spent = False
