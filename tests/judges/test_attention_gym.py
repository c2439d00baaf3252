"""The score and mask functions that attention-gym publishes (github.com/meta-pytorch/attention-gym), where it can be imported: each as it
is, forward and gradients against float64. `git clone` it and put it on PYTHONPATH."""

import importlib

import pytest
import torch

import fastattn as fa
from fastattn import testing

# its modules are imported one by one: the package itself imports what draws pictures and what GPUs need
gym = importlib.util.find_spec("attn_gym")
pytestmark = pytest.mark.skipif(
    gym is None, reason="attention-gym is not on the path (a clone of its repository)"
)

BATCH, HEADS, LENGTH = 2, 4, 128


def module(name):
    return importlib.import_module(f"attn_gym.{name}")


def offsets():
    return torch.tensor([0, 30, 31, 70, 128], dtype=torch.int32)


def graph():
    """Adjacency of rings with chords, and types of their edges."""
    i = torch.arange(LENGTH)
    near = ((i[:, None] - i) % LENGTH == 1) | ((i[:, None] - i) % 17 == 3)
    adjacency = (near | near.T).expand(BATCH, -1, -1).contiguous()
    return adjacency, (i[:, None] + i) % 5 * torch.ones(BATCH, 1, 1, dtype=torch.long)


def learned(*shape):
    return testing.random_tensor(*shape, seed=sum(shape), requires_grad=True)


def spatial():
    mods = module("mods.graphormer")
    table = learned(HEADS, 8)
    return mods.generate_graphormer_spatial_bias(table, mods.shortest_path_distances(graph()[0], 6)), [table]


def edges():
    mods = module("mods.graphormer")
    table = learned(HEADS, 3, 5)
    found = mods.shortest_path_edge_types(*graph(), 3)
    return mods.generate_graphormer_edge_bias(table, *found), [table]


SCORES = {
    "alibi": lambda: (module("mods.alibi").generate_alibi_bias(HEADS), []),
    "soft cap": lambda: (module("mods.softcapping").generate_tanh_softcap(20), []),
    "sandwich": lambda: (module("mods.sandwich").generate_sandwich_bias(HEADS, LENGTH), []),
    "gelu": lambda: (module("mods.activation").generate_activation_score_mod(), []),
    "relu": lambda: (module("mods.activation").generate_activation_score_mod(torch.relu), []),
    "sigmoid": lambda: (module("mods.activation").generate_activation_score_mod(torch.sigmoid), []),
    "graphormer, spatial": spatial,
    "graphormer, edges": edges,
}
MASKS = {
    "causal": lambda: module("masks.causal").causal_mask,
    "sliding window": lambda: module("masks.sliding_window").generate_sliding_window(20),
    "dilated": lambda: module("masks.dilated_sliding_window").generate_dilated_sliding_window(20, 3),
    "documents": lambda: module("masks.document_mask").generate_doc_mask_mod(
        module("masks.causal").causal_mask, offsets()
    ),
    "packed documents": lambda: module("masks.document_mask").generate_packed_causal_doc_mask_mod(offsets()),
    "prefix": lambda: module("masks.prefix_lm").generate_prefix_lm_mask(40),
    "shared prefix": lambda: module("masks.shared_prefix").generate_shared_prefix_mask_mod(
        offsets(), torch.tensor([0, 0, 0, 3])
    ),
    "global and window": lambda: module("masks.global_sliding_window").generate_global_sliding_window(
        9, torch.arange(LENGTH) % 50 == 0
    ),
    "block diffusion": lambda: module("masks.block_diffusion").generate_block_diffusion_mask(LENGTH // 2, 16),
    "flamingo": lambda: module("masks.flamingo").generate_vision_cross_attention_mask_mod(
        torch.tensor([[0, 50], [50, 90], [20, 128], [3, 4]]), LENGTH // 4
    ),
    "tree": lambda: module("masks.jetspec").generate_jetspec_tree_causal_mask_mod(
        0,
        module("masks.jetspec").build_tree_ancestor_matrix([-1, *(i // 2 for i in range(LENGTH - 1))], "cpu"),
    ),
    "natten": lambda: module("masks.natten").generate_natten(16, 8, 5, 3),
    "natten, tiled": lambda: module("masks.natten").generate_tiled_natten(16, 8, 5, 3, 4, 4),
    "natten, Morton": lambda: module("masks.natten").generate_morton_natten(16, 8, 5, 3),
    "sta, 2-D": lambda: module("masks.sta").generate_sta_mask_mod_2d((8, 16), (4, 8), (2, 4)),
    "sta, 3-D": lambda: module("masks.sta").generate_sta_mask_mod_3d((2, 8, 8), (2, 4, 4), (1, 2, 2)),
    "svg, spatial": lambda: module("masks.svg").generate_spatial_head_mask_mod(10, 4, 16, 2, True, 8),
    "svg, temporal": lambda: module("masks.svg").generate_temporal_head_mask_mod(10, 4, 16, 2),
    "batchify": lambda: module("masks.batchify").batchify_mask_mod(module("masks.causal").causal_mask, 32),
}


def compare(score_mod, mask_mod, captured):
    def run(*inputs, backend=None):
        return fa.flex_attention(*inputs[:3], score_mod, mask_mod, return_lse=True, backend=backend)

    qkv = testing.attention_inputs(BATCH, HEADS, HEADS, LENGTH, LENGTH, 16)
    found, truth = [], []
    for results, dtype, backend in ((found, torch.float32, "cpu"), (truth, torch.float64, "reference")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in qkv]
        out, lse = run(*leaves, backend=backend)
        loss = (out * torch.arange(16.0).cos()).sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
        results += [out, lse, *torch.autograd.grad(loss, [*leaves, *captured])]
    for i, (mine, true) in enumerate(zip(found, truth, strict=True)):
        # float32's roundings of sums of 128 terms, and of as many as read an element of a captured table
        terms = LENGTH if i < 5 else BATCH * HEADS * LENGTH * LENGTH
        testing.assert_close_to_truth(mine, true, None, terms=4 * terms, name=f"result {i}", magnitude=1.0)


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    score_mod, captured = SCORES[name]()
    compare(score_mod, None, captured)
    compare(score_mod, MASKS["documents"](), captured)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    compare(None, MASKS[name](), [])


def test_products_of_captured_rows_are_refused_with_advice():
    q_rope, k_rope = torch.randn(BATCH, HEADS, LENGTH, 8), torch.randn(BATCH, 1, LENGTH, 8)
    mods = module("mods.latent_attention")
    score_mod = mods.generate_mla_rope_score_mod(q_rope, k_rope, HEADS, 1.0)
    q, k, v = testing.attention_inputs(BATCH, HEADS, HEADS, LENGTH, LENGTH, 16)
    with pytest.raises(NotImplementedError, match="concatenate them to their head dims"):
        fa.flex_attention(q, k, v, score_mod)
