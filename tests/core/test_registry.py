"""The table of components takes what a module itself defines, and no name twice."""

from types import ModuleType

import pytest
from attrs import frozen

from tangram.core.registry import DuplicateComponentError, Registry, component, mark_of


def module_of(name: str, *marks: tuple[str, str]) -> ModuleType:
    """A module that defines one marked class for each (slot, use)."""
    module = ModuleType(name)
    for i, (slot, use) in enumerate(marks):
        cls = component(slot, use=use)(frozen(type(f"Config{i}", (), {"__module__": name})))
        setattr(module, cls.__name__, cls)
    return module


def test_collecting_takes_marked_classes_and_nothing_else():
    module = module_of("one", ("router", "b"), ("router", "a"), ("guard", "a"))
    module.Plain = type("Plain", (), {"__module__": "one"})
    registry = Registry()
    assert len(registry.collect(module, "here")) == 3
    assert registry.uses("router") == ["a", "b"]
    assert registry.uses("optimizer") == []
    assert registry.get("guard", "a").config is module.Config2
    assert registry.get("guard", "a").origin == "here"
    assert registry.get("guard", "b") is None
    assert [(e.mark.slot, e.mark.use) for e in registry] == [("guard", "a"), ("router", "a"), ("router", "b")]


def test_a_class_that_a_module_only_imports_is_not_taken():
    home, visitor = module_of("home", ("router", "a")), ModuleType("visitor")
    visitor.Config0 = home.Config0
    registry = Registry()
    assert registry.collect(visitor, "there") == []
    assert len(registry.collect(home, "here")) == 1


def test_a_second_name_for_a_class_and_a_second_collection_change_nothing():
    module = module_of("one", ("router", "a"))
    module.Alias = module.Config0
    registry = Registry()
    first = registry.collect(module, "here")
    assert registry.collect(module, "there") == first
    assert [entry.origin for entry in registry] == ["here"]


def test_a_name_that_is_taken_is_refused_naming_both_origins_and_nothing_is_taken():
    registry = Registry()
    registry.collect(module_of("one", ("router", "a")), "dist one")
    with pytest.raises(DuplicateComponentError) as caught:
        registry.collect(module_of("two", ("router", "b"), ("router", "a")), "dist two")
    assert "router 'a'" in str(caught.value)
    assert "dist one" in str(caught.value)
    assert "dist two" in str(caught.value)
    assert registry.uses("router") == ["a"]


def test_two_classes_of_one_module_under_one_name_are_refused():
    registry = Registry()
    with pytest.raises(DuplicateComponentError, match=r"one\.Config1.*one\.Config0"):
        registry.collect(module_of("one", ("router", "a"), ("router", "a")), "here")
    assert list(registry) == []


def test_a_subclass_does_not_inherit_the_mark():
    base = module_of("one", ("router", "a")).Config0
    assert mark_of(base).use == "a"
    assert mark_of(type("Child", (base,), {})) is None
