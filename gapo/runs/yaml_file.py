"""The YAML of a configuration, checked before it is parsed.

A file that would hang the parser, exhaust its stack, or be read only in part is refused with a message that names it.
"""

from __future__ import annotations

from pathlib import Path

import yaml

_DEEPEST = 20  # lists and mappings within each other; configurations have two


def require_plain_yaml(path: Path) -> None:
    """Raise ValueError, naming the file, unless it is YAML of `key: value` lines, not nested deeply, in UTF-8.

    Aliases are refused, since a few of them (`*name` of `*name`) expand to billions of values. So is a key that stands
    twice, since one of its values would be dropped silently, and a configuration that names another.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    try:
        reason = _harm(text) or _not_read(yaml.compose(text, yaml.SafeLoader))
        if reason is None:
            yaml.safe_load(text)  # raises for a tag of Python's, and for a number of too many digits
    except (yaml.YAMLError, ValueError) as error:
        reason = f"is not accepted as YAML: {error}"
    if reason is not None:
        raise ValueError(f"{path} {reason}")


def _harm(text: str) -> str | None:
    """The reason why parsing would take long or exhaust the stack. Reading the events one by one does neither."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            return f"has a YAML alias, *{event.anchor}, which is not accepted: write the value out"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            return f"is nested more than {_DEEPEST} levels deep"
    return None


def _not_read(root: yaml.Node | None) -> str | None:
    """The reason why a part of the file would be ignored, or another file be read."""
    if not isinstance(root, yaml.MappingNode):
        return "holds no `key: value` lines"
    keys = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        return f"has the key {twice!r} twice"
    return "names another configuration, which is not read: put its lines here" if "config" in keys else None
