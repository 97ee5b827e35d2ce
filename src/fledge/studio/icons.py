"""Icons, drawn with one stroke width so that they belong together."""

from __future__ import annotations

_PATHS = {
    "feather": '<path d="M20.2 12.2a6 6 0 0 0-8.5-8.4L5 10.5V19h8.5z"/><path d="M16 8 2 22M17.5 15H9"/>',
    "new": '<path d="M12 5v14M5 12h14"/>',
    "sliders": '<path d="M4 7h9M19 7h1M4 17h1M11 17h9"/><circle cx="16" cy="7" r="2.6"/><circle cx="8" cy="17" r="2.6"/>',
    "moon": '<path d="M20.5 13.5A8.5 8.5 0 1 1 10.5 3.5a6.8 6.8 0 0 0 10 10z"/>',
    "send": '<path d="M12 19V5M5.5 11.5 12 5l6.5 6.5"/>',
    "stop": '<rect x="6.5" y="6.5" width="11" height="11" rx="2" fill="currentColor" stroke="none"/>',
    "again": '<path d="M20 11a8 8 0 1 0-2.3 6.3"/><path d="M20.5 5v6h-6"/>',
    "copy": '<rect x="9" y="9" width="11" height="11" rx="2.5"/><path d="M5 15a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2h8a2 2 0 0 1 2 2"/>',
}


def icon(name: str) -> str:
    """An SVG in the colour of the text around it."""
    return (
        '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" '
        f'stroke-linejoin="round" aria-hidden="true">{_PATHS[name]}</svg>'
    )


def favicon() -> str:
    """The feather, for the browser's tab."""
    return (
        icon("feather").replace("currentColor", "#2c6e5d").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    )
