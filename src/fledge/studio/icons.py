"""Icons, drawn with one stroke width so that they belong together."""

from __future__ import annotations

_PATHS = {
    "feather": "M20.2 12.2a6 6 0 0 0-8.5-8.4L5 10.5V19h8.5zM16 8 2 22M17.5 15H9",
    "new": "M12 5v14M5 12h14",
    "sliders": "M4 7h9.4M18.6 7H20M4 17h1.4M10.6 17H20M13.4 7a2.6 2.6 0 1 0 5.2 0 2.6 2.6 0 1 0-5.2 0"
    "M5.4 17a2.6 2.6 0 1 0 5.2 0 2.6 2.6 0 1 0-5.2 0",
    "moon": "M20.5 13.5A8.5 8.5 0 1 1 10.5 3.5a6.8 6.8 0 0 0 10 10z",
    "send": "M12 19V5M5.5 11.5 12 5l6.5 6.5",
    "stop": "M7 7h10v10H7z",
    "again": "M20 11a8 8 0 1 0-2.3 6.3M20.5 5v6h-6",
    "copy": "M11.5 9h6A2.5 2.5 0 0 1 20 11.5v6a2.5 2.5 0 0 1-2.5 2.5h-6A2.5 2.5 0 0 1 9 17.5v-6A2.5 2.5 0 0 1 11.5 9z"
    "M5 15a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2h8a2 2 0 0 1 2 2",
}


def icon(name: str) -> str:
    """An SVG in the colour of the text around it."""
    fill = "currentColor" if name == "stop" else "none"
    return (
        f'<svg viewBox="0 0 24 24" fill="{fill}" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" '
        f'stroke-linejoin="round" aria-hidden="true"><path d="{_PATHS[name]}"/></svg>'
    )


def favicon() -> str:
    """The feather, for the browser's tab."""
    return (
        icon("feather").replace("currentColor", "#2c6e5d").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    )
