"""Draw folded-layout.svg: 8 ranks, once as attention sees them and once as experts do.

    python docs/draw_layout.py

Everything drawn is read from the Layout; only the standard library and fivefold-parallel-core are
needed. The picture follows the reader's light or dark colour scheme.
"""

from pathlib import Path

from fivefold.parallel_core.layout import Layout

LAYOUT = Layout(8, tp=2, pp=2, ep=4)
COOL = ("#2563eb", "#0e7490")
WARM = ("#c2410c", "#a16207", "#be185d", "#86198f")
TILE, HALF, GAP, PAD, STAGE_GAP = 90, 62, 12, 18, 50
LEFT, TOP, MARGIN = 172, 138, 24
STAGE_WIDTH = 4 * TILE + 3 * GAP + 2 * PAD
STAGE_TOP, STAGE_BOTTOM = MARGIN, TOP + 2 * HALF + 54
WIDTH = LEFT + 2 * STAGE_WIDTH + STAGE_GAP + MARGIN
HEIGHT = STAGE_BOTTOM + 70

LIGHT_RULES = """
.card{fill:#ffffff;stroke:#d0d7de} .stage{fill:#f3f5f8} .ink{fill:#1f2328} .soft{fill:#59636e}
.line{stroke:#8c959f} .head{fill:#8c959f} .cool{fill:#1d4ed8} .warm{fill:#b4430c}
.badge{fill:#ffffff} .arc0{stroke:#2563eb} .arc1{stroke:#0e7490}
"""
DARK_RULES = """
.card{fill:#0d1117;stroke:#30363d} .stage{fill:#171d26} .ink{fill:#f0f6fc} .soft{fill:#9aa4af}
.line{stroke:#7d8590} .head{fill:#7d8590} .cool{fill:#7cb0ff} .warm{fill:#ffa366}
.badge{fill:#0d1117} .arc0{stroke:#60a5fa} .arc1{stroke:#2bb8cf}
"""
STYLE = f"""<style>
text{{font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}}
.line{{fill:none;stroke-width:1.8}} .arc{{fill:none;stroke-width:2.4}} .on{{fill:#ffffff}}
{LIGHT_RULES.strip()}
@media (prefers-color-scheme:dark){{
{DARK_RULES.strip()}
}}
</style>"""


def left_of(rank: int) -> float:
    """Left edge of a rank's tile."""
    stage = LAYOUT.coordinates(rank)["pp"]
    place = LAYOUT.group_of("tp-dp", rank).index(rank)
    return LEFT + stage * (STAGE_WIDTH + STAGE_GAP) + PAD + place * (TILE + GAP)


def text(x: float, y: float, words: str, kind: str, size: int = 14, **more: object) -> str:
    """One line of text; ``more`` are attributes, with _ for -."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" font-size="{size}"{extra}>{words}</text>'


def middle(x: float, y: float, words: str, kind: str, size: int = 14, weight: int = 400) -> str:
    """Text centred at x."""
    return text(x, y, words, kind, size, text_anchor="middle", font_weight=weight)


def tile(rank: int) -> list[str]:
    """A rank: above what it holds of attention, below what it holds of the experts."""
    x, at = left_of(rank), LAYOUT.coordinates(rank)
    r, centre, split, end = 12, x + TILE / 2, TOP + HALF, TOP + 2 * HALF
    return [
        f'<path d="M{x} {split}V{TOP + r}a{r} {r} 0 0 1 {r} {-r}h{TILE - 2 * r}'
        f'a{r} {r} 0 0 1 {r} {r}V{split}z" fill="{COOL[at["tp"]]}"/>',
        f'<path d="M{x} {split}V{end - r}a{r} {r} 0 0 0 {r} {r}h{TILE - 2 * r}'
        f'a{r} {r} 0 0 0 {r} {-r}V{split}z" fill="{WARM[at["ep"]]}"/>',
        middle(centre, TOP + 27, f"dp {at['dp']} · tp {at['tp']}", "on", 13, 600),
        middle(centre, end - 17, f"ep {at['ep']}", "on", 14, 600),
        f'<circle cx="{centre}" cy="{split}" r="19" class="badge"/>',
        middle(centre, split + 7, str(rank), "ink", 20, 700),
    ]


def bracket(group: list[int], y: float, rise: float, words: str) -> list[str]:
    """A bracket over (rise < 0) or under a group of neighbours."""
    left, right = left_of(group[0]) + 6, left_of(group[-1]) + TILE - 6
    return [
        f'<path d="M{left} {y}v{rise}H{right}v{-rise}" class="line" stroke-linejoin="round"/>',
        middle((left + right) / 2, y + rise + (-6 if rise < 0 else 20), words, "ink", 14, 600),
    ]


def arc(group: list[int]) -> list[str]:
    """A curve between the two data-parallel replicas of the same parameters."""
    first, last = (left_of(rank) + TILE / 2 for rank in group)
    at = LAYOUT.coordinates(group[0])
    y, top = TOP - 40, TOP - 84
    curve = f"M{first} {y}C{first} {top} {last} {top} {last} {y}"
    return [
        f'<path d="{curve}" class="arc arc{at["tp"]}"/>',
        middle((first + last) / 2, top + 4, "dp", "ink", 14, 600),
    ]


def stage(index: int) -> list[str]:
    """The panel of one pipeline stage."""
    x = LEFT + index * (STAGE_WIDTH + STAGE_GAP)
    return [
        f'<rect x="{x}" y="{STAGE_TOP}" width="{STAGE_WIDTH}"'
        f' height="{STAGE_BOTTOM - STAGE_TOP}" rx="16" class="stage"/>',
        text(x + PAD, STAGE_TOP + 26, f"pipeline stage {index}", "soft", 14),
    ]


def view_label(y: float, name: str, kind: str, axes: tuple[str, ...]) -> list[str]:
    """Name and degrees of a view, left of the tiles."""
    sizes = " × ".join(f"{axis} {LAYOUT.axis_size(axis)}" for axis in axes)
    return [
        text(26, y, name, kind, 19, font_weight=700),
        text(26, y + 21, sizes, "soft", 13),
    ]


def draw() -> str:
    """The whole picture."""
    folded = " × ".join(f"{axis} {size}" for axis, size in (LAYOUT.folding("ep") or {}).items())
    parts = [f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="18" class="card"/>']
    parts += [line for index in range(LAYOUT.pp) for line in stage(index)]
    parts += view_label(TOP + 24, "Attention", "cool", ("pp", "dp", "tp"))
    parts += view_label(TOP + HALF + 30, "Experts", "warm", ("pp", "ep", "etp"))
    for group in LAYOUT.groups("dp"):
        parts += arc(group)
    for group in LAYOUT.groups("tp"):
        parts += bracket(group, TOP - 6, -10, "tp")
    for group in LAYOUT.groups("ep"):
        parts += bracket(group, TOP + 2 * HALF + 6, 10, f"ep {len(group)}, folded over {folded}")
    for rank in range(LAYOUT.world_size):
        parts += tile(rank)
    x, y = LEFT + STAGE_WIDTH, TOP + HALF
    parts += [
        f'<path d="M{x + 6} {y}H{x + STAGE_GAP - 14}" class="line"/>',
        f'<path d="M{x + STAGE_GAP - 6} {y}l-10 -6v12z" class="head"/>',
        middle(x + STAGE_GAP / 2, y - 12, "pp", "ink", 14, 600),
    ]
    pipelines = ", ".join("–".join(map(str, group)) for group in LAYOUT.groups("pp"))
    parts.append(text(LEFT, HEIGHT - 42, "Same colour in a stage: same parameters.", "soft", 14))
    parts.append(
        text(LEFT, HEIGHT - 20, f"Pipelines {pipelines} are the same in both views.", "soft", 14)
    )
    title = "Eight ranks in two views: attention over pp, dp and tp; experts over pp and ep"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' width="{WIDTH}" height="{HEIGHT}"><title>{title}</title>'
    )
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("folded-layout.svg").write_text(draw(), encoding="utf-8")
