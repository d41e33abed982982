"""Colours by role, on light and on dark ground."""

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1f24",
    "faint": "#646c76",
    "grid": "#e3e6ea",
    "shade": "#eef1f5",  # every other attempt
    "train": "#2f6fb5",
    "val": "#c8650e",
    "test": "#2c8453",
    "fault": "#c4302b",
    "right": "#2c8453",
    "training": "#7fb08f",
    "replaying": "#e2b04a",
    "detecting": "#c4302b",
    "restarting": "#e58a6f",
    "restoring": "#9886cf",
    "starting": "#9fb0c3",
    "ending": "#c3c9d1",
    "save": "#2f6fb5",
}
DARK = {
    "paper": "#14171b",
    "panel": "#1c2026",
    "ink": "#e6e9ed",
    "faint": "#98a1ac",
    "grid": "#2d333b",
    "shade": "#1f242b",
    "train": "#6aa9ea",
    "val": "#f0984b",
    "test": "#5fbd88",
    "fault": "#f0685f",
    "right": "#5fbd88",
    "training": "#4d8562",
    "replaying": "#c9962f",
    "detecting": "#f0685f",
    "restarting": "#c86f55",
    "restoring": "#8575bd",
    "starting": "#62748a",
    "ending": "#505862",
    "save": "#6aa9ea",
}


def css(colours: dict[str, str]) -> str:
    """As custom properties."""
    return "".join(f"--{role}:{colour};" for role, colour in colours.items())


def css_classes() -> str:
    """What the roles of SVG shapes look like: f- fills, s- is a line."""
    fills = "".join(f".f-{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role})}}" for role in LIGHT)
    return f"{fills}.f-none{{fill:transparent}}svg polyline{{fill:none;stroke-linejoin:round}}"
