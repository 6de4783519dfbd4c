"""Makes Matplotlib's SVG the page's own: its fonts, names for screen readers, values under the pointer, few bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

UNSEEN = ("metadata", "style")
FONT_PX = "10px"
"""Of most text, and so of the page's style sheet."""
GEOMETRY = ("d", "x", "y", "transform", "width", "height")


def own(svg: str, name: str, title: str, description: str, values: Mapping[str, Sequence[str]]) -> str:
    """The `<svg>` element alone, for a page of HTML, with `name` before every id.

    `values` are, for the id of a group, what each of its markers says under the pointer; nothing is said where only
    some of them have a marker.
    """
    root = ElementTree.fromstring(svg[svg.index("<svg") :])  # noqa: S314 (Matplotlib wrote it a moment ago)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    for group in root.iter("g"):
        markers, words = list(group.iter("use")), values.get(group.get("id", ""), ())
        for marker, each in zip(markers, words, strict=True) if len(markers) == len(words) else ():
            ElementTree.SubElement(marker, "title").text = each
    _name(root, name)
    for element in root.iter():
        _shorten(element)
    (root,) = _kept(root)
    told = [Element("title", {"id": f"{name}-title"}), Element("desc", {"id": f"{name}-desc"})]
    told[0].text, told[1].text = title, description
    root[:] = [*told, *root]
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _name(root: Element, name: str) -> None:
    """Short ids for what is referred to; none for the rest."""
    texts = [value for element in root.iter() for value in element.attrib.values()]
    referred = dict.fromkeys(each for text in texts for each in re.findall(r"#([\w.-]+)\)?$", text))
    short = {each: f"{name}-{place}" for place, each in enumerate(referred)}
    for element in root.iter():
        own_id = element.attrib.pop("id", None)
        if own_id in short:
            element.set("id", short[own_id])
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, re.sub(r"#([\w.-]+)", lambda found: f"#{short[found[1]]}", element.attrib[key]))


def _shorten(element: Element) -> None:
    """Coordinates to a tenth of a pixel, small ones to a hundredth; of the style what the page does not say itself."""
    for key in GEOMETRY:
        if key in element.attrib:
            rounded = re.sub(r"-?\d+\.\d+", lambda found: _rounded(float(found[0])), element.attrib[key])
            element.set(key, re.sub(r"\s*([A-Za-z])\s*", r"\1", " ".join(rounded.split())))
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del element.attrib["transform"]
    style = _style(element)
    style.pop("font-family", None)
    if "font" in style:  # newer Matplotlib: size and family in one
        style["font-size"] = style.pop("font").split()[0]
    if style.get("font-size") == FONT_PX:
        del style["font-size"]
    element.attrib.pop("style", None)
    if style:
        element.set("style", ";".join(f"{key}:{value}" for key, value in style.items()))


def _rounded(value: float) -> str:
    text = f"{value:.{1 if abs(value) >= 10 else 2}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _style(element: Element) -> dict[str, str]:
    pairs = (each.partition(":") for each in element.get("style", "").split(";"))
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip()}


def _kept(element: Element) -> list[Element]:
    """The element with what is left of its children; only these where it groups and says nothing; nothing of unseen."""
    if element.tag in UNSEEN or _style(element).get("opacity") == "0":
        return []
    children = [kept for child in element for kept in _kept(child)]
    element[:] = children
    element.tail = None
    if element.tag not in ("text", "title"):
        element.text = None
    if element.tag in ("g", "defs") and not children:
        return []
    if element.tag == "g" and {child.tag for child in children} == {"use"}:
        _say_once(element)
    return children if element.tag == "g" and not element.attrib else [element]


def _say_once(group: Element) -> None:
    """What the style of every marker says, their group says."""
    styles = {child.get("style") for child in group}
    if len(styles) == 1 and None not in styles and "style" not in group.attrib:
        group.set("style", styles.pop() or "")
        for child in group:
            del child.attrib["style"]
