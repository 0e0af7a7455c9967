"""Our models and transformers' DeepSeek-V3, an independent implementation, through files: the same functions.

Where transformers deviates from the paper or from DeepSeek's code, this is what holds here: the router computes in
float32; the norms of latents have eps 1e-6 whatever `rms_norm_eps` says, so that no other is exported; groups that are
dropped are masked with -inf; YaRN holds at every length; MTP reads the trunk after its final norm, and its projection
has the embedding's columns first, where the paper prints those of the hidden state first.
"""

from pathlib import Path

import pytest
import torch
from peer import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, MtpModel
from released import CASES, NEGATIVE, fused, saved
from torch import Tensor
from torch.nn.functional import cross_entropy

from tangram.core import load_run
from tangram.core.decoding import generate
from tangram.core.interchange import export, import_model
from tangram.core.model import Model

LOGITS = 2e-5
"""Largest difference: two orders of the same sums in float32, of logits below 10."""

GRADIENTS = 2e-5
"""Relative to the norm of a tensor's gradient."""


def tokens(length: int = 20, rows: int = 2) -> Tensor:
    return torch.randint(48, (rows, length), generator=torch.Generator().manual_seed(4))


def theirs(folder: Path, depth: int) -> DeepseekV3ForCausalLM:
    """Load a folder, and see that nothing is missing and that only MTP's layers are left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    first = model.config.num_hidden_layers
    layers = {int(name.split(".")[2]) for name in info["unexpected_keys"]}
    assert layers == set(range(first, first + depth))
    return model


def gradients(logits: Tensor, wrt: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), reduction="sum")
    found = torch.autograd.grad(loss, list(wrt.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wrt, found, strict=True) if grad is not None}


def assert_same(ours: Model, other: DeepseekV3ForCausalLM) -> None:
    logits, their_logits = ours.logits(tokens()), other(tokens()).logits
    assert logits.abs().max() > 1
    assert (logits - their_logits).abs().max() < LOGITS
    mine = fused(gradients(logits, dict(ours.named_parameters())))
    their = gradients(their_logits, dict(other.named_parameters()))
    assert mine.keys() == their.keys()
    for name, grad in mine.items():
        # An expert at a time, so that a busy one does not hide another; one without tokens has no gradient in either.
        for one, two in zip(grad, their[name], strict=True) if grad.ndim == 3 else [(grad, their[name])]:
            assert (one - two).norm() <= GRADIENTS * two.norm(), name
    prompt = tokens()[:1, :6]
    continued = other.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 6:]
    assert torch.equal(generate(ours, prompt, 12), continued)


@pytest.mark.parametrize("bias", [0.0, NEGATIVE])
@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_same_function_in_transformers(case, bias, tmp_path):
    experiment, ours = saved(tmp_path / "run", *CASES[case], bias=bias)
    export(tmp_path / "run", tmp_path / "there")
    depth = experiment.objectives["mtp"].depth
    other = theirs(tmp_path / "there", depth)
    assert_same(ours, other)
    assert_same_mtp(ours, other, tmp_path / "there")


def assert_same_mtp(ours: Model, other: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Compare every MTP module, fed as `post_norm` feeds it, and speculative decoding with it."""
    first, depths = other.config.num_hidden_layers, ours.objectives["mtp"].depths
    # transformers knows MTP's layers by this list alone, and has 61 written into it.
    layers = [rf"model\.layers\.{first + k}\." for k in range(len(depths))]
    other._keys_to_ignore_on_load_unexpected = layers
    mtp = MtpModel.from_pretrained(other, device_map={"": "cpu"})
    with torch.no_grad():
        hidden = other(tokens(), output_hidden_states=True).hidden_states[-1]
        places = torch.arange(20).expand(2, -1)
        here = hidden
        for k, depth in enumerate(depths):
            following = tokens().roll(-k - 1, 1)
            segments = torch.zeros_like(places)
            out, _ = depth.block(depth.join(here, ours.embedding(following)), places, segments)
            here = depth.norm(out)
            hidden = mtp.forward_layer(k, hidden, places, None, input_ids=following)
            assert (here - hidden).abs().max() < LOGITS
    prompt = tokens()[:1, :6]
    plain = other.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    drafted = other.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, use_mtp=True)
    assert torch.equal(plain, drafted)


PEER = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
    "topk_group": 2, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "first_k_dense_replace": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def random_peer(bias: float, **changes: object) -> DeepseekV3ForCausalLM:
    """Return a model of transformers with weights, norms and biases, around `bias`, that are all different."""
    config = DeepseekV3Config(**{**PEER, **changes})
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
            elif name.endswith("bias"):
                tensor.copy_(bias + 0.2 * torch.randn(tensor.shape))
    return model.eval()


YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("bias", [0.0, NEGATIVE])
@pytest.mark.parametrize(
    ("changes", "dtype", "shard"),
    [
        ({}, torch.float32, "1GB"),
        ({"rope_parameters": YARN}, torch.float32, "20KB"),
        ({"rope_parameters": YARN, "q_lora_rank": None}, torch.float32, "1GB"),
        ({"q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False}, torch.bfloat16, "1GB"),
        ({"first_k_dense_replace": 0, "routed_scaling_factor": 1.0}, torch.float16, "20KB"),
    ],
)
def test_what_transformers_wrote_is_imported_exactly(changes, dtype, shard, bias, tmp_path):
    """`save_pretrained` leaves the one MTP layer in the config that it does not write: we import none."""
    random_peer(bias, **changes).to(dtype).save_pretrained(tmp_path / "there", max_shard_size=shard)
    assert (len(list((tmp_path / "there").glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert import_model(tmp_path / "there", tmp_path / "run").depth == 0
    ours = load_run(tmp_path / "run").model
    other = theirs(tmp_path / "there", 0)
    mine, state = fused(ours.state_dict()), other.state_dict()
    assert mine.keys() == state.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, state[name]), name
    assert_same(ours, other)


def test_the_checks_see_what_they_are_for(tmp_path):
    """A model whose norm before the head is 1e-4 off is not the same function."""
    _, ours = saved(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "there")
    other = theirs(tmp_path / "there", 1)
    with torch.no_grad():
        ours.norm.weight.mul_(1 + 1e-4)
    with pytest.raises(AssertionError):
        assert_same(ours, other)
