"""Parameter structs: what they point to stays alive, and what they cannot hold is refused."""

import weakref

import pytest
import torch

from fastattn import _native


def test_a_struct_keeps_its_tensors_alive():
    copy = torch.ones(2, 3)
    seen = weakref.ref(copy)
    struct = _native.params("GateParams", a=copy, b=None, threads=1)
    del copy
    assert seen() is not None
    del struct
    assert seen() is None


def test_misspelt_fields_and_too_many_dimensions_are_refused():
    with pytest.raises(AttributeError):
        _native.params("GateParams", aa=1)
    with pytest.raises(ValueError, match="at most 4 dimensions"):
        _native.params("GateParams", a=torch.ones(1, 1, 1, 1, 1))
