"""The fused vision block against the block's own modules: outputs, gradients, what it keeps, when it steps aside.

Without a GPU the pointwise references run in place of the kernels, and the kernels in Triton's interpreter, in a
process of their own (the switch is read at import).
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling.ops import vision_block
from modeling.ops.attention import flash_attention_4, reference
from modeling.ops.vision_block import fused as fused_block
from modeling.ops.vision_block import pointwise
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig
from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionAttention, Qwen3VLMoeVisionBlock

HAS_GPU = torch.cuda.is_available()


def make_block(
    hidden: int = 48, heads: int = 3, intermediate: int = 80, keep_qkv: bool = False, **attributes: str
) -> Qwen3VLMoeVisionBlock:
    sizes = {"hidden_size": hidden, "num_heads": heads, "intermediate_size": intermediate}
    config = Qwen3VLMoeConfig(vision_config=sizes | attributes).vision_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    block = Qwen3VLMoeVisionBlock(config, keep_qkv)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def inputs(block: Qwen3VLMoeVisionBlock, lengths: tuple[int, ...] = (20, 17)) -> dict:
    like = block.norm1.weight
    generator = torch.Generator().manual_seed(1)
    patches, dim = sum(lengths), block.attn.head_dim
    angles = torch.rand(patches, dim // 2, generator=generator).mul(6).repeat(1, 2).to(like.device)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int().to(like.device)
    hidden = torch.randn(patches, like.numel(), generator=generator).to(like)
    embeddings = {"position_embeddings": (angles.cos(), angles.sin())}
    return {"hidden_states": hidden, "cu_seqlens": boundaries, "max_seqlen": max(lengths)} | embeddings


def outputs_and_gradients(block: Qwen3VLMoeVisionBlock, given: dict) -> dict[str, torch.Tensor]:
    hidden = given["hidden_states"].clone().requires_grad_()
    block.zero_grad()
    out = block(**given | {"hidden_states": hidden})
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * seed).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": hidden.grad} | gradients


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {name: float((found[name].double() - w).norm() / w.norm()) for name, w in wanted.items() if w.norm() > 0}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused functions on a CPU, over the references of the kernels."""
    monkeypatch.setattr(fused_block, "use_triton", lambda tensor: not torch.compiler.is_compiling())


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4's place taken by the definition."""

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> tuple:
        return reference.eager_segments(query, key, value, **options), query.new_zeros(1)

    def backward(*tensors: torch.Tensor, into: tuple[torch.Tensor, ...], **options) -> None:
        *tensors, _ = tensors
        for target, gradient in zip(into, reference.segments_backward(*tensors, **options), strict=True):
            target.copy_(gradient)

    monkeypatch.setattr(flash_attention_4, "forward", forward)
    monkeypatch.setattr(flash_attention_4, "backward", backward)
    monkeypatch.setattr(Qwen3VLMoeVisionAttention, "runs_flash_attention_4", lambda self, hidden: True)


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Counts calls of a function of the fused block, as the model's file sees it."""
    from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe as model_file

    counted: list[int] = []
    real = getattr(model_file, name)
    monkeypatch.setattr(model_file, name, lambda *args, **kwargs: (counted.append(1), real(*args, **kwargs))[1])
    return counted


def check_block(device: str, dtype: torch.dtype, factor: float, **sizes: int) -> None:
    """Fused and modules in `dtype` against the modules in float64 (on the CPU): at most `factor` times the error."""
    block = make_block(**sizes)
    exact_block = make_block(**sizes)
    exact_block.load_state_dict(block.to(dtype).state_dict())
    exact_block.double()
    given = inputs(block)
    exact = given | {"hidden_states": given["hidden_states"].double()}
    block.to(device)
    given = inputs(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_block, "use_triton", lambda tensor: False)
        wanted = outputs_and_gradients(exact_block, exact)
        plain = outputs_and_gradients(block, given)
        patch.setattr(fused_block, "use_triton", lambda tensor: True)
        found = outputs_and_gradients(block, given)
        again = outputs_and_gradients(block, given)
    for name in found:
        assert torch.equal(found[name], again[name]), f"{name} differs between two runs"
    ours, modules = (errors({k: v.cpu() for k, v in each.items()}, wanted) for each in (found, plain))
    floor = torch.finfo(dtype).eps
    for name, error in ours.items():
        assert error <= max(factor * modules[name], floor), f"{name}: {error}, the modules {modules[name]}"


def test_equals_the_modules(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = calls(monkeypatch, "project_and_mlp")
    check_block("cpu", torch.float32, 1.5)
    assert len(counted) == 2


@pytest.mark.parametrize("keep", [False, True])
def test_equals_the_modules_around_flash_attention(
    keep: bool, fused: None, flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = calls(monkeypatch, "norm_attention")
    check_block("cpu", torch.float32, 1.5, keep_qkv=keep)
    assert len(counted) == 2


def test_negative_control(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm recomputed with another epsilon in backward is noticed."""
    real = fused_block.layer_norm
    monkeypatch.setattr(fused_block, "layer_norm", lambda x, weight, bias, eps: real(x, weight, bias, 0.3))
    with pytest.raises(AssertionError, match="the modules"):
        check_block("cpu", torch.float32, 1.5)


def test_keeps_a_fifth(fused: None, flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 P x H values and statistics of a row or a head, 6 with the projection kept, where the modules keep 15."""
    block = make_block(hidden=64, heads=4, intermediate=240)
    given = inputs(block)

    def kept(block: Qwen3VLMoeVisionBlock) -> float:
        storages = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = block(**given | {"hidden_states": given["hidden_states"].clone().requires_grad_()})
        del out
        tables = {table.untyped_storage().data_ptr() for table in given["position_embeddings"]}
        return (
            sum(size for at, size in storages.items() if at not in parameters | tables) / given["hidden_states"].nbytes
        )

    assert 3 <= kept(block) < 3.2
    assert 6 <= kept(make_block(hidden=64, heads=4, intermediate=240, keep_qkv=True)) < 6.2
    monkeypatch.setattr(fused_block, "use_triton", lambda tensor: False)
    assert kept(block) > 14


@pytest.mark.parametrize(("reason", "aligned", "asked"), [(None, True, 1), (None, False, 0), ("no Hopper", True, 0)])
def test_quack_is_asked_where_it_runs(
    reason: str | None, aligned: bool, asked: int, fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its place in the block's gradients is that of the two steps it replaces."""
    real, counted = pointwise.gelu_backward_reference_, []

    def stand_in(d_out: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counted.append(weight.shape)
        d_pre = d_out @ weight
        return d_pre, real(pre, d_pre)

    block = make_block()
    if not aligned:
        room = torch.empty(48 * 80 + 1)
        block.mlp.linear_fc2.weight.data = room[1:].view(48, 80).copy_(block.mlp.linear_fc2.weight.data)
    given = inputs(block)
    wanted = outputs_and_gradients(block, given)
    module = SimpleNamespace(gelu_product_backward_=stand_in)
    monkeypatch.setitem(sys.modules, "modeling.ops.vision_block.quack", module)
    monkeypatch.setattr(vision_block, "quack", module, raising=False)
    monkeypatch.setattr(pointwise, "why_not_quack", lambda *what: reason)
    kernels = SimpleNamespace(
        **{name: getattr(pointwise, name.rstrip("_") + "_reference" + "_" * name.endswith("_"))
           for name in ("layer_norm", "layer_norm_backward", "gelu_backward_", "rotate_joint_backward_")}
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "modeling.ops.vision_block.triton", kernels)
    monkeypatch.setattr(vision_block, "triton", kernels, raising=False)
    monkeypatch.setattr(pointwise, "use_triton", lambda tensor: tensor.shape[-1] == 80)
    found = outputs_and_gradients(block, given)
    assert counted == [(48, 80)] * asked
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name])


def test_frozen_parts(fused: None) -> None:
    block = make_block()
    given = inputs(block)
    whole = outputs_and_gradients(block, given)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("mlp" in name)
    part = outputs_and_gradients(block, given)
    assert {name for name in part if name not in ("out", "x")} == {n for n, _ in block.named_parameters() if "mlp" in n}
    for name, value in part.items():
        assert torch.equal(value, whole[name])


def test_steps_aside(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook, a replaced layer or forward, another dtype, autocast, another activation: the modules run themselves."""
    counted = calls(monkeypatch, "norm_rotated_qkv")
    block = make_block()
    given = inputs(block)
    seen = []
    handle = block.mlp.linear_fc1.register_forward_hook(lambda *_: seen.append(1))
    block(**given)
    handle.remove()
    assert len(seen) == 1 and not counted

    class Wrapped(nn.Linear):
        pass

    for change in (
        lambda b: setattr(b.attn, "proj", Wrapped(48, 48)),
        lambda b: setattr(b.mlp.linear_fc2, "forward", b.mlp.linear_fc2.forward),
    ):
        other = make_block()
        change(other)
        other(**given)
        assert not counted
    make_block(hidden_act="gelu")(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(**given)
    assert not counted
    block(**given)
    assert len(counted) == 1


def check_kernels(device: str, dtype: torch.dtype, bound: float) -> None:
    """Each kernel against its reference on the same values in float32, by relative norm."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def close(found: tuple, wanted: tuple) -> None:
        for one, other in zip(found, wanted, strict=True):
            other = other.float()
            assert (one.float() - other).norm() <= bound * other.norm()

    for P, H in ((5, 48), (70, 144), (301, 1152)):
        x, branch, d_h, d_total = (draw(P, H) for _ in range(4))
        weight, bias, branch_bias, tail = (draw(H) for _ in range(4))
        args = (x, weight, bias, 1e-6)
        close(pointwise.layer_norm(*args), pointwise.layer_norm_reference(*args))
        args = (x, branch, branch_bias, tail, weight, bias, 1e-6)
        found = pointwise.add_layer_norm(*args)
        close(found, pointwise.add_layer_norm_reference(*args))
        args = (d_h, found[0], *found[-2:], weight, d_total)
        close(
            pointwise.layer_norm_backward(*args),
            pointwise.layer_norm_backward_reference(*args),
        )
        pre, d_act = draw(P, H), draw(P, H)
        wanted_act, wanted_d = pre.clone().float(), d_act.clone().float()
        wanted = pointwise.gelu_backward_reference_(wanted_act, wanted_d)
        total = pointwise.gelu_backward_(pre, d_act)
        close((total, pre, d_act), (wanted, wanted_act, wanted_d))
        pre, d_out, weight = draw(P, 2 * H), draw(P, H), draw(H, 2 * H)
        exact = pre.clone().float()
        d_pre = d_out.float() @ weight.float()
        wanted = pointwise.gelu_backward_reference_(exact, d_pre)
        close((*pointwise.gelu_product_backward_(d_out, weight, pre), pre), (d_pre, wanted, exact))
    for P, N, D in ((5, 3, 8), (130, 2, 72), (70, 16, 72)):
        angles = torch.rand(P, D // 2, generator=generator).mul(6).repeat(1, 2).to(device)
        tables = (angles.cos(), angles.sin())
        joint = draw(P, 3, N, D)
        wanted = pointwise.rotate_joint_reference_(joint.clone().float(), *tables)
        close((pointwise.rotate_joint_(joint.clone(), *tables),), (wanted,))
        exact, given = joint.clone().float(), joint.clone()
        wanted = pointwise.rotate_joint_backward_reference_(exact, *tables)
        close((pointwise.rotate_joint_backward_(given, *tables), given), (wanted, exact))


@pytest.mark.skipif(HAS_GPU, reason="the kernels run on the GPU itself")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch; from modeling.ops.vision_block import pointwise; "
        "from tests.unit import test_vision_block as tests; "
        "pointwise.use_triton = lambda x: True; tests.check_kernels('cpu', torch.float32, 2e-6)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_kernels_on_the_gpu(dtype: torch.dtype, bound: float) -> None:
    """bf16 results are rounded once or twice: a relative 2^-8 each."""
    check_kernels("cuda", dtype, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "sizes",
    [{}, {"hidden": 1152, "heads": 16, "intermediate": 4304}, {"hidden": 288, "heads": 4, "keep_qkv": True}],
    ids=["toy", "published", "kept"],
)
def test_block_on_the_gpu(sizes: dict[str, int]) -> None:
    """bf16: no further from float64 than the modules in bf16, which round more often."""
    check_block("cuda", torch.bfloat16, 1.1, **sizes)
