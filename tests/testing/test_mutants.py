"""Every law kills its mutants: components with one known fault, most of which shipped somewhere."""

import pytest
from builders import SMALL_MLA

from tangram.plugins.precision.full import FullConfig
from tangram.testing import AttentionContract, Contract, Law, PrecisionContract, Status, examine


class MLA(AttentionContract):
    config = SMALL_MLA


class Full(PrecisionContract):
    config = FullConfig(compute="bfloat16")


TRIED: list[type[Contract]] = [MLA, Full]
"""A component for each slot, of which the mutants are made."""

KILLS = [
    pytest.param(contract, law, mutant, id=f"{contract.__name__}-{law.name}-{mutant.__name__}")
    for contract in TRIED
    for law in contract.laws()
    for mutant in law.kills
]


@pytest.mark.parametrize(("contract", "law", "mutant"), KILLS)
def test_a_law_kills_its_mutants(contract: type[Contract], law: Law, mutant) -> None:
    found = examine(contract, law, mutant=mutant)
    assert found.status is Status.FAILS, f"{law.name} does not notice that {mutant.__doc__}"
    assert found.example
