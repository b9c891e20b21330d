"""What was made of modules' weights once, for as long as the modules are what they were."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Kept:
    """`made`, and whether `modules` still are as they were when it was made.

    Looking up each weight through its modules, asking what it is and making an array of it takes a decoding step longer
    than its arithmetic. `holds` sees parameters, buffers and modules that were replaced or moved in memory, hooks, and
    options set anew on `modules` themselves (not on those inside them). Numbers that change in place are not its
    business: what is made here are views.

    Belongs to the modules it was made of alone: a copy of them, or a file, gets None in its place.
    """

    __slots__ = ("entries", "hooks", "made", "places")

    def __init__(self, modules: Sequence[nn.Module], made: Any, owner: nn.Module | None = None):
        """`owner`: whose children by name the modules have to remain, where it is not among them itself."""
        self.made = made
        entries: list[tuple[dict[str, Any], str, Any]] = []
        if owner is not None:
            entries += [(owner._modules, name, each) for name, each in owner._modules.items() if each in modules]
        hooks: list[Any] = []
        places: list[tuple[Tensor, int]] = []
        for module in modules:
            entries += [(module.__dict__, name, each) for name, each in vars(module).items() if name[0] != "_"]
        for module in dict.fromkeys(inner for each in modules for inner in each.modules()):
            hooks += [module._forward_hooks, module._forward_pre_hooks]
            for held in (module._modules, module._parameters, module._buffers):
                entries += [(held, name, each) for name, each in held.items()]
            for each in (*module._parameters.values(), *module._buffers.values()):
                if each is not None:
                    places.append((each, each.data_ptr()))
        self.entries, self.hooks, self.places = tuple(entries), tuple(hooks), tuple(places)

    def holds(self) -> bool:
        """Whether nothing changed."""
        for owner, name, each in self.entries:
            if owner.get(name) is not each:
                return False
        for tensor, place in self.places:
            if tensor.data_ptr() != place or not tensor.is_contiguous():
                return False
        return not any(self.hooks)

    def __reduce__(self):
        return _nothing, ()


def _nothing() -> None:
    return None
