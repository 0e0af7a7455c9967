"""What the format can say and what it cannot, and what a folder must hold: each mistake is told, with its place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacks import Trap, files_of_at_most
from released import CASES, saved
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import Tensor

from tangram.core import load_preset
from tangram.core.cli import main
from tangram.core.deepseek_config import read_config, read_tile, write_config
from tangram.core.deepseek_format import FormatError, pieces, shape_of
from tangram.core.interchange import export
from tangram.core.presets import dump

NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def config_of(*overrides: str) -> dict[str, object]:
    shape = shape_of(dump(tiny(*overrides)))
    return write_config(shape, dtype="float32", fp8=False, tokens=NO_TOKENS)


def test_the_config_of_the_paper_is_the_released_one():
    """The figures of the release's config.json, and its counts of weights by dtype."""
    yarn = "model.block.attention.yarn={factor: 40.0, original_length: 4096}"
    shape = shape_of(dump(load_preset("deepseek-v3", yarn)))
    config = write_config(shape, dtype="bfloat16", fp8=True, tokens={"bos_token_id": 0, "eos_token_id": 1})
    released = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    assert {key: config[key] for key in released} == released
    rope = {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip
    assert {key: config["rope_scaling"][key] for key in rope} == rope
    found = pieces(shape)
    numbers = {piece.name: torch.Size(piece.shape).numel() for piece in found}
    assert len(numbers) == len(found)
    assert sum(n for name, n in numbers.items() if ".layers.61." not in name) == 671_026_419_200
    assert sum(numbers.values()) == 684_489_845_504
    assert sum(numbers[piece.name] for piece in found if piece.quantised) == 680_571_043_840
    blocks = sum(-(-piece.shape[0] // 128) * -(-piece.shape[1] // 128) for piece in found if piece.quantised)
    assert blocks == 41_540_496


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_shape_comes_back_from_the_config_in_old_and_in_new_keys(overrides):
    shape = shape_of(dump(tiny(*overrides)))
    config = config_of(*overrides)
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    for keys in (config, old, new, {"head_dim": 4, **new}):
        again = read_config(json.loads(json.dumps(keys)), shape.depth)
        assert write_config(again, dtype="float32", fp8=False, tokens=NO_TOKENS) == config


CANNOT = {
    "model.block.attention": "model.block.attention={use: gqa, n_heads: 4, head_dim: 8}",
    "model.blocks.0.attention": "model.blocks.0.attention.kv_rank=4",
    "model.blocks.1.attention": "model.blocks.1.attention.n_heads=1",
    "model.block.feedforward": "model.block.feedforward={use: swiglu, hidden: 8}",
    "model.blocks.2.feedforward": "model.blocks=[{repeat: 1}, {repeat: 1}, {feedforward: {hidden: 9}, repeat: 1}]",
    "model.blocks.1.feedforward": "model.blocks=[{repeat: 1}, {feedforward: {use: swiglu, hidden: 9}, repeat: 1}]",
    "no block has experts": "model.blocks=[{feedforward: {use: swiglu, hidden: 9}, repeat: 1}]",
    "differ in width": "model.blocks=[{feedforward: {use: swiglu, hidden: 9}, repeat: 1}, "
    "{feedforward: {use: swiglu, hidden: 8}, repeat: 1}, {repeat: 1}]",
    "model.block.feedforward.router.score": "model.block.feedforward.router.score=softmax",
    "model.block.feedforward.router.n_groups": "model.block.feedforward.router={n_groups: 8, top_groups: 4}",
    "model.block.feedforward.n_shared": "model.block.feedforward.n_shared=0",
    "model.norm_eps": "model.norm_eps=1.0e-5",
    "model.block.attention.yarn.mscale": "model.block.attention.yarn={factor: 4.0, original_length: 8, mscale: 0.0}",
    "objectives: there is room for one mtp": "objectives.far={use: mtp, depth: 1}",
}


@pytest.mark.parametrize("where", CANNOT)
def test_what_the_format_cannot_say_is_refused_with_its_key(where):
    with pytest.raises(FormatError, match="DeepSeek-V3's format cannot say that") as refused:
        shape_of(dump(tiny(CANNOT[where])))
    assert where in str(refused.value)


WRONG = [
    ({"model_type": "deepseek_v2"}, "model_type: 'deepseek_v2' is not 'deepseek_v3'"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"hidden_size": None}, "hidden_size: None is not an integer"),
    ({"hidden_size": True}, "hidden_size: True is not an integer"),
    ({"routed_scaling_factor": "2"}, "routed_scaling_factor: '2' is not a number"),
    ({"norm_topk_prob": 1}, "norm_topk_prob: 1 is not true or false"),
    ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ({"first_k_dense_replace": 3}, "first_k_dense_replace"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: 2, but the weights hold 1"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
WRONG += [
    ({"rope_scaling": YARN | {"mscale": 0.5}}, "rope_scaling.mscale"),
    ({"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}}, "rope_scaling.mscale"),
    ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "rope_scaling.mscale"),
    ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 12}}, "max_position_embeddings"),
    ({"rope_scaling": {"type": "yarn"}}, "factor: missing"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_config_that_says_something_else_is_refused_with_its_key(changes, message):
    config = config_of()
    assert read_config(config | {"rope_scaling": YARN, "max_position_embeddings": 9}, 1).attention["yarn"]
    with pytest.raises(FormatError, match=f"^{message}"):
        read_config(config | changes, 1)


@pytest.mark.parametrize("key", ["hidden_size", "model_type", "num_hidden_layers", "n_routed_experts", "vocab_size"])
def test_a_key_that_is_missing_is_named(key):
    config = config_of()
    del config[key]
    with pytest.raises(FormatError, match=f"^{key}: missing"):
        read_config(config, 1)


@pytest.mark.parametrize("wrong", [{"quant_method": "gptq"}, {"quant_method": "fp8"}, [], 8])
def test_another_quantization_is_refused(wrong):
    with pytest.raises(FormatError, match="quantization_config"):
        read_tile({"quantization_config": wrong})


# --- folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    saved(folder / "run")
    export(folder / "run", folder / "whole")
    export(folder / "run", folder / "shards", shard_bytes=20_000)
    export(folder / "run", folder / "fp8", fp8=True)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that a user got wrong: exit code 2, no traceback, and its message."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert exited.value.code == 2, err
        assert "Traceback" not in out + err
        return err

    return run


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


GATE, EXPERT = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.7.up_proj.weight"
HEAD = "model.layers.3.shared_head.head.weight"


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def with_(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


CODES = torch.zeros(8, 16).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("kind", "edit", "words"), [
    ("whole", without(EXPERT), [EXPERT, "[8, 16]", "is missing"]),
    ("whole", without("model.norm.weight"), ["model.norm.weight", "is missing"]),
    ("whole", with_("model.layers.1.extra", torch.ones(1)), ["model.safetensors: model.layers.1.extra has no place"]),
    ("whole", with_(GATE + "_scale_inv", torch.ones(1, 1)), [GATE + "_scale_inv has no place"]),
    ("whole", with_("model.layers.4.enorm.weight", torch.ones(16)), ["num_nextn_predict_layers", "hold 2"]),
    ("whole", with_(GATE, torch.ones(8, 15)), [f"model.safetensors: {GATE} is [8, 15], config.json says [8, 16]"]),
    ("whole", with_(GATE, torch.ones(8, 16).int()), ["model.safetensors", GATE, "I32"]),
    ("whole", with_(HEAD, torch.ones(48, 16)), [f"{HEAD} is not lm_head.weight"]),
    ("whole", with_(EXPERT, CODES), [EXPERT, "config.json has no quantization_config"]),
    ("fp8", without(EXPERT + "_scale_inv"), [EXPERT + "_scale_inv are missing"]),
    ("fp8", with_(EXPERT + "_scale_inv", torch.ones(2, 1)), ["_scale_inv are [2, 1], and should be [1, 1]"]),
    ("fp8", with_("model.norm.weight", CODES[0]), ["model.norm.weight", "it is no matrix"]),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named_with_their_file(kind, edit, words, original, tmp_path, refused):
    folder = copied(original / kind, tmp_path / "there")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    message = refused("import", folder, "--out", tmp_path / "run")
    for word in [str(folder), *words]:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_broken_files_are_named(original, tmp_path, refused):
    shards = copied(original / "shards", tmp_path / "shards")
    second = sorted(shards.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[:-5])
    assert f"{second}: no whole safetensors file" in refused("import", shards, "--out", tmp_path / "run")
    second.unlink()
    assert f"{second} is missing: 1 of the " in refused("import", shards, "--out", tmp_path / "run")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "index.json has no weight_map" in refused("import", shards, "--out", tmp_path / "run")
    whole = copied(original / "whole", tmp_path / "whole")
    for text, why in (("{", "is no JSON"), ("[]", "holds no map"), ("{}", "model_type: missing")):
        (whole / "config.json").write_text(text)
        message = refused("import", whole, "--out", tmp_path / "run")
        assert f"{whole / 'config.json'}" in message
        assert why in message
    assert not (tmp_path / "run").exists()


def test_what_is_no_model_is_told_apart(original, tmp_path, refused):
    assert "nowhere is no folder" in refused("import", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert "is a run already; `tangram export" in refused("import", original / "run", "--out", tmp_path / "run")
    folder = copied(original / "whole", tmp_path / "there")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused("import", folder, "--out", tmp_path / "run")
    assert "there has no model.safetensors and no model.safetensors.index.json; pytorch_model.bin may" in message
    (folder / "config.json").unlink()
    assert "there has no config.json" in refused("import", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pickle_in_the_place_of_any_file_is_refused_and_executes_nothing(original, tmp_path, refused):
    for name in ("config.json", "model.safetensors"):
        folder = copied(original / "whole", tmp_path / name)
        torch.save({"weights": Trap(tmp_path / "sprung")}, folder / name)
        assert name in refused("import", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "config.json/config.json", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap is one


@pytest.mark.parametrize("room", [0, 4000, 30_000])
def test_a_full_disk_is_a_failure_that_leaves_nothing(room, original, tmp_path, capsys):
    out = tmp_path / "x"
    for command in (["export", original / "run", out], ["import", original / "whole", "--out", out]):
        with files_of_at_most(room), pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in command])
        assert exited.value.code == 1
        err = capsys.readouterr().err
        assert f"{out} could not be written: " in err
        assert "nothing of it is left" in err
        assert "--resume" not in err  # that is said of a run's checkpoints
        assert "Traceback" not in err
        assert not out.exists()


def test_folders_that_hold_something_are_left_alone(original, tmp_path, refused):
    (tmp_path / "mine.txt").write_text("mine")
    for command, source in (("import", original / "whole"), ("export", original / "run")):
        arguments = ["--out", tmp_path] if command == "import" else [tmp_path]
        assert "not an empty folder" in refused(command, source, *arguments)
        arguments = ["--out", tmp_path / "mine.txt"] if command == "import" else [tmp_path / "mine.txt"]
        assert "not an empty folder" in refused(command, source, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_cannot_be_exported_says_why(original, tmp_path, refused):
    assert "is no run directory" in refused("export", tmp_path / "nowhere", tmp_path / "x")
    assert "--shard-size 5 is no size" in refused("export", original / "run", tmp_path / "x", "--shard-size", "5")
    saved(tmp_path / "gqa", "model.block.attention={use: gqa, n_heads: 4, head_dim: 8}", "objectives.mtp=null")
    assert "model.block.attention: gqa is not mla" in refused("export", tmp_path / "gqa", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/experiment.yaml").write_text((original / "run/experiment.yaml").read_text())
    assert "has no checkpoint yet" in refused("export", tmp_path / "empty", tmp_path / "x")
    saved(tmp_path / "other")
    text = (original / "run/experiment.yaml").read_text()
    (tmp_path / "other/experiment.yaml").write_text(text.replace("vocab_size: 48", "vocab_size: 49"))
    message = refused("export", tmp_path / "other", tmp_path / "x")
    assert "embedding.weight has 768 numbers here, 784 in DeepSeek-V3's format" in message
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_is_none_of_deepseek_v3_is_refused_and_nothing_is_left(original, tmp_path, refused):
    folder = copied(original / "whole", tmp_path / "there")
    (folder / "tokenizer.json").write_text("{}")
    message = refused("import", folder, "--out", tmp_path / "run")
    assert "tokenizer.json: the tokenizers library cannot read it" in message
    assert not (tmp_path / "run").exists()


def test_an_import_takes_changes_but_none_to_the_model(original, tmp_path, refused):
    message = refused("import", original / "whole", "model.dim=32", "--out", tmp_path / "run")
    assert "the changes reach into the model" in message
    message = refused("import", original / "whole", "train.lrr=1", "--out", tmp_path / "run")
    assert "did you mean 'lr'?" in message
    assert not (tmp_path / "run").exists()
