"""Take the schema of the resources that ``terraform/`` uses out of a provider's Python binding.

    python tools/terraform_schema.py --download     fetch the two wheels named below with pip, and write both excerpts
    python tools/terraform_schema.py WHEEL ...      the same from wheels that are there

The bindings (``cdktn-provider-aws``, ``cdktn-provider-google``) carry the provider's schema in generated JavaScript:
names, types, which arguments are required, and which are blocks. Facts of that kind, and no code, are written to
``tests/terraform/schema/``, for the types that the modules and examples use. The stub provider
(``tools/terraform_stub.py``) serves them to Terraform, which then checks every resource, block and argument.

Limits: values are not known (regions, enumerations, what excludes what), nor how many of a block there may be beyond
one. Where an attribute has attributes inside, as in newer resources, they are kept as they are found.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "tests" / "terraform" / "schema"
#: Provider -> the binding's package, pinned: an excerpt says what it was made from.
BINDINGS = {"aws": "cdktn-provider-aws==25.8.1", "google": "cdktn-provider-google==21.1.0"}

_USED = re.compile(r'^(resource|data) "((aws|google)_\w+)"', re.MULTILINE)
_WHEEL = re.compile(r"cdktn_provider_(aws|google)-([0-9.]+)-")
_CLASS = re.compile(r"^class (\w+) extends .*?^\}\n", re.MULTILINE | re.DOTALL)
_FUNCTION = re.compile(r"^function (\w+)ToHclTerraform\(struct\) \{.*?^\}\n", re.MULTILINE | re.DOTALL)
_TYPE_NAME = re.compile(r'tfResourceType = "(\w+)"')
_FLAGS = re.compile(
    r"// ([a-z0-9_]+) - computed: (true|false), optional: (true|false), required: (true|false)\n"
    r"(.*?)(?=\n    // [a-z0-9_]+ - computed|\n    // =====|\n\}\n)",
    re.DOTALL,
)
_ATTRS = re.compile(r"const attrs = \{(.*?)\n {4}(?: {4})?\};", re.DOTALL)
_ATTR = re.compile(
    r'^\s+"?([A-Za-z0-9_]+)"?: \{\n\s+value: .*?,\n\s+isBlock: (true|false),\n\s+type: "(\w+)",\n'
    r'\s+storageClassType: "(\w+)",',
    re.MULTILINE | re.DOTALL,
)
_SYNTHESIZED = re.compile(r"synthesizeHclAttributes\(\) \{.*?\n    \}", re.DOTALL)
_GETTER = re.compile(r"this\.(get\w+Attribute)\(")
_INNER = re.compile(r'new (\w+)(?:List|OutputReference|Map)\(this, "\w+", ?(true|false)?')

_SIMPLE = {"string": "string", "number": "number", "boolean": "bool", "any": "dynamic"}
_GETTERS: dict[str, Any] = {
    "getStringAttribute": "string",
    "getNumberAttribute": "number",
    "getBooleanAttribute": "bool",
    "getListAttribute": ["list", "string"],
    "getNumberListAttribute": ["list", "number"],
    "getStringMapAttribute": ["map", "string"],
    "getBooleanMapAttribute": ["map", "bool"],
    "getNumberMapAttribute": ["map", "number"],
    "getAnyMapAttribute": ["map", "dynamic"],
}
_NESTING = {"list": "LIST", "set": "SET", "map": "MAP", "struct": "SINGLE"}

Block = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Said:
    """What the code that writes a configuration says of one name."""

    is_block: bool
    collection: str
    kind: str


def used(root: Path = ROOT) -> dict[str, dict[str, set[str]]]:
    """The types that the modules and examples use: provider -> "resource" or "data" -> names."""
    found: dict[str, dict[str, set[str]]] = {name: {"resource": set(), "data": set()} for name in BINDINGS}
    for path in sorted((root / "terraform").rglob("*.tf")):
        for kind, name, provider in _USED.findall(path.read_text(encoding="utf-8")):
            found[provider][kind].add(name)
    return found


def _type(kind: str) -> Any:
    """A type as the plugin protocol spells it; None for a class of the binding."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    for suffix, collection in (("List", "list"), ("Map", "map"), ("Set", "set")):
        if kind.endswith(suffix) and kind[0].islower():
            inner = _type(kind.removesuffix(suffix))
            return None if inner is None else [collection, inner]
    return None


class _Source:
    """The JavaScript of one type."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//# sourceMappingURL.*", "", text)
        self.classes = {match[1]: match[0] for match in _CLASS.finditer(text)}
        self.functions = {match[1]: match[0] for match in _FUNCTION.finditer(text)}

    def block(self, function: str | None, name: str) -> Block:
        """Attributes and blocks of the class ``name``, whose configuration ``function`` writes."""
        body = self.classes.get(name, "")
        flags = {match[0]: match[1:] for match in _FLAGS.findall(f"{body}\n}}\n")}
        if function is None:
            found = _SYNTHESIZED.search(body)
            said = _said(found[0] if found else "")
        else:
            said = _said(self.functions.get(function, ""))
        attributes: dict[str, Any] = {}
        blocks: dict[str, Any] = {}
        for key in sorted({*flags, *said}):
            computed, optional, required, getter = flags.get(key, ("false", "true", "false", ""))
            words = {
                "computed": computed == "true",
                "optional": optional == "true",
                "required": required == "true",
            }
            if key not in said:
                attributes[key] = {"type": self._computed_type(getter), **words}
            elif (kind := _type(said[key].kind)) is not None:
                if said[key].collection == "set" and isinstance(kind, list) and kind[0] == "list":
                    kind = ["set", kind[1]]
                attributes[key] = {"type": kind, **words}
            else:
                found_inside = self._inner(said[key], getter, words)
                if said[key].is_block:
                    blocks[key] = found_inside
                else:
                    attributes[key] = {"nested": found_inside["nesting"], "block": found_inside["block"], **words}
        return {"attributes": attributes, "blocks": blocks}

    def _inner(self, said: _Said, getter: str, words: Mapping[str, bool]) -> dict[str, Any]:
        base = said.kind
        for suffix in ("List", "Map"):
            if base.endswith(suffix) and f"{base.removesuffix(suffix)}OutputReference" in self.classes:
                base = base.removesuffix(suffix)
                break
        function = base[0].lower() + base[1:]
        reference = f"{base}OutputReference"
        inner = self.block(function if function in self.functions else None, reference)
        is_single = f"{reference}(this" in getter
        nesting = _NESTING.get(said.collection, "LIST")
        counted = nesting != "SINGLE"
        return {
            "nesting": nesting,
            "min": int(words["required"] and counted),
            "max": int(is_single and counted),
            "block": inner,
        }

    def _computed_type(self, getter: str) -> Any:
        """The type of an attribute that only the provider sets, by how the binding reads it."""
        if "StringMap(this" in getter:
            return ["map", "string"]
        if (found := _GETTER.search(getter)) is not None:
            kind = _GETTERS.get(found[1], "dynamic")
            return ["set", kind[1]] if "Fn.tolist" in getter and isinstance(kind, list) else kind
        inner = _INNER.search(getter)
        if inner is None or f"{inner[1]}OutputReference" not in self.classes:
            return "dynamic"
        attributes = self.block(None, f"{inner[1]}OutputReference")["attributes"]
        fields = {name: attribute.get("type") or "string" for name, attribute in attributes.items()}
        return ["set" if inner[2] == "true" else "list", ["object", fields]]


def _said(text: str) -> dict[str, _Said]:
    found = _ATTRS.search(text)
    if found is None:
        return {}
    return {name: _Said(block == "true", how, kind) for name, block, how, kind in _ATTR.findall(found[1])}


def _sources(wheel: Path) -> Iterator[tuple[str, str]]:
    """The folder's name and the text of each type's JavaScript in a wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (inner,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner)), mode="r:gz") as archive:
            for member in archive:
                match = re.fullmatch(r"package/lib/([\w-]+)/index\.js", member.name)
                content = archive.extractfile(member) if match else None
                if match is not None and content is not None:
                    yield match[1], content.read().decode()


def extract(wheel: Path, wanted: Mapping[str, set[str]]) -> dict[str, Any]:
    """The excerpt of a wheel for some types.

    Raises:
        ValueError: a type is not in it.
    """
    match = _WHEEL.match(wheel.name)
    if match is None:
        raise ValueError(f"{wheel.name} is no wheel of {' or '.join(BINDINGS.values())}")
    found: dict[str, dict[str, Block]] = {"resource": {}, "data": {}}
    for folder, text in _sources(wheel):
        name = _TYPE_NAME.search(text)
        kind = "data" if folder.startswith(f"data-{match[1]}-") else "resource"
        if name is None or name[1] not in wanted[kind]:
            continue
        source = _Source(text)
        main = next(key for key, body in source.classes.items() if "tfResourceType" in body)
        found[kind][name[1]] = source.block(None, main)
    if missing := {name for kind in found for name in wanted[kind] - set(found[kind])}:
        raise ValueError(f"{wheel.name} has no {', '.join(sorted(missing))}")
    return {"binding": f"cdktn-provider-{match[1]}=={match[2]}", **found}


def main() -> int:
    """Write the excerpts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--download", action="store_true", help="fetch the wheels with pip")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*command, *BINDINGS.values()], check=True)
        wanted = used()
        for wheel in [*asked.wheels, *sorted(Path(folder).glob("*.whl"))]:
            provider = "aws" if "_aws-" in wheel.name else "google"
            path = SCHEMAS / f"{provider}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(extract(wheel, wanted[provider]), indent=1, sort_keys=True) + "\n", "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
