"""A module's buffers by name: remembered before a step, taken back, given the form of a state.

A forward may write into a buffer, put another tensor in its place, or make it.
"""

import operator
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from dist_train.copies import Copies

ABSENT = "absent"  # the form of a buffer that is not registered


class Buffers:
    """The module's buffers, remembered before a step: a failed one spoils running statistics.

    What is taken back are the numbers, and of what a state dictionary holds the form, too. Other
    buffers that a forward makes or enlarges are caches, which the module may know of by other
    means: those stay as it made them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._owners = list(module.named_modules())
        self._dicts = [owner._buffers for _, owner in self._owners]
        self._views = [tensors.values() for tensors in self._dicts]  # as they are when looked at
        # The module's own tensors, written into; what a forward has put in place may be anyone's.
        self._own = [dict(tensors) for tensors in self._dicts]
        self._groups: list[Copies] = []
        self._list()
        self._built = self.outline()

    def remember(self) -> None:
        """Copy the buffers, in one kernel a dtype."""
        if not self._unchanged():
            self._list()
        for group in self._groups:
            group.take()

    def restore(self, bad: Tensor | None = None) -> None:
        """Put back what was remembered; with `bad` (0-d), only where it is above 0.

        Does not wait for the device, but where a forward has changed a buffer's form.
        """
        if bad is None:
            self._put_back()
            return
        if self._unchanged() and not self._others:
            undo = bad > 0
            for group in self._groups:
                group.put_back_if(undo)
            return
        if self._other_form():
            if bad.item() > 0:
                self._put_back()
            return
        undo = bad > 0
        for tensors, held, own, number in zip(
            self._dicts, self._held, self._own, range(len(self._dicts)), strict=True
        ):
            for name, before in held.items():
                copy, now = self._copies.get((number, name)), tensors.get(name)
                if copy is None or now is None or form_of(now) != form_of(before):
                    continue
                if now is before and own.get(name) is now:
                    torch.where(undo, copy, now, out=now)
                else:
                    tensors[name] = torch.where(undo, copy, now.detach())

    def floating(self) -> dict[tuple[int, str], Tensor]:
        """Return the buffers of real and complex numbers, by where they are."""
        return {
            (number, name): tensor.detach()
            for number, tensors in enumerate(self._dicts)
            for name, tensor in tensors.items()
            if tensor is not None
            and tensor.numel() > 0
            and (tensor.is_floating_point() or tensor.is_complex())
        }

    def put(self, values: dict[tuple[int, str], Tensor]) -> None:
        """Give buffers other numbers; `values` are by where they are, as in `floating`.

        One that is not there now, or a cache that was just made, is left.
        """
        for (number, name), value in values.items():
            now = self._dicts[number].get(name)
            before = form_of(self._held[number].get(name))
            loose = name in self._owners[number][1]._non_persistent_buffers_set
            if now is None or (loose and form_of(now) != before):
                continue
            if self._own[number].get(name) is now:
                now.detach().copy_(value)
            else:
                self._dicts[number][name] = value

    def saved(self) -> dict[str, Tensor | None]:
        """Return the buffers that belong to a state dictionary, by name, in order."""
        return self._named(saved=True)

    def saved_forms(self) -> dict[str, str]:
        """Return {name: form} of those."""
        return {name: form_of(tensor) for name, tensor in self.saved().items()}

    def caches(self) -> dict[str, Tensor | None]:
        """Return the buffers that belong to no state dictionary, by name, in order."""
        return self._named(saved=False)

    def marks(self) -> dict[str, tuple[int, int]]:
        """Return what changes of each buffer of a state that is written into or replaced."""
        saved = self.saved().items()
        return {name: (id(tensor), tensor._version) for name, tensor in saved if tensor is not None}

    def changed_since(self, marks: dict[str, tuple[int, int]]) -> list[str]:
        """Return the buffers of a state with other marks; not those that normalisations keep.

        The running statistics of BatchNorm and its like have no part in training. Call it before
        they are remembered anew: the marks are of tensors that live.
        """
        now = self.marks()
        spared = {
            f"{prefix}.{name}" if prefix else name
            for prefix, owner in self._owners
            if isinstance(owner, nn.modules.batchnorm._NormBase)
            for name in owner._buffers
        }
        return [
            name for name, mark in now.items() if name not in spared and marks.get(name) != mark
        ]

    def made(self) -> dict[str, str]:
        """Return {name: form as built} of each buffer of a state whose form is another one now."""
        now = self.saved_forms()
        built = {name: form_of(tensor) for name, tensor in self._built.items()}
        return {
            name: built.get(name, ABSENT)
            for name in now | built
            if now.get(name, ABSENT) != built.get(name, ABSENT)
        }

    def outline(self) -> dict[str, Tensor | None]:
        """Return the buffers that belong to a state dictionary without their numbers."""
        return {
            name: None if tensor is None else torch.empty_like(tensor, device="meta")
            for name, tensor in self.saved().items()
        }

    def take_form(self, tensors: Mapping[str, Tensor | None], made: dict[str, str]) -> None:
        """Give the buffers the form of `tensors`, their numbers undefined, where that is allowed.

        Args:
            tensors: of a state, by name.
            made: of that state: the buffers whose form a forward has changed, and how they were
                built. One that was built otherwise here is left: the state is of another module.
        """
        device = next((p.device for p in self.module.parameters()), None)
        for name in self.made():
            self._set(name, self._built.get(name), device)
        for name, form in made.items():
            if form == (form_of(self._built[name]) if name in self._built else ABSENT):
                self._set(name, tensors.get(name), device)

    def _unchanged(self) -> bool:
        """Say whether each buffer is the very tensor that was listed."""
        now = chain.from_iterable(self._views)
        same = all(map(operator.is_, now, self._listed))
        return same and sum(map(len, self._views)) == len(self._listed)

    def _list(self) -> None:
        """Note which tensors are the buffers, with room for a copy of each."""
        self._listed = list(chain.from_iterable(self._views))
        self._held = [dict(tensors) for tensors in self._dicts]
        live = {
            (number, name): tensor.detach()
            for number, held in enumerate(self._held)
            for name, tensor in held.items()
            if tensor is not None and tensor.numel() > 0
        }
        # Those of them that a forward has put in place.
        self._others = [
            at for at in live if self._own[at[0]].get(at[1]) is not self._held[at[0]][at[1]]
        ]
        kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in live.values())
        before = {group.form: group for group in self._groups}
        self._groups = []
        self._copies: dict[tuple[int, str], Tensor] = {}
        for kind in kinds:
            places = [at for at, tensor in live.items() if (tensor.dtype, tensor.device) == kind]
            group = Copies([live[at] for at in places], before)
            self._groups.append(group)
            self._copies |= zip(places, group.kept, strict=True)

    def _put_back(self) -> None:
        if not self._unchanged():
            for (_, owner), tensors, held in zip(
                self._owners, self._dicts, self._held, strict=True
            ):
                loose = owner._non_persistent_buffers_set
                for name in [n for n in tensors if n not in held and n not in loose]:
                    del tensors[name]
                for name, before in held.items():
                    kind = form_of(tensors[name]) if name in tensors else ABSENT
                    if name not in loose or kind == form_of(before):
                        tensors[name] = before
        if not self._others:
            for group in self._groups:
                group.put_back()
            return
        for (number, name), copy in self._copies.items():
            tensors, before = self._dicts[number], self._held[number][name]
            if (number, name) not in self._others and before is not None:
                before.detach().copy_(copy)
            elif tensors.get(name) is before:  # not a cache of another form now
                tensors[name] = copy.clone()

    def _other_form(self) -> bool:
        """Say whether a buffer of the state has another form than the one remembered."""
        for (_, owner), tensors, held in zip(self._owners, self._dicts, self._held, strict=True):
            for name in tensors.keys() | held.keys():
                now = form_of(tensors[name]) if name in tensors else ABSENT
                before = form_of(held[name]) if name in held else ABSENT
                if now != before and name not in owner._non_persistent_buffers_set:
                    return True
        return False

    def _named(self, *, saved: bool) -> dict[str, Tensor | None]:
        return {
            f"{prefix}.{name}" if prefix else name: tensor
            for (prefix, owner), tensors in zip(self._owners, self._dicts, strict=True)
            for name, tensor in tensors.items()
            if saved == (name not in owner._non_persistent_buffers_set)
        }

    def _set(self, name: str, like: Tensor | None, device: torch.device | None) -> None:
        """Make an empty buffer of the form of `like`; None: of none."""
        prefix, _, leaf = name.rpartition(".")
        number = next((n for n, (path, _) in enumerate(self._owners) if path == prefix), None)
        if number is None:
            return
        tensors = self._dicts[number]
        if like is None and name not in self._built:
            tensors.pop(leaf, None)
            return
        tensors[leaf] = None if like is None else torch.zeros_like(like, device=device)
        self._own[number][leaf] = tensors[leaf]


def form_of(tensor: Tensor | None) -> str:
    """Return a tensor's type and shape, in words."""
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
