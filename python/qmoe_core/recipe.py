"""Recipes: which weights are stored in which format, chosen by which method.

A recipe is a list of rules; the first rule that matches a weight decides. A rule matches by role and by glob on the
run-time name (for example "model.layers.3.mlp.experts.down_proj"). What no rule matches stays as it is. As TOML:

    version = 1

    [[rule]]
    match = "model.layers.0.*"      # glob; default "*"
    format = "keep"

    [[rule]]
    format = "int4"                 # int8, int4, int3, int2, ternary, keep
    group = 128                     # 16, 32, 64, 128, or 0 for the whole row
    zero_point = true
    half_step = false               # true: zero halfway between two codes, for int2 by "gptq"
    method = "rtn"                  # see quantize.METHODS; the default suits the format

    [[rule]]
    role = ["attention", "dense"]   # default ["expert"]
    format = "int8"

Routers, norms, embeddings and the head cannot be named (see roles.py for why).
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import QmoeError
from .formats import IntFormat, TernaryFormat, parse_format
from .quantize import METHODS, Format, MethodSpec, default_method
from .roles import COMPRESSIBLE, ROLES
from .store import io_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1


def _choose(value: Any, allowed: Sequence[str], key: str, code: str) -> str:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise QmoeError(code, f"{key}: '{value}' is not known{hint}", expected=list(allowed), actual=value)
    return value


@dataclass(frozen=True)
class Rule:
    """One rule. `spec` None means keep. Build with `Rule.make`, which checks everything."""

    match: str
    roles: tuple[str, ...]
    spec: MethodSpec | None

    @classmethod
    def make(
        cls,
        *,
        format: str | Format,
        match: str = "*",
        role: str | Sequence[str] = "expert",
        method: str | None = None,
        group: int | None = None,
        zero_point: bool | None = None,
        scale_dtype: str | None = None,
        half_step: bool | None = None,
        levels: str | None = None,
        options: Mapping[str, Any] | None = None,
        key: str = "rule",
    ) -> Rule:
        """Checks and completes one rule; `key` is how errors name it.

        Raises:
            QmoeError: `E_UNKNOWN` (format, method, role, option), `E_VALUE` (a value out of range, or settings that
                contradict each other).
        """
        roles = (role,) if isinstance(role, str) else tuple(role)
        if not roles:
            raise QmoeError("E_VALUE", f"{key}.role: empty")
        for name in roles:
            _choose(name, ROLES, f"{key}.role", "E_UNKNOWN")
            if name not in COMPRESSIBLE:
                raise QmoeError(
                    "E_VALUE", f"{key}.role: '{name}' is never compressed", expected=list(COMPRESSIBLE), actual=name
                )
        if not isinstance(match, str) or not match:
            raise QmoeError("E_VALUE", f"{key}.match: not a glob", actual=match)
        settings = {
            "group": group,
            "zero_point": zero_point,
            "scale_dtype": scale_dtype,
            "half_step": half_step,
            "levels": levels,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        if format == "keep":
            for name in (*given, *(["method"] if method else []), *(["options"] if options else [])):
                raise QmoeError("E_VALUE", f"{key}.{name}: a kept tensor takes no settings")
            return cls(match, roles, None)
        resolved = format if isinstance(format, (IntFormat, TernaryFormat)) else _parse(format, given, method, key)
        if resolved is format and given:
            raise QmoeError(
                "E_VALUE", f"{key}.{next(iter(given))}: already part of the format object", actual=format.name
            )
        method = _choose(method, list(METHODS), f"{key}.method", "E_UNKNOWN") if method else default_method(resolved)
        info = METHODS[method]
        if not isinstance(resolved, info.format):
            fitting = [name for name, other in METHODS.items() if isinstance(resolved, other.format)]
            raise QmoeError(
                "E_VALUE", f"{key}.method: '{method}' does not make '{resolved.name}'", expected=fitting, actual=method
            )
        if info.experts_only and roles != ("expert",):
            raise QmoeError(
                "E_VALUE", f"{key}.role: method '{method}' is for experts only", expected=["expert"], actual=list(roles)
            )
        if info.whole_row and isinstance(resolved, IntFormat) and (resolved.group != 0 or resolved.zero_point):
            raise QmoeError(
                "E_VALUE",
                f"{key}: method '{method}' has one symmetric scale per row",
                expected="group 0, zero_point false",
                actual=resolved.name,
            )
        for name in options or {}:
            _choose(name, sorted(info.options), f"{key}.options", "E_UNKNOWN")
        return cls(match, roles, MethodSpec(method, resolved, dict(options or {})))

    def applies(self, name: str, role: str) -> bool:
        """Whether the rule decides about the run-time weight `name` of this role."""
        return role in self.roles and fnmatchcase(name, self.match)

    def to_dict(self) -> dict[str, Any]:
        """Every setting spelled out, as a TOML rule has it."""
        result: dict[str, Any] = {"match": self.match, "role": list(self.roles)}
        if self.spec is None:
            return {**result, "format": "keep"}
        format = self.spec.format
        if isinstance(format, IntFormat):
            result |= {
                "format": f"int{format.bits}",
                "group": format.group,
                "zero_point": format.zero_point,
                "scale_dtype": format.scale_dtype,
                "half_step": format.half_step,
            }
        else:
            result |= {"format": "ternary", "levels": format.levels}
        return {**result, "method": self.spec.method, "options": dict(self.spec.options)}


def _parse(format: str, given: dict[str, Any], method: str | None, key: str) -> Format:
    """A format name and its settings as an object; errors name the key."""
    if not isinstance(format, str):
        raise QmoeError("E_VALUE", f"{key}.format: not a string", actual=format)
    settings = dict(given)
    if method in METHODS and METHODS[method].whole_row and "-" not in format:
        settings = {"group": 0, "zero_point": False, **settings}
    allowed = {f.name for f in fields(TernaryFormat if format.startswith("ternary") else IntFormat)}
    for name, value in settings.items():
        if name not in allowed:
            raise QmoeError("E_VALUE", f"{key}.{name}: format '{format}' has no such setting", actual=value)
    try:
        return parse_format(format, **settings)
    except QmoeError as error:
        raise QmoeError(
            error.code, f"{key}.format: {error.message}", expected=error.expected, actual=error.actual
        ) from error


_RULE_TYPES: dict[str, tuple[type, ...]] = {
    "match": (str,), "role": (str, list), "format": (str,), "method": (str,), "group": (int,), "zero_point": (bool,),
    "scale_dtype": (str,), "half_step": (bool,), "levels": (str,), "options": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first that matches decides."""

    rules: tuple[Rule, ...] = field(default_factory=tuple)

    @classmethod
    def uniform(
        cls,
        format: str | Format = "int4",
        group: int | None = None,
        method: str | None = None,
        *,
        zero_point: bool | None = None,
        scale_dtype: str | None = None,
        half_step: bool | None = None,
        levels: str | None = None,
        role: str | Sequence[str] = "expert",
        options: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """All weights of the given roles in one format. None takes the format's default (group 128, zero point, float16
        scales, whole steps; pair levels). Raises as `Rule.make`."""
        return cls(
            (
                Rule.make(
                    format=format,
                    role=role,
                    method=method,
                    group=group,
                    zero_point=zero_point,
                    scale_dtype=scale_dtype,
                    half_step=half_step,
                    levels=levels,
                    options=options,
                    key="recipe",
                ),
            )
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from parsed TOML or JSON. Raises `E_VERSION`, `E_UNKNOWN`, `E_VALUE`, naming the key, e.g.
        "rule[2].group"."""
        for key in data:
            _choose(key, ["version", "rule"], "recipe", "E_UNKNOWN")
        version = data.get("version", VERSION)
        if version != VERSION or isinstance(version, bool):
            raise QmoeError(
                "E_VERSION",
                "version: this recipe is for another version of the library",
                expected=VERSION,
                actual=version,
            )
        entries = data.get("rule", [])
        if not isinstance(entries, list) or not entries:
            raise QmoeError("E_VALUE", "rule: a recipe has at least one [[rule]]", actual=entries)
        rules = []
        for index, entry in enumerate(entries):
            key = f"rule[{index}]"
            if not isinstance(entry, dict):
                raise QmoeError("E_VALUE", f"{key}: not a table", actual=entry)
            for name, value in entry.items():
                _choose(name, list(_RULE_TYPES), key, "E_UNKNOWN")
                types = _RULE_TYPES[name]
                if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                    raise QmoeError(
                        "E_VALUE", f"{key}.{name}: wrong type", expected=[t.__name__ for t in types], actual=value
                    )
            if "format" not in entry:
                raise QmoeError("E_VALUE", f"{key}.format: required")
            rules.append(Rule.make(**entry, key=key))
        return cls(tuple(rules))

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a TOML file. Raises `E_MISSING`, `E_IO`, `E_CORRUPT` (not TOML), or as `from_dict`, with the file's
        name."""
        path = Path(path)
        if not path.exists():
            raise QmoeError("E_MISSING", "no such recipe", file=path)
        with io_errors(path):
            text = path.read_bytes()
        try:
            return cls.from_dict(tomllib.loads(text.decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise QmoeError("E_CORRUPT", f"not TOML: {error}", file=path) from error
        except QmoeError as error:
            raise error.locate(file=path) from None

    def to_dict(self) -> dict[str, Any]:
        """Every setting spelled out: `from_dict` of it is this recipe."""
        return {"version": VERSION, "rule": [rule.to_dict() for rule in self.rules]}

    def to_toml(self) -> str:
        """TOML text that `from_toml` reads back as this recipe."""
        lines = [f"version = {VERSION}"]
        for rule in self.rules:
            lines += ["", "[[rule]]", *(f"{key} = {_toml(value)}" for key, value in rule.to_dict().items())]
        return "\n".join(lines) + "\n"

    @property
    def calibrated(self) -> bool:
        """Whether a rule names a calibrated method, so that `compress` needs calibration, and refuses it where not."""
        return any(rule.spec is not None and METHODS[rule.spec.method].needs_statistics for rule in self.rules)

    def choose(self, name: str, role: str) -> tuple[int, MethodSpec] | None:
        """(number of the deciding rule, what to do) for a run-time weight, or None to keep it."""
        for index, rule in enumerate(self.rules):
            if rule.applies(name, role):
                return None if rule.spec is None else (index, rule.spec)
        return None

    def check_used(self, weights: Mapping[str, str]) -> None:
        """`E_VALUE` for a rule that matches none of the weights (run-time name -> role): most likely a typing error."""
        for index, rule in enumerate(self.rules):
            if not any(rule.applies(name, role) for name, role in weights.items()):
                raise QmoeError(
                    "E_VALUE",
                    f"rule[{index}]: matches no weight of this model",
                    expected=f"one of {len(weights)} weights, e.g. {next(iter(weights), None)}",
                    actual=f"match '{rule.match}', role {list(rule.roles)}",
                )


def _toml(value: Any) -> str:
    """A TOML literal for the few types that a rule has."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if c in '"\\' or ord(c) < 32 or ord(c) == 127 else c for c in value)
        return f'"{escaped}"'
    return repr(value)
