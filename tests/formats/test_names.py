"""Lists of module names: what they match, and patterns that would take forever."""

import time

import pytest

from vllm_sparse.errors import FormatError
from vllm_sparse.formats import detect
from vllm_sparse.formats.names import is_ignored, names_in

NATIVE = {"quant_method": "sparse24", "version": 1, "scheme": "fp8"}


def test_names_and_patterns():
    names = names_in(["lm_head", r"re:.*\.gate$"], "ignore")
    assert is_ignored("lm_head", names) and is_ignored("model.layers.0.mlp.gate", names)
    assert not is_ignored("model.lm_head", names) and not is_ignored("model.layers.0.mlp.gate_proj", names)
    assert names_in(None, "ignore") == () and not is_ignored("", ())


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "((a{1,1000}){1,1000}){1,1000}b"])
def test_a_pattern_that_takes_exponential_time_is_an_error(pattern):
    form = detect(NATIVE | {"ignore": [f"re:{pattern}"]})
    start = time.monotonic()
    try:
        assert form.scheme_of("a" * 60 + ".b") is not None  # some are clever enough
    except FormatError as error:
        assert "takes more than 1 s for 'aaaa" in str(error)
    assert time.monotonic() - start < 60


def test_one_of_them_is_an_error_indeed():
    with pytest.raises(FormatError, match=r"the pattern 're:\(\(a\{1,1000\}\).*' takes more than 1 s"):
        is_ignored("a" * 60, ("re:((a{1,1000}){1,1000}){1,1000}b",))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["re:" + "a" * 1000], "has a pattern of more than 1000 characters"),
        (["re:a"] * 1001, "has 1001 patterns, more than 1000"),
        (["re:("], "has a bad pattern 're:\\('"),
        (["re:(?R)"], "has a bad pattern"),
        ([1], "must be a list of module names"),
    ],
)
def test_lists_that_are_refused(names, message):
    with pytest.raises(FormatError, match=message):
        detect(NATIVE | {"ignore": names})
