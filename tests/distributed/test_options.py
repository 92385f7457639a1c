"""What may be switched on beside a mesh, against the same upstream numbers: recomputation, prefetch, resharding, mixed
precision, the load-balancing loss, the encoder balancer, frozen parts."""

import pytest
import torch
from torch import Tensor

from modeling.distributed.parallel_state import ParallelState
from modeling.distributed.parallelize import parallelize_model
from tests.distributed.oracle import reference
from tests.distributed.ranks import Mesh, Options, batch_of, build, gradients_of, state_of
from tests.distributed.test_matrix import check, gradient_errors

FOUR = [Mesh(4), Mesh(2, sp=2, ep=2), Mesh(1, sp=4, ep=4), Mesh(2, replicate=2, ep=2)]

FROZEN = {
    "vision": "visual",
    "language": "language_model,lm_head",
    "all but the mergers": "model,lm_head,!merger",
    "experts": "mlp.experts",
}


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("mesh", FOUR, ids=str)
def test_recompute(pools, mesh: Mesh, recompute: str):
    options = Options(parallelize={"recompute": recompute})
    check(pools(4).run(gradients_of, mesh, "mixed", options)[0], reference("mixed"))


@pytest.mark.parametrize(
    "arguments",
    [{"prefetch": 0}, {"prefetch": 3}, {"reshard_after_forward": False}, {"reshard_after_forward": 2}],
    ids=lambda arguments: "-".join(f"{key}={value}" for key, value in arguments.items()),
)
def test_gathering_policies(pools, arguments: dict):
    mesh = Mesh(4, ep=1 if arguments.get("reshard_after_forward") == 2 else 2)
    check(pools(4).run(gradients_of, mesh, "mixed", Options(parallelize=arguments))[0], reference("mixed"))


@pytest.mark.parametrize("kind", ["padded", "images on one rank"])
@pytest.mark.parametrize("mesh", FOUR, ids=str)
def test_load_balancing_loss(pools, mesh: Mesh, kind: str):
    """Counts and probabilities over the tokens of all ranks, without padding."""
    result = pools(4).run(gradients_of, mesh, kind, Options(balancing=True))[0]
    check(result, reference(kind, balancing=True))


@pytest.mark.parametrize("kind", ["text", "mixed", "images on one rank", "video"])
@pytest.mark.parametrize("mesh", FOUR, ids=str)
def test_encoder_balancer(pools, mesh: Mesh, kind: str):
    check(pools(4).run(gradients_of, mesh, kind, Options(encoder_balance=True))[0], reference(kind))


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("mesh", FOUR, ids=str)
def test_frozen_parts(pools, mesh: Mesh, frozen: str):
    kind = "images on one rank"
    result = pools(4).run(gradients_of, mesh, kind, Options(frozen=frozen))[0]
    expected = reference(kind, frozen=frozen)
    assert 0 < len(expected.gradients) < len(reference(kind).gradients)
    check(result, expected)


def test_frozen_vision_with_everything_on(pools):
    options = Options(frozen="visual", balancing=True, encoder_balance=True, parallelize={"recompute": "full"})
    mesh = Mesh(2, sp=2, ep=4)
    result = pools(4).run(gradients_of, mesh, "mixed", options)[0]
    check(result, reference("mixed", balancing=True, frozen="visual"))


def one_process_bf16(kind: str) -> dict:
    """The same samples packed in one process, weights and arithmetic in bf16."""
    model = build().to(torch.bfloat16)
    loss = model(**batch_of(kind, ParallelState())).loss
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return {"loss": loss.item(), "gradients": {name: g.float().numpy() for name, g in gradients.items()}}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("mesh", FOUR, ids=str)
def test_mixed_precision(pools, mesh: Mesh, recompute: str):
    """fp32 parameters gathered in bf16, gradients summed in fp32: no further from fp32 than one process in bf16 is."""
    arguments = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "recompute": recompute}
    result = pools(4).run(gradients_of, mesh, "mixed", Options(parallelize=arguments))[0]
    expected, single = reference("mixed"), one_process_bf16("mixed")
    assert result["loss"] == pytest.approx(expected.loss, rel=5e-3)

    def distance(gradients: dict) -> float:
        """Relative error of all gradients as one vector."""
        parts = [(torch.from_numpy(gradients[n]) - g).double().norm() for n, g in expected.gradients.items()]
        return torch.stack(parts).norm().item() / expected.norm

    # bf16 rounds at 2^-9; which way each sum falls differs with the mesh, by about as much as the error itself.
    assert 1e-4 < distance(result["gradients"]) <= 1.5 * distance(single["gradients"])
    assert max(gradient_errors(result, expected).values()) < 1.0


def wrong_sizes() -> list[tuple[Mesh, dict, str]]:
    return [
        (Mesh(1, sp=4), {"hidden_size": 58}, r"sp_size=4 does not divide hidden_size=58"),
        (Mesh(1, sp=4), {"num_attention_heads": 6}, r"sp_size=4 does not divide num_attention_heads=6"),
        (Mesh(1, sp=4), {"num_attention_heads": 12, "num_key_value_heads": 6}, r"sp_size=4 and num_key_value_heads=6"),
        (Mesh(4, ep=4), {"num_experts": 14}, r"ep_size=4 does not divide num_experts=14"),
        (Mesh(4, ep=2), {"moe_implementation": "eager"}, r"'eager' .* ep_size=2"),
        (Mesh(4, ep=1), {"recompute": "half"}, r"recompute='half' is unknown"),
    ]


def raise_on_wrong_sizes() -> None:
    for mesh, changes, words in wrong_sizes():
        arguments = {key: value for key, value in changes.items() if key == "recompute"}
        text = {key: value for key, value in changes.items() if key != "recompute"}
        with pytest.raises(ValueError, match=words):
            parallelize_model(build(**text), parallel_state=state_of(mesh), **arguments)


def test_sizes_that_do_not_divide(pools):
    pools(4).run(raise_on_wrong_sizes)


def test_mixed_precision_needs_ranks():
    with pytest.raises(ValueError, match=r"param_dtype=torch.bfloat16 needs FSDP"):
        parallelize_model(build(), param_dtype=torch.bfloat16)
