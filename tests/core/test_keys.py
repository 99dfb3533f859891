from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core import keys
from cloudckpt.core.keys import Key, Kind
from cloudckpt.errors import FormatError
from cloudckpt.testing.strategies import components, hex_digits, steps

FOLDER = "checkpoint-1500.9f3ac2e1"
PAYLOAD = "model-00000-of-00008.safetensors"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("manifest.json", Kind.MANIFEST),
        ("manifest-000480.json", Kind.COPY),
        ("manifest-1234567.json", Kind.COPY),
        (f"manifest-{2**62}.json", Kind.COPY),
        ("manifest-replaced-9f3ac2e1.json", Kind.REPLACED),
        (".manifest-replaced-9f3ac2e1.json.tmp", Kind.TEMPORARY),
        (".cloudckpt.lock", Kind.LOCK),
        (".cloudckpt-swap.tmp", Kind.TEMPORARY),
        (".cloudckpt-probe-00c0ffee", Kind.PROBE),
        (f"{FOLDER}/checkpoint.json", Kind.INDEX),
        (f"{FOLDER}/{PAYLOAD}", Kind.PAYLOAD),
        (f"{FOLDER}/.{PAYLOAD}.tmp", Kind.TEMPORARY),
        (f"{FOLDER}/.checkpoint.json.tmp", Kind.TEMPORARY),
    ],
)
def test_every_key_of_the_format_has_its_kind(text: str, kind: Kind) -> None:
    """Each spelling of the grammar is recognised as what it is."""
    assert (keys.parse(text).text, keys.parse(text).kind) == (text, kind)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "notes.txt",
        "manifest.json.bak",
        "Manifest.json",
        "manifest-480.json",
        "manifest-00048x.json",
        f"manifest-{2**62 + 1}.json",
        f"manifest-{10**19}.json",
        "manifest-" + "9" * 5000 + ".json",
        "manifest.json/manifest.json",
        "checkpoint-99.partial/model-00000-of-00001.safetensors",
        "checkpoint-1500/model.safetensors",
        FOLDER,
        f"{FOLDER}/",
        f"{FOLDER}//checkpoint.json",
        f"{FOLDER}/notes.txt",
        f"{FOLDER}/old/checkpoint.json",
        f"{FOLDER}/.notes.txt.tmp",
        f"{FOLDER}/../manifest.json",
        f"{FOLDER}/a..b-00000-of-00001.safetensors",
        f"{FOLDER}/.hidden-00000-of-00001.safetensors",
        f"{FOLDER}/model-0-of-8.safetensors",
        f"{FOLDER}/m%2-00000-of-00001.safetensors",
        f"{FOLDER}/m%2f-00000-of-00001.safetensors",
        "checkpoint-01500.9f3ac2e1/checkpoint.json",
        "checkpoint-+1.9f3ac2e1/checkpoint.json",
        "checkpoint-٣.9f3ac2e1/checkpoint.json",
        "checkpoint-1500.9F3AC2E1/checkpoint.json",
        "checkpoint-1500.9f3ac2e/checkpoint.json",
        "other-run/manifest.json",
        "manifest.json\n",
    ],
)
def test_everything_else_is_foreign(text: str) -> None:
    """What the grammar does not spell is foreign, however near it comes; a stray folder counts for nothing (I12, L15)."""
    assert keys.parse(text) == Key(text=text, kind=Kind.FOREIGN)


@given(
    st.sampled_from(["..", "\\", "\0", "\n", "\r", "\t", "\x7f", "//"]),
    st.sampled_from(["manifest.json", f"{FOLDER}/checkpoint.json", f"{FOLDER}/{PAYLOAD}"]),
    st.integers(0, 60),
)
def test_no_key_of_ours_leads_elsewhere(evil: str, text: str, place: int) -> None:
    """A key with "..", a backslash, an empty part or a control character anywhere is foreign (C18)."""
    assert keys.parse(text[:place] + evil + text[place:]).kind is Kind.FOREIGN


@given(st.text())
def test_an_absolute_key_is_foreign(text: str) -> None:
    """Whatever follows a leading slash, it is not ours."""
    assert keys.parse("/" + text).kind is Kind.FOREIGN


@given(steps(), hex_digits(8), components(), st.integers(0, 10**6), st.integers(1, 10**6))
def test_parsing_undoes_building(step: int, save_id: str, component: str, rank: int, world_size: int) -> None:
    """Every key a builder makes is parsed back into what it was made of, any text as a component included (C18)."""
    name = keys.payload_name(component, rank, world_size)
    payload = keys.payload_key(step, save_id, name)
    index = keys.index_key(step, save_id)

    assert keys.parse(payload) == Key(text=payload, kind=Kind.PAYLOAD, step=step, id=save_id)
    assert keys.component_of(name) == component
    assert keys.parse(index) == Key(text=index, kind=Kind.INDEX, step=step, id=save_id)
    assert keys.parse_prefix(keys.checkpoint_prefix(step, save_id)) == (step, save_id)
    for key in (payload, index):
        temporary = keys.temporary_key(key)
        assert keys.parse(temporary) == Key(text=temporary, kind=Kind.TEMPORARY, step=step, id=save_id)
    assert set(payload) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-%/")
    assert ".." not in payload


@given(components(), components())
def test_two_components_never_share_an_object(one: str, other: str) -> None:
    """Different components have different object names (H12)."""
    assert (keys.payload_name(one, 0, 1) == keys.payload_name(other, 0, 1)) == (one == other)


@given(st.integers(0, 10**12))
def test_a_copy_names_its_revision(revision: int) -> None:
    """The revision of a manifest copy can be read from its key."""
    key = keys.manifest_copy(revision)
    assert keys.parse(key) == Key(text=key, kind=Kind.COPY, revision=revision)


@given(hex_digits(8))
def test_what_repair_put_aside_is_ours(token: str) -> None:
    """A replaced manifest is recognised, and so is its half-written temporary file."""
    key = keys.replaced_manifest(token)
    assert keys.parse(key).kind is Kind.REPLACED
    assert keys.parse(keys.temporary_key(key)).kind is Kind.TEMPORARY


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("model", "model-00000-of-00001.safetensors"),
        ("model.ema", "model.ema-00000-of-00001.safetensors"),
        (".hidden", "%2Ehidden-00000-of-00001.safetensors"),
        ("..", "%2E%2E-00000-of-00001.safetensors"),
        ("a..b", "a.%2Eb-00000-of-00001.safetensors"),
        ("a/b c~ü", "a%2Fb%20c%7E%C3%BC-00000-of-00001.safetensors"),
        ("x-00000-of-00001", "x-00000-of-00001-00000-of-00001.safetensors"),
    ],
)
def test_odd_component_names_are_escaped(component: str, name: str) -> None:
    """Names with dots, slashes, spaces and Unicode become one plain object name (C18)."""
    assert keys.payload_name(component, 0, 1) == name


@pytest.mark.parametrize(
    ("component", "why"), [("", "has 0"), ("x" * 181, "has 181"), ("ü" * 31, "has 186"), ("\ud800", "surrogate")]
)
def test_a_component_that_cannot_be_a_key_is_refused(component: str, why: str) -> None:
    """An empty name, one too long once escaped, and one that is no text are refused by name."""
    with pytest.raises(FormatError, match=why):
        keys.payload_name(component, 0, 1)


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "%FF-00000-of-00001.safetensors"])
def test_only_a_payload_name_has_a_component(name: str) -> None:
    """A name that no component could have given is refused."""
    with pytest.raises(FormatError, match="not the name of a payload object"):
        keys.component_of(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("9f3ac2e1", True), ("9F3AC2E1", False), ("9f3ac2e", False), ("9f3ac2e11", False), ("", False)],
)
def test_a_save_id_is_eight_low_hex_digits(text: str, *, expected: bool) -> None:
    """Nothing but eight lower-case hex digits is a save id."""
    assert keys.is_save_id(text) is expected
