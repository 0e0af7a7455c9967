"""What becomes of a law: it holds, fails with its smallest example, does not apply, is expected to fail, or warns."""

import json
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
from attrs import field, frozen
from attrs.validators import ge
from hypothesis import strategies as st

from tangram.core.cli import main
from tangram.core.plugins import PluginError
from tangram.core.registry import component
from tangram.testing import Contract, Finding, Status, examine, law
from tangram.testing.checks import Report, as_junit, components_of, run_checks

HERE = metadata.version("tangram-lm").rpartition(".")[0]


def halves(built: int) -> int:
    """It is half of what it should be."""
    return built // 2


class NumberContract(Contract):
    """Laws of a toy slot, whose components build numbers."""

    slot = "number"
    optional: ClassVar[Mapping[str, str]] = {"even": "is even"}

    @classmethod
    def make(cls, config: Any) -> int:
        return int(config.build())

    @law(more=st.integers(0, 1000), kills=[halves])
    def it_is_at_least_ten(self, config: Any, more: int) -> None:
        """The number, and whatever is added, is at least ten."""
        assert self.make(config) + more >= 10, f"{self.make(config)} and {more}"

    @law(requires="even")
    def it_is_even(self, config: Any) -> None:
        """The number is even."""
        assert self.make(config) % 2 == 0

    @law(since=HERE)
    def it_is_below_a_hundred(self, config: Any) -> None:
        """The number is below a hundred."""
        assert self.make(config) < 100


def number(*capabilities: str) -> Callable[[int], object]:
    """Return a config class of the toy slot."""

    @component("number", use="plain", capabilities=capabilities)
    @frozen(kw_only=True)
    class Plain:
        """A number.

        Attributes:
            value: The number.
        """

        value: int = field(default=16, validator=ge(0))

        def build(self) -> int:
            return self.value

    return lambda value: Plain(value=value)


def contract(given: object, **members: object) -> type[NumberContract]:
    return type("Tried", (NumberContract,), {"config": given, **members})


def found(tried: type[Contract], name: str) -> Finding:
    return {finding.law: finding for finding in (examine(tried, each) for each in tried.laws())}[name]


def test_a_law_that_holds_holds_and_its_mutant_is_noticed():
    tried = contract(number()(16))
    assert found(tried, "it_is_at_least_ten").status is Status.HOLDS
    (lowest,) = (each for each in tried.laws() if each.kills)
    assert examine(tried, lowest, mutant=halves).status is Status.FAILS


def test_a_failure_comes_with_its_smallest_example_as_yaml_and_what_reproduces_it():
    finding = found(contract(number()(3)), "it_is_at_least_ten")
    assert finding.bad
    assert finding.example == "{config: {use: plain, value: 3}, more: 0}"
    assert finding.why.startswith("3 and 0")
    assert finding.blob.startswith("@reproduce_failure(")


def test_configs_are_drawn_from_a_class():
    finding = found(contract(type(number()(3)), profile="full"), "it_is_at_least_ten")
    assert finding.example == "{config: {use: plain, value: 0}, more: 0}"


def test_what_is_not_declared_does_not_apply_and_what_is_must_hold():
    assert found(contract(number()(13)), "it_is_even").status is Status.NOT_APPLICABLE
    assert found(contract(number("even")(13)), "it_is_even").status is Status.FAILS
    assert found(contract(number("even")(14)), "it_is_even").status is Status.HOLDS


def test_an_unknown_capability_is_told():
    finding = found(contract(type(number()(1))), "what_it_declares_is_known")
    assert finding.status is Status.HOLDS

    told = found(contract(number("odd")(1)), "what_it_declares_is_known")
    assert told.bad
    assert "knows no capability odd" in told.why


def test_an_expected_failure_must_fail():
    expected = {"it_is_at_least_ten": "small by design"}
    small = found(contract(number()(3), expected_failures=expected), "it_is_at_least_ten")
    large = found(contract(number()(30), expected_failures=expected), "it_is_at_least_ten")
    assert (small.status, small.why) == (Status.EXPECTED, "small by design")
    assert large.bad
    assert "holds" in large.why


def test_an_expected_failure_of_no_law_is_refused():
    with pytest.raises(TypeError, match="there is no law 'it_is_red'"):
        contract(number()(3), expected_failures={"it_is_red": "no"})


def test_a_new_law_warns_until_the_next_version():
    finding = found(contract(number()(100)), "it_is_below_a_hundred")
    assert finding.status is Status.WARNS
    assert not finding.bad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contract(number()(100)).test_it_is_below_a_hundred(None)
    assert any("it_is_below_a_hundred, new in" in str(each.message) for each in caught)


def test_as_tests_of_pytest_laws_fail_skip_and_are_expected_to_fail():
    tried = contract(number()(3))
    with pytest.raises(AssertionError, match="3 and 0"):
        tried().test_it_is_at_least_ten()
    with pytest.raises(pytest.skip.Exception, match="does not declare 'even'"):
        tried().test_it_is_even()
    reason = {"it_is_at_least_ten": "small by design"}
    with pytest.raises(pytest.xfail.Exception, match="small by design"):
        contract(number()(3), expected_failures=reason)().test_it_is_at_least_ten()
    with pytest.raises(pytest.fail.Exception, match="remove it"):
        contract(number()(30), expected_failures=reason)().test_it_is_at_least_ten()


# --- without pytest --------------------------------------------------------------------------------


def test_run_checks_tries_every_law_of_the_slot():
    report = run_checks("balancer.none", profile="ci")
    assert report.conforms
    assert {finding.law for finding in report.findings} >= {"every_field_is_documented", "it_builds_without_memory"}


def test_run_checks_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"did you mean 'balancer\.none'"):
        run_checks("balancer.nome")
    with pytest.raises(ValueError, match="no profile 'fool'"):
        run_checks("balancer.none", profile="fool")
    with pytest.raises(ValueError, match="no floating dtype 'int8'"):
        run_checks("balancer.none", dtype="int8")
    for device in ("cudo", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"no device '{device}' here to compute on"):
            run_checks("balancer.none", device=device)


def test_junit_tells_failures_and_what_does_not_apply():
    findings = (
        Finding("a", "A holds.", Status.HOLDS),
        Finding("b", "B holds.", Status.FAILS, 0.5, "it is <not>", "{x: 1}", "@reproduce_failure()"),
        Finding("c", "C holds.", Status.NOT_APPLICABLE, why="it does not declare 'c'"),
    )
    (suite,) = ElementTree.fromstring(as_junit([Report("slot.use", "me", findings)]))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite[1][0].get("message") == "it is <not>"
    assert "{x: 1}" in (suite[1][0].text or "")


BROKEN = '''
"""A balancer whose biases move in the wrong direction, in a dtype of their own."""
import torch
from attrs import frozen
from tangram.core import component
from tangram.core.contracts import Balancer

@component("balancer", use="backwards")
@frozen(kw_only=True)
class BackwardsConfig:
    """Move biases the wrong way."""

    def build(self, ctx, n_experts):
        """Build it."""
        return Backwards(n_experts)

class Backwards(Balancer):
    def __init__(self, n_experts):
        super().__init__()
        self.register_buffer("biases", torch.empty(n_experts))
        self.reset_parameters()

    def reset_parameters(self):
        pass

    def bias(self):
        return self.biases

    def update(self, load, now):
        self.biases += torch.sign(load - load.float().mean())
'''


def test_check_plugin_names_the_law_that_a_plugin_breaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "backwards.py"
    file.write_text(BROKEN)
    arguments = ["check-plugin", "backwards", "--profile", "ci", "--json", "--plugin", str(file)]
    with pytest.raises(SystemExit) as exited:
        main([*arguments, "--junit", str(tmp_path / "result.xml")])
    (told,) = json.loads(capsys.readouterr().out)["components"]
    broken = {row["law"]: row for row in told["laws"] if row["result"] == "fails"}
    assert exited.value.code == 1
    assert not told["conforms"]
    assert "biases" in broken["every_tensor_is_set_by_reset_parameters"]["why"]
    assert (tmp_path / "result.xml").read_text().count("<failure") == len(broken)


def test_check_plugin_refuses_a_name_of_nothing(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exited:
        main(["check-plugin", "attention.mlo"])
    assert exited.value.code == 2
    assert "did you mean 'attention.mla'" in capsys.readouterr().err


def test_a_name_may_be_a_slot_or_a_distribution():
    from tangram.core.plugins import Plugins

    plugins = Plugins.discover()
    assert components_of("balancer", plugins) == ["balancer.aux_free", "balancer.none"]
    assert set(components_of("tangram", plugins)) >= {"attention.mla", "data.text"}
    with pytest.raises((ValueError, PluginError)):
        components_of("nobody", plugins)
