"""Layers that add to the residual stream make good what it lacks."""

import pytest
import torch

from tests.compress.conftest import make_model
from tests.compress.test_architectures import save
from tests.compress.test_experts import CONFIGS
from vllm_sparse.compress import compress, job
from vllm_sparse.compress.calibrate import BlockHessians
from vllm_sparse.compress.evaluate import load_dense
from vllm_sparse.compress.model import BlockCall, BlockModel
from vllm_sparse.compress.pipeline import dry_run
from vllm_sparse.compress.residual import Streams, Write, aimed, find_writes
from vllm_sparse.formats.checkpoint import Checkpoint

SMALL = {"num_samples": 32, "seq_len": 64, "quiet": True, "device": "cpu"}
LLAMA = {
    "self_attn.o_proj": Write("", "post_attention_layernorm"),
    "mlp.down_proj": Write("post_attention_layernorm", ""),
}
WRITES = {
    "llama": LLAMA,
    "phi3": LLAMA,
    "opt": {"self_attn.out_proj": Write("", "final_layer_norm"), "fc2": Write("final_layer_norm", "")},
    "roberta": {
        "attention.output.dense": Write("", "attention.output.LayerNorm"),
        "output.dense": Write("intermediate", "output.LayerNorm"),
    },
    "mixtral": {"self_attn.o_proj": LLAMA["self_attn.o_proj"]},  # experts' outputs are weighed first
    "gemma2": {},  # normed first
    "phi": {},  # attention and MLP are added together
    "gpt_neox": {},
}


def weights(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors*"))}


@pytest.fixture(params=["stages", "twice"])
def way(request, monkeypatch):
    """Run blocks once, in stages, or twice, as on a GPU."""
    if request.param == "twice":
        monkeypatch.setattr(job, "_STAGED_BYTES", -1)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_layers_that_add_to_the_stream_are_found(kind, dtype, tmp_path):
    path = make_model(tmp_path, config=CONFIGS[kind]) if kind in CONFIGS else save(tmp_path, kind)
    model = BlockModel(Checkpoint(path), torch.device("cpu"), dtype)
    x, calls = model.embed(torch.randint(2, 257, (2, 50)))
    found = find_writes(model.load(0), model.linears(0), (calls[0], x))
    assert {name.partition(".0.")[2]: write for name, write in found.items()} == WRITES[kind]


class Block(torch.nn.Module):
    """Adds to the stream twice, the second time from two layers with one input, which cannot be told apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))
        self.norm = torch.nn.Identity()

    def forward(self, x):
        x = x + self.a(x.relu())
        y = self.norm(x).tanh()
        return x + self.b(y) + self.c(y)


@torch.no_grad()
def test_what_is_lacking_is_the_dense_stream_without_ours():
    torch.manual_seed(0)
    block, call = Block(), BlockCall((), {})
    linears = {"a": block.a, "b": block.b, "c": block.c}
    dense, ours = torch.randn(2, 3, 40, 8)
    writes = find_writes(block, linears, (call, ours))
    assert writes == {"a": Write("", "norm")}
    streams = Streams(block, linears, writes)
    with streams.dense():
        call.run(block, dense)
    with streams.compared([ours]), BlockHessians(linears, streams=streams) as hessians:
        with hessians.batch(0):
            call.run(block, ours)
        groups = {group.names: group for group in hessians.groups()}
    x = ours.relu().flatten(0, 1)
    lack = (dense + block.a(dense.relu()) - ours - block.a(ours.relu())).flatten(0, 1)
    torch.testing.assert_close(groups["a",].lack, lack.T @ x / len(x))
    assert groups["b", "c"].lack is None
    # The best weights for a target are those of a regression on it.
    target = x @ block.a.weight.T + lack
    best = torch.linalg.lstsq(x.double(), target.double()).solution.T
    new = aimed(block.a.weight, groups["a",].lack, groups["a",].h + 1e-6 * torch.eye(8), 1.0)
    torch.testing.assert_close(new.double(), best, rtol=1e-3, atol=1e-4)


def test_a_stream_that_lacks_nothing_changes_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_STAGED_BYTES", -1)  # else earlier layers of the block are compressed already
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    for residual in (0, 1):
        compress(model, tmp_path / str(residual), calibration=text, scheme="bf16", residual=residual, **SMALL)
    assert weights(tmp_path / "0") == weights(tmp_path / "1")


@pytest.mark.parametrize("options", [{}, {"curvature": 8}, {"refine": 2}])
def test_the_stream_is_nearer_to_the_dense_one(text, tmp_path, way, options):
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    ids = torch.tensor(list(text.read_bytes()[:4096])).view(64, 64)
    dense, apart = load_dense(model).model(ids).last_hidden_state, {}
    for residual in (0, 1):
        out = tmp_path / str(residual)
        report = compress(model, out, calibration=ids, scheme="bf16", residual=residual, **SMALL, **options)
        assert report.verification.violations == 0
        apart[residual] = float((load_dense(out).model(ids).last_hidden_state - dense).square().mean())
    assert apart[1] < 0.9 * apart[0]


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_rounding_alone_is_made_good_on_the_same_mask(text, tmp_path, scheme):
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    ids = torch.tensor(list(text.read_bytes()[:4096])).view(64, 64)
    sparse = tmp_path / "sparse"
    compress(model, sparse, calibration=ids, scheme="bf16", format="dense", **SMALL)
    before, apart = load_dense(sparse), {}
    small = SMALL | {"scheme": scheme, "pruner": "none"} | ({"group_size": 32} if scheme == "w4a16" else {})
    for residual in (0, 1):
        compress(sparse, tmp_path / str(residual), calibration=ids, residual=residual, **small)
        after = load_dense(tmp_path / str(residual))
        for name, weight in before.state_dict().items():
            if name.endswith("proj.weight"):
                assert not after.state_dict()[name][weight == 0].any()
        apart[residual] = float((after.model(ids)[0] - before.model(ids)[0]).square().mean())
    assert apart[1] < apart[0]


def test_a_block_without_such_a_layer_is_left_alone_and_says_so(text, tmp_path, capfd):
    model = save(tmp_path / "model", "phi")
    small = SMALL | {"num_samples": 4, "quiet": False, "scheme": "bf16"}
    compress(model, tmp_path / "0", calibration=text, **small)
    assert "residual" not in capfd.readouterr().err
    compress(model, tmp_path / "1", calibration=text, residual=0.5, **small)
    told = capfd.readouterr().err
    for block in (0, 1):
        assert f"block {block}: no layer's output is added to the residual stream as it is" in told
    assert weights(tmp_path / "0") == weights(tmp_path / "1")


def test_a_plan_counts_both_models_hidden_states(tiny, text, tmp_path):
    small = {"num_samples": 4, "seq_len": 64, "device": "cpu", "scheme": "bf16"}
    one, two = (dry_run(tiny, tmp_path / "out", calibration=text, residual=share, **small) for share in (0.0, 0.5))
    assert two.activation_bytes == 2 * one.activation_bytes
