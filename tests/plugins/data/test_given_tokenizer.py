"""Text in the ids of a tokenizer that someone else made."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tangram.core.experiment import TrainConfig
from tangram.plugins.data.bpe import SPECIAL_TOKENS, ByteLevelBPE, read_tokenizer, train
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.shards import read
from tangram.plugins.data.text import TextConfig

DOCUMENT = ": <｜User｜>  né\n"
TRAIN = TrainConfig(tokens=100, sequence_length=8, batch_sequences=1, lr=1.0)


def foreign(*, extra: str = "<｜User｜>") -> Tokenizer:
    """Bytes alone, after the ends of a text and padding; other added tokens last, as in DeepSeek-V3's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL_TOKENS[:3], *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS[:3]))
    tokenizer.add_tokens([AddedToken(extra, special=False, normalized=False)])
    return tokenizer


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i:02}{DOCUMENT}")
    foreign().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def config(folder: Path, **changes: object) -> TextConfig:
    fields = {"corpus": "files", "files": (f"{folder}/*.txt",), "tokenizer": str(folder / "tokenizer.json")}
    return TextConfig(**(fields | {"held_out_every": 3} | changes))


def test_text_is_encoded_by_it_and_every_byte_counts_once(text):
    data = config(text).build(TRAIN, 400)
    assert data.tokenizer.encode("a<｜User｜>é")[1] == 3 + 256
    sizes = data.tokenizer.token_bytes()
    assert sizes[:3].tolist() == [0, 0, 0]
    assert sizes[3 + 256] == len("<｜User｜>".encode())
    assert data.held_out is not None
    held_out = sum(size for _, size in data.held_out.batches(4))
    assert held_out == data.held_out.n_bytes > 0
    assert held_out % (2 + len(DOCUMENT.encode())) == 0


def test_it_is_part_of_the_fingerprint(text):
    one = config(text).build(TRAIN, 400).fingerprint
    assert config(text).build(TRAIN, 300).fingerprint == one
    foreign(extra="<another>").save(str(text / "tokenizer.json"))
    assert config(text).build(TRAIN, 400).fingerprint != one


def test_the_one_that_we_trained_gives_the_same_batches(text):
    trained = config(text, tokenizer=None).build(TRAIN, 270)
    trained.tokenizer.save(text / "tokenizer.json")
    assert config(text).build(TRAIN, 270).fingerprint == trained.fingerprint


def test_its_ids_are_written_and_read_as_tokens(text):
    config(text).build(TRAIN, 400).write(text / "tokens")
    assert read(text / "tokens").tokenizer.encode("<｜User｜>") == [259]


def test_what_is_unfit_is_refused_with_its_file(text):
    path = text / "tokenizer.json"
    good = json.loads(path.read_text())
    shifted = json.loads(path.read_text())
    shifted["added_tokens"] = good["added_tokens"][1:]
    spelt = good | {"decoder": None}
    gap = json.loads(path.read_text())
    gap["model"]["vocab"]["zz"] = 300
    for content, size, why in (
        ("{", 400, "the tokenizers library cannot read it"),
        (json.dumps(shifted), 400, "its tokens 0, 1 and 2 are"),
        (json.dumps(good), 259, "has ids up to 259: set model.vocab_size to 260 or more"),
        (json.dumps(gap), 400, "leave ids below 300 out"),
        (json.dumps(spelt), 400, "it is no byte-level tokenizer"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=f"^{path}.*{why}"):
            config(text).build(TRAIN, size)
    path.unlink()
    with pytest.raises(DataError, match="tokenizers library cannot read it"):
        config(text).build(TRAIN, 400)


def test_what_we_train_is_fit_at_every_size(tmp_path):
    train(["some text, some more"] * 3, 266).save(tmp_path / "x.json")
    assert isinstance(read_tokenizer(tmp_path / "x.json", 266), ByteLevelBPE)
