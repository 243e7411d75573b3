"""Hypothesis strategies for whatever a layout can hold, built from the layout itself."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lonelypsp import wire


def values(codec: Any, *, text: str | None = None) -> st.SearchStrategy[Any]:
    """Every value that `codec` can carry.

    Args:
        codec: one of `lonelypsp.wire`.
        text: short values over these ASCII characters only, so that values of neighbouring fields
            look alike.
    """
    if isinstance(codec, wire.Uint):
        edges = st.sampled_from([0, 1, codec.maximum])
        return edges if text else edges | st.integers(0, codec.maximum)
    if isinstance(codec, wire.Flag):
        return st.booleans()
    if isinstance(codec, wire.Fixed):
        if text:
            return st.sampled_from([c.encode() * codec.length for c in text])
        return st.binary(min_size=codec.length, max_size=codec.length)
    if isinstance(codec, wire.PrefixedBytes):
        return st.text(text, max_size=3).map(str.encode) if text else st.binary(max_size=40)
    if isinstance(codec, wire.PrefixedText):
        return st.text(text, max_size=3) if text else st.text(max_size=20)
    if isinstance(codec, wire.OptionalText):
        # nothing and the empty text are the same on the wire, and read as nothing
        return values(wire.TEXT16, text=text).map(lambda value: value or None)
    if isinstance(codec, wire.Sorted):
        pairs = st.tuples(values(codec.key, text=text), values(wire.OPTIONAL_TEXT16, text=text))
        return st.lists(pairs, max_size=4, unique_by=lambda pair: pair[0]).map(_ascending)
    raise NotImplementedError(codec)


def messages(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Any instance of a message class."""
    return st.builds(cls, **{name: values(codec) for name, codec in wire.layout(cls).items()})


def _ascending(pairs: list[tuple[Any, Any]]) -> tuple[tuple[Any, Any], ...]:
    return tuple(sorted(pairs, key=lambda p: p[0].encode() if isinstance(p[0], str) else p[0]))
