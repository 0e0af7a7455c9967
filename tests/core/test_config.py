"""Reading keeps every line and lets nothing strange through; laying trees over each other has an algebra."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tangram.core.config import (
    MAX_BYTES,
    MAX_DEPTH,
    ConfigError,
    Node,
    Origin,
    Problem,
    load,
    merge,
    override,
    read,
    suggest,
)

TEXT = """\
name: toy   # a comment
model:
  dim: 64
  block: {attention: {use: mla, n_heads: 4}}
  blocks:
    - repeat: 1
    - {repeat: 3}
lr: [1e-4, 2.5,
     3]
"""

keys = st.text("abc", min_size=1, max_size=2)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\x7f", exclude_categories=["Cc", "Cs"]))
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
patches = st.dictionaries(
    keys,
    st.recursive(
        st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
        lambda inner: st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)


def node(value: object) -> Node:
    return read(json.dumps(value, ensure_ascii=False), "x.yaml")


def plain_types(value: object) -> set[type]:
    if isinstance(value, dict):
        return {dict} | {type(key) for key in value} | set().union(*map(plain_types, value.values()))
    if isinstance(value, list):
        return {list} | set().union(*map(plain_types, value))
    return {type(value)}


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e8", 3e8),
        ("14.8e12", 14.8e12),
        (".5", 0.5),
        ("1.", 1.0),
        ("-7", -7),
        ("+7", 7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("12:30:45", "12:30:45"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ('"true"', "true"),
        ("[1, x, null]", [1, "x", None]),
        ("{a: {b: 1.5}}", {"a": {"b": 1.5}}),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    got = read(text, "x").plain()
    assert got == value
    assert type(got) is type(value)


@given(trees)
def test_reading_gives_plain_python_and_exactly_what_was_written(tree):
    got = node(tree).plain()
    assert repr(got) == repr(tree)
    assert plain_types(got) <= {dict, list, str, int, float, bool, type(None)}


def test_every_value_knows_the_line_of_its_key():
    tree = read(TEXT, "x.yaml")
    lines = {
        ("name",): 1,
        ("model",): 2,
        ("model", "dim"): 3,
        ("model", "block", "attention", "n_heads"): 4,
        ("model", "blocks"): 5,
        ("model", "blocks", 0): 6,
        ("model", "blocks", 1, "repeat"): 7,
        ("lr",): 8,
        ("lr", 2): 9,
    }
    for path, line in lines.items():
        found = tree
        for step in path:
            found = found.child(step)
        assert str(found.origin) == f"x.yaml:{line}"


MALFORMED = {
    "a duplicate key": ("a: 1\nb: 2\na: 3", 3, "a: the key is there twice, first at"),
    "a nested duplicate key": ("m:\n  a: 1\n  a: 2", 3, "m.a: the key is there twice"),
    "a duplicate flow key": ("m: {a: 1, a: 2}", 1, "m.a: the key is there twice"),
    "a tag": ("a: 1\nb: !!python/object/apply:os.system ['x']", 2, "b: tags such as"),
    "a standard tag": ("a: !!str 3", 1, "a: tags such as"),
    "a bare tag": ("a: ! x", 1, "a: tags such as"),
    "a tag on a map": ("a: !foo {b: 1}", 1, "a: tags such as"),
    "a cycle": ("x: 1\na: &a [*a]", 2, "anchors and aliases"),
    "an anchor": ("a: &a 3", 1, "anchors and aliases"),
    "an alias": ("a: 3\nb: *a", 2, "anchors and aliases"),
    "a merge key": ("a: &a {x: 1}\nb:\n  <<: *a", 3, "anchors and aliases"),
    "an integer key": ("a: 1\n7: 2", 2, "keys are strings, got 7"),
    "a boolean key": ("true: 2", 1, "keys are strings, got true"),
    "a null key": ("~: 2", 1, "keys are strings, got null"),
    "a float key": ("m:\n  1.5: 2", 2, "m: keys are strings, got 1.5"),
    "a list as a key": ("? [1]\n: 2", 1, "keys are strings, got a list"),
    "a map as a key": ("? {a: 1}\n: 2", 1, "keys are strings, got a map"),
    "infinity": ("a: 1\nb: .inf", 2, "b: .inf is not a finite number"),
    "minus infinity": ("b: -.Inf", 1, "not a finite number"),
    "not a number": ("b: .nan", 1, "not a finite number"),
    "a float that overflows": ("b: 1e999", 1, "not a finite number"),
    "an integer that overflows": ("b: 9223372036854775808", 1, "does not fit in 64 bits"),
    "an endless integer": ("b: " + "9" * 5000, 1, "does not fit in 64 bits"),
    "half a character": ('a: 1\nb: "\\ud800"', 2, "b: holds half of a surrogate pair"),
    "an open quote": ("a: 1\nb: 'x", 2, "not parseable"),
    "an open bracket": ("a: [1, 2", 1, "not parseable"),
    "a tab": ("a:\n\tb: 1", 2, "not parseable"),
    "two values": ("a: b: c", 1, "not parseable"),
    "a control character": ("a: \x00", 1, "not parseable"),
    "a wrong indent": ("a:\n    b: 1\n  c: 2", 3, "not parseable"),
    "two documents": ("a: 1\n---\nb: 2", 2, "more than one document"),
    "keys within keys": ("? " * 5000, 1, f"deeper than {MAX_DEPTH}"),
    "great depth": ("a: 1\nb: " + "[" * 5000, 2, f"deeper than {MAX_DEPTH}"),
    "a scalar": ("3", 1, "expected a map, got 3"),
    "a list": ("- 1", 1, "expected a map, got a list"),
    "nothing": ("# only a comment\n", 1, "expected a map, got null"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_presets_do_not_use_is_refused_with_file_and_line(kind, tmp_path):
    text, line, said = MALFORMED[kind]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    first = str(caught.value).splitlines()[0]
    assert said in str(caught.value)
    assert any(str(p).startswith(f"{path}:{line}: ") for p in caught.value.problems), first


def test_a_file_that_is_not_there_too_large_or_not_text_is_refused_by_name(tmp_path):
    path = tmp_path / "bad.yaml"
    for content, said in (
        (None, "cannot be read"),
        (b"#" * (MAX_BYTES + 1), "larger"),
        (b"a: 1\nb: \xff", ":2: "),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=said) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_all_that_a_reader_can_know_is_told_together():
    with pytest.raises(ConfigError) as caught:
        read("a: .inf\nb: !x 1\nc: 1\nc: 2\n3: 4", "x.yaml")
    assert [problem.origin.line for problem in caught.value.problems] == [1, 2, 4, 5]


def test_depth_is_refused_just_beyond_the_limit():
    read("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    with pytest.raises(ConfigError, match="deeper"):
        read("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "x")


def mutated(seed: int) -> str:
    dice = random.Random(seed)
    strange = [*"{}[]:,&*!|>'\"%@`#?-~\t\n \\<", "<<: ", "!!", "\x85", ""]
    text = list(TEXT)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(text))
        text[at : at + dice.randint(0, 2)] = dice.choice(strange)
    return "".join(text)


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_no_mutation_of_a_preset_escapes_as_another_error(seed):
    try:
        problems, types = (), plain_types(read(mutated(seed), "x.yaml").plain())
    except ConfigError as error:
        problems, types = error.problems, set()
    assert problems or types
    assert types <= {dict, list, str, int, float, bool, type(None)}
    assert all(str(problem).startswith("x.yaml:") for problem in problems)


# --- laying over ------------------------------------------------------------------------------------------


# A key that is a map in one tree and a leaf in another breaks associativity, so upper case marks the maps.
consistent = st.deferred(
    lambda: st.builds(
        lambda leaves, maps: {**leaves, **maps},
        st.dictionaries(keys, st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2), max_size=3),
        st.just({}) | st.dictionaries(st.sampled_from("ABC"), consistent, max_size=3),
    )
)


@given(consistent, consistent, consistent)
def test_merge_is_associative_where_maps_meet_maps(a, b, c):
    a, b, c = node(a), node(b), node(c)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(patches)
def test_nothing_is_the_identity_of_merge_and_merging_twice_is_merging_once(a):
    a = node(a)
    assert merge(node({}), a) == merge(a, node({})) == merge(a, a) == a


@given(patches, patches)
def test_a_patch_laid_twice_is_a_patch_laid_once(a, b):
    once = merge(node(a), node(b))
    assert merge(once, node(b)) == once


@given(patches, patches)
def test_naming_another_use_leaves_no_old_key(old, new):
    base = node({"slot": {**old, "use": "x"}, "other": 1})
    patch = {**new, "use": "y"}
    assert merge(base, node({"slot": patch})).plain() == {"slot": patch, "other": 1}


@given(patches, patches)
def test_naming_the_same_use_or_none_keeps_the_old_keys(old, new):
    base = node({"slot": {**old, "use": "x"}})
    same = merge(base, node({"slot": {**new, "use": "x"}}))
    silent = merge(base, node({"slot": new}))
    assert same == silent
    assert set(same.plain()["slot"]) == {*old, *new, "use"}


def test_lists_and_scalars_are_replaced_and_maps_merge():
    base = node({"l": [1, 2], "m": {"a": 1, "b": 2}, "s": 1, "t": {"x": 1}})
    patch = node({"l": [3], "m": {"b": 3}, "s": {"y": 1}, "t": 5})
    assert merge(base, patch).plain() == {"l": [3], "m": {"a": 1, "b": 3}, "s": {"y": 1}, "t": 5}


def test_a_map_of_indices_patches_the_elements_of_a_list():
    base = node({"l": [{"a": 1, "b": 2}, 5]})
    assert merge(base, override("l.0.b=3")).plain() == {"l": [{"a": 1, "b": 3}, 5]}
    assert merge(base, override("l.1=6")).plain() == {"l": [{"a": 1, "b": 2}, 6]}
    assert merge(base, override("l.0={b: null}")).plain() == {"l": [{"a": 1, "b": None}, 5]}
    with pytest.raises(ConfigError, match=r"^l\.2\.x=1: l\.2: there is no element 2; the list has 2"):
        merge(base, override("l.2.x=1"))


@given(patches, st.permutations(range(4)))
def test_unrelated_overrides_commute(base, order):
    overrides = [override(text) for text in ("a.p=1", "a.q=[2]", "b.r.s={t: 3}", "list.1.x=4")]
    base = node({**base, "list": [{}, {}, {}]})
    straight = shuffled = base
    for i, j in zip(range(4), order, strict=True):
        straight, shuffled = merge(straight, overrides[i]), merge(shuffled, overrides[j])
    assert straight == shuffled


def test_a_merged_value_keeps_the_origin_of_the_one_who_wrote_it():
    merged = merge(merge(read("a: 1\nb: 2", "base.yaml"), read("\nb: 3", "child.yaml")), override("c.d=4"))
    assert str(merged.child("a").origin) == "base.yaml:1"
    assert str(merged.child("b").origin) == "child.yaml:2"
    assert str(merged.child("c").child("d").origin) == "c.d=4"


# --- overrides --------------------------------------------------------------------------------------------


@given(st.lists(keys, min_size=1, max_size=4), trees.filter(lambda tree: not isinstance(tree, str)))
def test_an_override_is_read_as_a_preset_is(path, value):
    got = override(f"{'.'.join(path)}={json.dumps(value, ensure_ascii=False)}")
    expected = value
    for key in reversed(path):
        expected = {key: expected}
    assert repr(got.plain()) == repr(expected)


def test_a_value_may_hold_an_equals_sign():
    assert override("a.b='x=y'").plain() == {"a": {"b": "x=y"}}


@pytest.mark.parametrize("text", ["a.b", "=3", "a..b=3", ".a=3", "a.=3", "a" + ".a" * MAX_DEPTH + "=1"])
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=r"dotted\.path=value|deeper"):
        override(text)


def test_an_override_that_is_no_yaml_is_refused_with_its_own_text():
    with pytest.raises(ConfigError, match=r"^lr=\[1: not parseable"):
        override("lr=[1")


# --- errors -----------------------------------------------------------------------------------------------


def test_a_problem_is_one_line_of_place_path_and_words():
    problems = [
        Problem(Origin("x.yaml", 3), "a.b", "is wrong"),
        Problem(Origin("a.b=3"), "a.b", "is wrong"),
        Problem(None, "", "is wrong"),
    ]
    assert str(ConfigError(problems)).splitlines() == [
        "x.yaml:3: a.b: is wrong",
        "a.b=3: a.b: is wrong",
        "is wrong",
    ]


def test_a_close_name_is_suggested_and_otherwise_all_are_listed():
    assert suggest("kv_rnk", ["kv_rank", "q_rank"]) == ", did you mean 'kv_rank'?"
    assert suggest("zzz", ["a", "b"]) == " (known: a, b)"
    assert suggest("zzz", []) == ""
