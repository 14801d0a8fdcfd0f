"""Fuzzing: whatever the files hold, reading them works or is an error that names the file; 10,000 cases and more.

``fuzz.run`` asserts that nothing but our errors is raised, that they name the file, and that no more is made than the
file can hold. Random cases come from fixed seeds; the corpus is what coverage-guided fuzzing found worth keeping.
"""

import random
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.formats import fuzz
from tests.formats.encoders import bitmask_of, encode_packed
from tests.formats.golden import CASES, FOLDER, config
from tests.formats.weights import random_weight, same_bits
from vllm_sparse.errors import FormatError, SparseError
from vllm_sparse.formats import FORMATS, claims, detect
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import SCHEMES

SEEDS, CASES_PER_SEED = 20, 500
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(fuzz.ODD_TEXTS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(fuzz.KEYS), inner, max_size=6)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("fuzz")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_changed_checkpoints_are_read_or_refused(folder, seed):
    source, starts = random.Random(seed), fuzz.seeds()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = 0
    for number in range(CASES_PER_SEED):
        case = fuzz.mutate(source.choice(starts), source)
        try:
            read += fuzz.run(case, folder, (bool(number % 2),))
        except Exception as error:
            error.add_note(f"seed {seed}, case {number}")
            raise
    assert 0 < read < CASES_PER_SEED, "the changes are too small or too large to find anything"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB were taken for files of a few KiB"


@pytest.mark.parametrize("file", sorted(fuzz.CORPUS.iterdir()), ids=lambda file: file.name)
def test_the_corpus_is_read_or_refused(folder, file):
    fuzz.run(file.read_bytes(), folder)


def test_the_starts_are_checkpoints(folder):
    assert all(fuzz.run(case, folder, (True,)) for case in fuzz.seeds())


@given(st.dictionaries(st.sampled_from(fuzz.KEYS), json_values, max_size=8), st.sampled_from(CASES))
@settings(max_examples=400, deadline=None)
def test_any_config_is_read_or_refused(changes, case):
    for found in (changes, config(case) | changes):
        claims(found)
        for kind in FORMATS:
            kind.matches(found)
        try:
            form = detect(found)
            if form is not None and form.scheme_of("a.q_proj") is not None:
                form.tensors("a.q_proj", 64, 128, torch.bfloat16)
        except FormatError as error:
            assert str(error)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused(folder, data, as_file):
    config_text, file = fuzz.split(fuzz.seeds()[0])
    fuzz.run(fuzz.join(config_text, data) if as_file else fuzz.join(data, file), folder, (True,))


shapes = st.lists(st.sampled_from((0, 1, 2, 3, 4, 8, 16, 64)), max_size=3)
dtypes = st.sampled_from((torch.uint8, torch.int8, torch.int16, torch.int32, torch.bfloat16, torch.float8_e4m3fn))


@given(st.sampled_from(CASES), st.data())
@settings(max_examples=400, deadline=None)
def test_tensors_of_any_shape_and_dtype_are_read_or_refused(case, data):
    tensors = load_file(FOLDER / f"{case.name}.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape, dtype = data.draw(shapes), data.draw(dtypes)
    tensors[name] = (
        torch.randint(0, 256, (*shape, 4), dtype=torch.uint8).flatten().view(dtype)[: torch.Size(shape).numel()]
    )
    tensors[name] = tensors[name].reshape(shape)
    parts = data.draw(st.sampled_from(((), (case.n,), (case.n // 2, case.n - case.n // 2), (1,))))
    try:
        detect(config(case)).to_weight("model.q_proj", tensors, parts).validate("model.q_proj")
    except SparseError as error:
        assert str(error).startswith("model.q_proj: ")


def changed_bytes(tensor, data):
    """Return a copy of ``tensor`` with some bytes changed."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).clone()
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    return raw.view(tensor.dtype).view(tensor.shape)


@given(st.sampled_from([case for case in CASES if case.format in ("sparse-24-bitmask", "pack-quantized")]), st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_is_read_without_loss(case, data):
    tensors = load_file(FOLDER / f"{case.name}.safetensors")
    name = "compressed" if "compressed" in tensors else "weight_packed"
    if case.format == "sparse-24-bitmask" and data.draw(st.booleans()):
        name = "bitmask"
    tensors[name] = changed_bytes(tensors[name], data)
    try:
        weight = detect(config(case)).to_weight("q", tensors)
    except FormatError:
        return
    if case.format == "sparse-24-bitmask":
        assert same_bits(bitmask_of(weight.to_dense_codes(), weight), tensors["bitmask"])
        assert same_bits(weight.values, tensors["compressed"])
    else:
        zeros = None
        if not case.symmetric:
            zeros = detect(config(case)).zero_points(tensors["weight_zero_point"], case.bits)
        again = encode_packed(weight.to_dense_codes(), case.bits, zeros)
        assert same_bits(again["weight_packed"], tensors["weight_packed"])


@given(st.sampled_from(list(SCHEMES)), st.data())
@settings(max_examples=300, deadline=None)
def test_what_the_native_format_accepts_is_read_without_loss(name, data):
    scheme = SCHEMES[name]
    form = Sparse24Format(scheme, group_size=32 if scheme.grouped else -1)
    tensors = form.from_weight(random_weight(scheme, 4, 64, group_size=form.group_size))
    changed = data.draw(st.sampled_from(sorted(tensors)))
    tensors[changed] = changed_bytes(tensors[changed], data)
    try:
        weight = form.to_weight("q", tensors)
    except FormatError as error:
        assert str(error).startswith("q: ")
        return
    assert all(same_bits(tensor, tensors[last]) for last, tensor in form.from_weight(weight).items())
