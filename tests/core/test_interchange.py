"""What goes out comes back: weights, shards, FP8, the tokenizer, and a run that goes on; in bounded memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released import CASES, saved
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import Tensor

from tangram.core import load_run, weight_folder
from tangram.core.cli import main
from tangram.core.interchange import export, import_model
from tangram.core.run import train


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return what the safetensors library reads from a folder, through its index if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    return {name: load_file(folder / file)[name] for name, file in json.loads(index.read_text())["weight_map"].items()}


def state(run: Path) -> dict[str, Tensor]:
    return load_file(next((run / "checkpoints").glob("step-*")) / "model.safetensors")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(params=["whole", "a few rows at a time"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "whole":
        monkeypatch.setattr(weight_folder, "_HELD", 1)


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("case", [case for case in CASES if "no biases" not in case])
def test_an_export_is_imported_bit_for_bit(case, shard_bytes, tmp_path):
    saved(tmp_path / "run", *CASES[case])
    export(tmp_path / "run", tmp_path / "there", shard_bytes=shard_bytes)
    import_model(tmp_path / "there", tmp_path / "back")
    assert_equal(state(tmp_path / "back"), state(tmp_path / "run"))
    export(tmp_path / "back", tmp_path / "again", shard_bytes=shard_bytes)
    assert_equal(tensors(tmp_path / "again"), tensors(tmp_path / "there"))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "there" / "config.json").read_text()
    )


def test_a_model_without_biases_is_exported_with_biases_of_zero(tmp_path):
    saved(tmp_path / "run", *CASES["top_k, no biases, none dense"])
    export(tmp_path / "run", tmp_path / "there")
    import_model(tmp_path / "there", tmp_path / "back")
    back = state(tmp_path / "back")
    biases = {address: back.pop(address) for address in list(back) if address.endswith("balancer.biases")}
    assert len(biases) == 3
    assert not any(bias.any() for bias in biases.values())
    assert_equal(back, state(tmp_path / "run"))


def test_shards_are_as_small_as_asked_and_the_index_knows_them(tmp_path):
    saved(tmp_path / "run")
    written = export(tmp_path / "run", tmp_path / "there", shard_bytes=5000)
    index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "there").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert written.files == len(files) > 3
    total = 0
    for file in files:
        held = load_file(file)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 5000
        assert {name for name, place in index["weight_map"].items() if place == file.name} == held.keys()
        total += size
    assert index["metadata"]["total_size"] == total
    export(tmp_path / "run", tmp_path / "one", shard_bytes=total)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert_equal(tensors(tmp_path / "one"), tensors(tmp_path / "there"))
    assert written.parameters * 4 == total


def test_mtp_has_copies_of_embedding_and_head_and_biases_are_float32(tmp_path):
    saved(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "there")
    found = tensors(tmp_path / "there")
    assert torch.equal(found["model.layers.3.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["model.layers.3.shared_head.head.weight"], found["lm_head.weight"])
    biases = [name for name in found if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert all(found[name].dtype == torch.float32 and found[name].any() for name in biases)


# --- FP8 --------------------------------------------------------------------------------------------------


def linear(name: str) -> bool:
    """Return whether the released checkpoint has this tensor in FP8."""
    return (name.endswith("_proj.weight") and "eh_proj" not in name) or "kv_a_proj_with_mqa" in name


@pytest.mark.usefixtures("held")
def test_fp8_is_for_the_linears_of_the_release_and_within_its_rounding(tmp_path):
    saved(tmp_path / "run", "model.blocks.0.feedforward.hidden=300")
    export(tmp_path / "run", tmp_path / "full")
    export(tmp_path / "run", tmp_path / "fp8", fp8=True)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    full, codes = tensors(tmp_path / "full"), tensors(tmp_path / "fp8")
    scales = {name.removesuffix("_scale_inv"): codes.pop(name) for name in list(codes) if name.endswith("_scale_inv")}
    assert scales.keys() == {name for name in full if linear(name)}
    assert codes.keys() == full.keys()
    assert scales["model.layers.0.mlp.gate_proj.weight"].shape == (3, 1)
    for name in full:
        assert codes[name].dtype == (torch.float8_e4m3fn if linear(name) else torch.float32)
    import_model(tmp_path / "fp8", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again")
    for name, weight in tensors(tmp_path / "again").items():
        if not linear(name):
            assert torch.equal(weight, full[name])
            continue
        for first in range(0, len(weight), 128):
            one, two = weight[first : first + 128], full[name][first : first + 128]  # no matrix is wider than 128
            scale = float(two.abs().max()) / 448
            # Half a unit of E4M3's three bits, or of its subnormal step 2^-9, and two float32 roundings.
            bound = (2**-4 * two.abs()).clamp_min(2**-10 * scale) * (1 + 2**-22)
            assert ((one - two).abs() <= bound).all(), name
            assert not torch.equal(one, two)


@pytest.mark.usefixtures("held")
def test_fp8_of_another_writer_is_read(tmp_path):
    """Blocks of 8 x 6, which divide hardly any of the shapes; bfloat16 for the rest; no MTP; plain loops."""
    saved(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "there")
    g = torch.Generator().manual_seed(0)
    wanted, written = {}, {}
    for name, tensor in tensors(tmp_path / "there").items():
        if ".layers.3." in name:
            continue
        if not linear(name):
            written[name] = tensor if name.endswith("bias") else tensor.bfloat16()
            wanted[name] = written[name].float()
            continue
        rows, columns = tensor.shape
        codes = tensor.to(torch.float8_e4m3fn)
        scales = 0.5 + torch.rand(math.ceil(rows / 8), math.ceil(columns / 6), generator=g)
        wanted[name] = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                wanted[name][i, j] = float(codes[i, j]) * float(scales[i // 8, j // 6])
        written[name], written[name + "_scale_inv"] = codes, scales
    written["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    change(tmp_path / "there", written, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 6]})
    assert import_model(tmp_path / "there", tmp_path / "back").depth == 0
    export(tmp_path / "back", tmp_path / "again")
    assert_equal(tensors(tmp_path / "again"), wanted)


def change(folder: Path, content: dict[str, Tensor] | None = None, **config: object) -> None:
    """Write other tensors or another config into an exported folder."""
    if content is not None:
        save_file(content, folder / "model.safetensors")
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))


# --- runs and their tokenizer -----------------------------------------------------------------------------

TEXTS = ("  def f(x):\n        return  x\n", "tabs\t\t and   runs     of spaces ", "é漢字🙂 ＜12345＞", "<think>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, exported."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} says {'this and that ' * (1 + i % 5)}\n" * 2)
    text = f"data={{use: text, corpus: files, files: ['{folder}/*.txt'], held_out_every: 4}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(tiny(text, "train.tokens=96", "model.vocab_size=300"), folder / "run")
        export(folder / "run", folder / "there")
        yield folder


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(exited.value.code or 0), out, err


def test_the_tokenizer_is_the_same_in_transformers(trained):
    from peer import AutoTokenizer

    ours, theirs = load_run(trained / "run").data.tokenizer, AutoTokenizer.from_pretrained(trained / "there")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.bos, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert "token_type_ids" not in theirs("a") or not any(theirs("a")["token_type_ids"])


def test_the_chat_template_renders_a_conversation_as_deepseek_v3_does(trained):
    from peer import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained / "there")
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    text = f"{begin}Be brief.<｜User｜>Hi<｜Assistant｜>Hello{end}<｜User｜>Bye"
    assert theirs.apply_chat_template(talk, tokenize=False) == text
    asked = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert asked == f"{text}<｜Assistant｜>"
    ids = theirs.apply_chat_template(talk, return_dict=False)
    assert [i for i in ids if i < 9] == [0, 6, 7, 1, 6]
    with pytest.raises(Exception, match="not of tool"):
        theirs.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_an_imported_run_is_evaluated_and_trained_further(trained, tmp_path, capsys):
    text = f"data={{corpus: files, files: ['{trained}/*.txt'], held_out_every: 4}}"
    changes = (text, "train={sequence_length: 12, batch_sequences: 4, tokens: 96}", "guard={use: rollback}")
    code, out, err = command(capsys, "import", trained / "there", *changes, "--out", tmp_path / "back")
    assert code == 0, err
    assert "with 1 further tokens predicted" in out
    before = json.loads(command(capsys, "evaluate", trained / "run", "--json")[1])
    after = json.loads(command(capsys, "evaluate", tmp_path / "back", "--json")[1])
    for key in ("eval.bits_per_byte", "eval.loss.next_token", "eval.loss.mtp"):
        assert after[key] == pytest.approx(before[key], rel=1e-6), (sorted(before), key)
    code, out, err = command(capsys, "train", tmp_path / "back/experiment.yaml", "--out", tmp_path / "back", "--resume")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "back/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss.next_token" in row] == [1, 2]
    assert {path.name for path in (tmp_path / "back/checkpoints").iterdir()} >= {"step-2"}


def test_the_command_writes_a_folder_and_says_so(trained, tmp_path, capsys):
    code, out, err = command(capsys, "export", trained / "run", tmp_path / "there", "--shard-size", "20KB", "--fp8")
    assert code == 0, err
    assert "step 2 of" in out
    assert "files\nwith its tokenizer" in out
    assert (tmp_path / "there" / "model.safetensors.index.json").exists()
    names = {path.name for path in (tmp_path / "there").iterdir()} - set(
        json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# --- memory -----------------------------------------------------------------------------------------------

WATCH = """
import re, sys
from pathlib import Path
import torch
from tangram.core.interchange import export, import_model
torch.set_num_threads(1)
def resident(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for folder in map(Path, sys.argv[1:]):  # the first is small, so that all that is ever imported is there
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident("VmRSS")
    {call}
print(resident("VmHWM") - before)
"""


def growth(call: str, *folders: Path) -> int:
    """Return how many bytes `call` on the last folder needs at its peak, after it has been made on the others."""
    command = [sys.executable, "-c", WATCH.format(call=call), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak of memory")
@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_memory_stays_below_twice_the_largest_shard(fp8, tmp_path):
    """More than 100 MB of weights in shards of 30, as FP8 more than 40 in shards of 20: holding all is found out."""
    big = (
        "model.dim=256",
        "model.vocab_size=16000",
        "model.block.feedforward={n_experts: 24, hidden: 512}",
        "model.blocks.1.repeat=2",
        "objectives.mtp=null",
    )
    shard_bytes = 20_000_000 if fp8 else 30_000_000
    small, large = tmp_path / "small", tmp_path / "large"
    saved(small / "run")
    saved(large / "run", *big)
    call = f'export(folder / "run", folder / "there", shard_bytes={shard_bytes}, fp8={fp8})'
    grown = growth(call, small, large)
    sizes = [file.stat().st_size for file in (large / "there").glob("*.safetensors")]
    assert sum(sizes) > (2.5 if fp8 else 3.5) * max(sizes)
    assert grown < 2 * max(sizes)
    grown = growth('import_model(folder / "there", folder / "back")', small, large)
    assert grown < 2 * max(sizes)
    if not fp8:
        assert_equal(state(large / "back"), state(large / "run"))
