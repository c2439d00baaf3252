"""What a call meant for another library's attention is answered."""

import warnings

import numpy as np
import pytest
import torch

import fastattn as fa

Q = torch.randn(1, 4, 16, 8)


@pytest.mark.parametrize("function", [fa.attention, fa.sigmoid_attention])
@pytest.mark.parametrize(
    ("keywords", "advice"),
    [
        ({"causal": True}, "no argument 'causal'; write mask=fastattn.Mask(causal=True)"),
        ({"is_causal": True}, "write mask=fastattn.Mask(causal=True)"),
        ({"softmax_scale": 0.1}, "write scale="),
        ({"window_size": (4, 0)}, "write mask=fastattn.Mask(window=(left, right))"),
        ({"enable_gqa": True}, "write nothing: where k has fewer heads than q"),
        ({"maks": None}, "no argument 'maks'; did you mean mask?"),
        ({"zzz": 1}, "no argument 'zzz'; it takes q, k, v, "),
    ],
)
def test_an_argument_of_another_library_says_what_to_write(function, keywords, advice):
    with pytest.raises(TypeError) as raised:
        function(Q, Q, Q, **keywords)
    assert advice in str(raised.value) and str(raised.value).startswith(f"fastattn.{function.__name__}: ")


def test_advice_names_only_arguments_that_the_function_has():
    with pytest.raises(TypeError, match="write dropout_p="):
        fa.attention(Q, Q, Q, dropout=0.1)
    with pytest.raises(
        TypeError, match="no argument 'dropout'; it takes q, k, v, scale, bias, mask, backend"
    ):
        fa.sigmoid_attention(Q, Q, Q, dropout=0.1)


def test_a_mask_by_position_is_named():
    with pytest.raises(TypeError, match="takes q, k and v by position, given a Mask as well; write mask="):
        fa.attention(Q, Q, Q, fa.Mask(causal=True))


def test_arrays_of_other_libraries_are_named_by_shape():
    with pytest.raises(TypeError, match=r"q must be a tensor, given a numpy ndarray of shape \(1x4x16x8\)"):
        fa.attention(Q.numpy(), Q, Q)
    with pytest.raises(TypeError, match=r"x must be a tensor, given a numpy float64 of shape \(a scalar\)"):
        fa.rms_norm(np.float64(3))


def test_flash_attns_layout_is_warned_about():
    def warned(*shape):
        x = torch.zeros(shape)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fa.attention(x, x, x)
        return [str(one.message) for one in found]

    [message] = warned(1, 512, 8, 4)
    assert "q has 512 heads and 8 queries" in message and "q.transpose(1, 2)" in message
    assert warned(1, 8, 512, 4) == warned(1, 128, 8, 4) == warned(1, 512, 1, 4) == []


def test_explain_takes_the_function_and_suggests_names():
    assert fa.explain(fa.attention, Q, Q, Q) == fa.explain("attention", Q, Q, Q)
    with pytest.raises(ValueError, match="given 'atention'; did you mean 'attention'"):
        fa.explain("atention", Q, Q, Q)
    with pytest.raises(ValueError, match="op_name must name a fastattn op"):
        fa.explain(print, Q)


def test_everything_is_listed():
    assert {"nn", "models", "optim", "integrations", "attention"} <= set(dir(fa))
    with pytest.raises(AttributeError) as raised:
        fa.atention  # noqa: B018
    assert raised.value.name == "atention" and raised.value.obj is fa
