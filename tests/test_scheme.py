"""The table of schemes and the errors of asking for one that is not in it."""

import pytest
import torch

from vllm_sparse.errors import OptionError
from vllm_sparse.scheme import GROUP_SIZES, SCHEMES, check_group_size, get_scheme


def test_a_scheme_is_found_by_its_name():
    assert [get_scheme(name).name for name in SCHEMES] == ["bf16", "fp8", "int8", "w4a16", "w8a16"]


@pytest.mark.parametrize("name", ["W4A16", "", None, 4, ["fp8"]])
def test_an_unknown_scheme_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(OptionError, match=r"unknown scheme .*: expected one of bf16, fp8, int8, w4a16, w8a16"):
        get_scheme(name)


def test_the_largest_code_is_symmetric():
    codes = {name: scheme.max_code for name, scheme in SCHEMES.items()}
    assert codes == {"bf16": float("inf"), "fp8": 448.0, "int8": 127.0, "w4a16": 7.0, "w8a16": 127.0}
    assert torch.finfo(torch.float8_e4m3fn).max == 448.0


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_group_sizes_that_fit_are_accepted(group_size):
    check_group_size(get_scheme("w4a16"), group_size, 256, "q_proj")


@pytest.mark.parametrize(
    ("scheme", "group_size", "k", "message"),
    [
        ("w4a16", 16, 256, "q_proj: group size 16 is not supported, expected one of -1, 32, 64, 128"),
        ("w4a16", 0, 256, "q_proj: group size 0 is not supported"),
        ("w4a16", 128, 192, "q_proj: group size 128 does not divide the 192 input features"),
        ("fp8", 128, 256, "q_proj: scheme fp8 has per-channel scales, so group size must be -1"),
    ],
)
def test_group_sizes_that_do_not_fit_are_errors(scheme, group_size, k, message):
    with pytest.raises(OptionError, match=message):
        check_group_size(get_scheme(scheme), group_size, k, "q_proj")
