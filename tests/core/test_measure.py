import pytest
from tiny import tiny

from tangram.core import build_model, load_preset
from tangram.core.measure import count, measure


def test_deepseek_v3_has_the_published_size() -> None:
    measures = measure(load_preset("deepseek-v3"))
    assert measures.parameters.total == 671_026_419_200
    assert measures.parameters.active == 36_625_618_432
    assert measures.parameters.mtp == 11_610_068_224
    assert measures.parameters.embedding == measures.parameters.head == 926_679_040
    assert measures.parameters.attention == 61 * 187_107_328
    assert measures.kv_cache_bytes_per_token == 70_272
    # arXiv:2505.09343, table 2, says 250 GFLOP a token at length 4,096.
    assert measures.training_flops_per_token == pytest.approx(250.46e9, rel=1e-4)


def test_v3_tiny_has_the_size_of_the_peers_shape_and_its_router_biases() -> None:
    assert measure(load_preset("v3-tiny")).parameters.total == 19_517_824 + 5 * 32


def test_counting_without_weights_agrees_with_the_built_model() -> None:
    experiment = tiny()
    parameters = measure(experiment).parameters
    assert parameters.total + parameters.mtp == count(build_model(experiment))


def test_the_cache_shrinks_with_the_compute_dtype() -> None:
    half, full = (measure(tiny(f"precision.compute={dtype}")) for dtype in ("bfloat16", "float32"))
    assert 2 * half.kv_cache_bytes_per_token == full.kv_cache_bytes_per_token == 3 * (8 + 4) * 4


def test_a_model_without_experts_is_all_active() -> None:
    parameters = measure(load_preset("gqa-baseline")).parameters
    assert parameters.active == parameters.total - parameters.embedding
    assert parameters.mtp == 0
