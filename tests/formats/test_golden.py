"""Every reader against files that compressed-tensors 0.14.0.1 wrote, bit by bit, and that package against ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.formats.encoders import encode
from tests.formats.golden import CASES, FOLDER, Case, config, layer
from tests.formats.weights import same_bits
from tests.tables import add_row
from vllm_sparse.errors import FormatError, NotSparseError
from vllm_sparse.formats import detect
from vllm_sparse.scheme import SCHEMES

MODULE = "model.layers.0.mlp.up_proj"
SPARSE = [case for case in CASES if case.two_of_four]
ORACLE = Path(os.environ.get("VLLM_SPARSE_ORACLE", "none"))  # `make test` names it


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return what compressed-tensors 0.14.0.1 says of the files that we encode, and the folder of those it writes."""
    if not (ORACLE / "compressed_tensors").is_dir():
        pytest.skip("VLLM_SPARSE_ORACLE names no folder with compressed-tensors 0.14.0.1 (requirements/oracle.txt)")
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    for case in CASES:
        save_file(encode(case, layer(case)), ours / f"{case.name}.safetensors")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.formats.oracle", str(theirs), str(ours)]
    environment = os.environ | {"PYTHONPATH": f"{ORACLE.resolve()}{os.pathsep}{root}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, theirs


def golden(case: Case) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return a golden file's config and tensors."""
    path = FOLDER / f"{case.name}.safetensors"
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["quantization_config"]), load_file(path)


def scheme_name(case: Case) -> str:
    if case.bits == 16:
        return "bf16"
    if case.dtype == torch.float8_e4m3fn:
        return "fp8"
    if case.format in ("marlin-24", "pack-quantized") or case.weight_only:
        return "w4a16" if case.bits == 4 and case.symmetric else "w8a16"
    return "int8"


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: case.name)
def test_what_the_oracle_wrote_is_read_bit_by_bit(case):
    quantization, tensors = golden(case)
    assert quantization == config(case)
    made, form = layer(case), detect(quantization)
    assert form.scheme_of(MODULE) is SCHEMES[scheme_name(case)]
    weight = form.to_weight(MODULE, tensors, [case.n])
    assert weight.scheme is SCHEMES[scheme_name(case)]
    assert same_bits(weight.to_dense_codes() + 0 if case.bits == 16 else weight.to_dense_codes(), made["codes"])
    if case.bits != 16:
        scales = made["scales"].reshape(-1, 1).expand(case.n, 1) if case.group_size == 0 else made["scales"]
        assert torch.equal(weight.scales.double(), scales.double())
        assert weight.group_size == max(case.group_size, -1) or case.group_size == 0
    assert form.scheme_of("lm_head") is None or case.bits == 16


@pytest.mark.parametrize(
    "case", [case for case in SPARSE if case.format != "sparse-24-bitmask"], ids=lambda case: case.name
)
def test_what_we_encode_are_the_oracles_bytes(case):
    # Not sparse-24-bitmask: the oracle fills up its groups by topk, whose order of ties is not defined.
    _, tensors = golden(case)
    ours = encode(case, layer(case))
    assert set(ours) == set(tensors)
    assert all(same_bits(ours[name], tensor) for name, tensor in tensors.items())


def test_every_format_has_a_golden_file_of_every_scheme_it_can_hold():
    held: dict[str, set[str]] = {}
    for case in SPARSE:
        weight = detect(config(case)).to_weight(MODULE, golden(case)[1])
        same = torch.equal(weight.to_dense_codes().float(), layer(case)["codes"].float())
        held.setdefault(case.format, set()).add(scheme_name(case) if same else "WRONG")
    for form, schemes in held.items():
        cells = ("exact" if name in schemes else "" for name in SCHEMES)
        add_row("Golden files that are read bit-exactly", ("format", *SCHEMES), (form, *cells))
    assert held == {
        "sparse-24-bitmask": {"bf16", "fp8", "int8"},
        "sparse-bitmask": {"bf16", "fp8", "int8"},
        "marlin-24": {"w4a16", "w8a16"},
        "pack-quantized": {"w4a16", "w8a16"},
        "float-quantized": {"fp8"},
        "int-quantized": {"int8", "w8a16"},
    }


def test_what_is_not_two_of_four_is_an_error():
    case = next(case for case in CASES if not case.two_of_four)
    quantization, tensors = golden(case)
    form = detect(quantization)
    with pytest.raises(NotSparseError, match=f"{MODULE}: .* groups of four have more than two non-zeros"):
        form.to_weight(MODULE, tensors, [case.n])
    assert torch.equal(form.to_dense_codes(MODULE, tensors), layer(case)["codes"])


def test_a_legacy_bitmask_cannot_be_served_and_says_how_to_convert_it():
    case = next(case for case in CASES if case.format == "sparse-bitmask")
    form = detect(config(case))
    assert form.claims(config(case))
    with pytest.raises(FormatError, match=f"{MODULE}: .*convert it once with 'vllm-sparse convert SRC -o OUT'"):
        form.tensors(MODULE, case.n, case.k, torch.bfloat16)


def test_the_oracle_reads_what_we_encode(oracle):
    said = oracle[0].splitlines()
    assert [line.split()[0] for line in said if line.endswith(" same")] == [case.name for case in CASES], oracle[0]
    for form in dict.fromkeys(case.format for case in CASES):
        count = sum(case.format == form for case in CASES)
        add_row("Files that compressed-tensors 0.14.0.1 reads as we do", ("format", "files"), (form, str(count)))


def test_the_oracle_writes_the_golden_files(oracle):
    for case in CASES:
        if case.format == "sparse-24-bitmask":  # see above
            continue
        written, kept = load_file(oracle[1] / f"{case.name}.safetensors"), golden(case)[1]
        assert all(same_bits(written[name], kept[name]) for name in kept), case.name


def test_what_the_oracle_writes_as_bitmask_is_read_bit_by_bit(oracle):
    """Whichever zeros it keeps: its choice is none of ours."""
    for case in (case for case in SPARSE if case.format == "sparse-24-bitmask"):
        tensors = load_file(oracle[1] / f"{case.name}.safetensors")
        weight = detect(config(case)).to_weight(MODULE, tensors, [case.n])
        assert torch.equal(weight.to_dense_codes().float(), layer(case)["codes"].float()), case.name
