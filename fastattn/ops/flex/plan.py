"""How a call runs: as plain attention, or by a program with its tables and classes of tiles.

A plan is made of a traced graph, of sizes and of what captured tensors are, and kept where it depends on none of their contents: captured
integers, and indices that are made of captured numbers, are looked at anew in each call.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from ...masks import NO_MASK_ARGS, MaskArgs
from ...runtime import torch_private
from . import prepare
from .graph import Graph
from .hoist import Source, hoisted, materialised
from .prepare import Traced
from .recognise import documents, recognise

_LEAST_SCORES = 1 << 20  # of a call: below, tables of its own cost what they could save
_LEAST_QUERIES = 32
_MOST_PLANS = 256
_plans: OrderedDict[tuple, "Plan"] = OrderedDict()  # safe: a key says all that a plan is made of


@dataclass(frozen=True)
class Plan:
    mask: MaskArgs  # what `Mask` says
    program: torch.Tensor | None  # None: plain attention
    sources: tuple[Source, ...] = ()  # of the tensors that the program loads from
    graph: Graph | None = (
        None  # which sources are of: a trace's with the nodes that planning added, without tensors
    )
    classes: torch.Tensor | None = None

    def tables(self, call: Traced, dtype: torch.dtype, device: torch.device) -> tuple:
        """(floats, integers) that the program loads from, of this call's captured tensors."""
        graph = call.graph if self.graph is None else self.graph.copy(call.graph.tensors)
        return prepare.tables(materialised(self.sources, graph), dtype, device)[:2]


def planned(call: Traced, mask: MaskArgs, gradients: bool, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan of a traced call. mask: what is given beside its functions. IndexError and NotImplementedError of `check_numbers`."""
    tensors = call.graph.tensors
    if mask is not NO_MASK_ARGS or torch_private.transformed() or _depends_on_contents(call):
        return _made(call, mask, gradients, device, dtype)
    of_tensors = tuple((t.shape, t.requires_grad) for t in tensors)
    key = (
        call.graph.key(),
        call.score,
        call.mask,
        call.weighs,
        of_tensors,
        call.sizes,
        gradients,
        device,
        dtype,
    )
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _made(call, mask, gradients, device, dtype)
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    return found


def _depends_on_contents(call: Traced) -> bool:
    """Whether tiles of a mask or ranges of indices may follow from what captured tensors hold."""
    graph = call.graph
    loads = graph.where(lambda node: node.op == "load", call.outs())
    indices = {a for n in loads for a in graph.nodes[n].args}
    read = any(graph.nodes[n].op == "load" for n in graph.reach(indices))
    return read or not all(t.is_floating_point() for t in graph.tensors)


def _made(call: Traced, mask: MaskArgs, gradients: bool, device: torch.device, dtype: torch.dtype) -> Plan:
    sizes = call.sizes
    square = sizes.queries == sizes.keys
    if call.mask is not None and mask is NO_MASK_ARGS:
        mask, call.mask = recognise(call.graph, call.mask, square=square)
    if call.mask is not None and sizes.batch == 1 and square and mask.cu_seqlens_q is None:
        # the rest is documents alone: each is then an attention of its own
        starts = documents(call.graph, call.mask, sizes.queries)
        if starts is not None:
            starts, longest = starts.to(device), int(starts.diff().max())
            mask = mask._replace(
                cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest
            )
            call.mask = None
    if call.mask is None and call.graph.nodes[call.score].value == "s" and not call.weighs:
        return Plan(mask, None)
    from_start = prepare.check_numbers(call)
    classes = prepare.classes(call, device)
    sources = tuple(Source(n, -1, None) for n in range(len(call.graph.tensors)))
    graph = call.graph.copy([])
    if _worth_tables(call, device, dtype):
        call, sources = hoisted(call)
        from_start = prepare.check_numbers(call)
    *_, offsets = prepare.tables(call.graph.tensors, dtype, device)
    return Plan(mask, prepare.program(call, offsets, from_start, gradients), sources, graph, classes)


def _worth_tables(call: Traced, device: torch.device, dtype: torch.dtype) -> bool:
    sizes = call.sizes
    scores = sizes.batch * sizes.heads * sizes.queries * sizes.keys
    if (
        device.type != "cpu"
        or dtype != torch.float32
        or scores < _LEAST_SCORES
        or sizes.queries < _LEAST_QUERIES
    ):
        return False
    # tables are made by an autograd function, which torch.func does not take
    return not (torch_private.transformed() or torch_private.differentiates_forward())
