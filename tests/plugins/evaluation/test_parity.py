"""On exported weights the library's own class for Hugging Face models finds what ours does, where it reads the same."""

import warnings
from itertools import chain, product
from pathlib import Path

import pytest
import torch
from scored import LENGTH, run

from tangram.core import load_run
from tangram.core.interchange import export
from tangram.plugins.evaluation.harness import model_of
from tangram.plugins.evaluation.scoring import Scorer
from tangram.testing import tolerance

pytest.importorskip("lm_eval", reason="lm-evaluation-harness takes longer to install than all else in development")
pytest.importorskip("accelerate", reason="the library's class for Hugging Face models needs it")

BOUND = tolerance(torch.float32, 4 * LENGTH)
"""Relative to a sum of at most LENGTH terms, each behind a few products of at most LENGTH terms: theirs in float32."""
CONTEXTS = ("7: naïve café 世界", "12: ends", "a line:\nand", "a line:\n", "naïve café 世界 🙂 " * 9 + "so")
CONTINUATIONS = (" ends 7.", " naïve", ", and\nmore", " 世界 🙂", " x")


def test_it_finds_the_same_log_likelihoods_and_texts(tmp_path: Path) -> None:
    import peer  # noqa: F401  (transformers, without our kernels for those of Hugging Face)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    export(run(), tmp_path / "exported")
    theirs = HFLM(pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", add_bos_token=True)
    trained = load_run(run())
    assert trained.data.tokenizer is not None
    scorer = Scorer(trained.model, trained.data.tokenizer, LENGTH)
    ours = model_of(scorer)

    def asked(kind: str, arguments: list[tuple[object, ...]]) -> list[Instance]:
        return [Instance(kind, {}, each, 0) for each in arguments]

    pairs = list(product(CONTEXTS, CONTINUATIONS))
    encode, bos = trained.data.tokenizer.encode, trained.data.tokenizer.bos
    alike = [pair for pair in pairs if [bos, *encode("".join(pair))] == [*chain(*theirs._encode_pair(*pair))]]
    assert len(alike) >= len(pairs) // 2
    assert any(len(encode("".join(pair))) > LENGTH for pair in alike)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one is too long for the model
        found = ours.loglikelihood(asked("loglikelihood", alike))
        expected = theirs.loglikelihood(asked("loglikelihood", alike), disable_tqdm=True)
        for one, other in zip(found, expected, strict=True):
            assert one[0] == pytest.approx(other[0], rel=BOUND)
            assert one[1] == other[1]
        wanted = {"until": ["\n"], "max_gen_toks": 20, "do_sample": False}
        texts: list[tuple[object, ...]] = [(context, wanted) for context in CONTEXTS]
        made = ours.generate_until(asked("generate_until", texts))
        assert made == theirs.generate_until(asked("generate_until", texts), disable_tqdm=True)
