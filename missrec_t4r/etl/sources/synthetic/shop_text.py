"""Content of the synthetic shop: products and words of each interest, colours and pattern of each style."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Interest(NamedTuple):
    """One latent interest: department, products and words."""

    department: str
    products: tuple[str, ...]
    """Four."""
    words: tuple[str, ...]


class Style(NamedTuple):
    """One style: colours (red, green, blue) and a pattern; visible in images, never mentioned in texts."""

    background: tuple[int, int, int]
    accent: tuple[int, int, int]
    pattern: str


_INTERESTS = """
Outdoor
  tent, sleeping bag, camp stove, lantern: trail alpine wilderness shelter basecamp ridge summit moss
  rope, harness, carabiner, chalk bag: crag boulder granite belay pitch overhang grip vertical
  fishing rod, reel, lure set, tackle box: river trout angler cast stream lake dawn bait
Kitchen
  espresso machine, grinder, tamper, milk jug: roast crema barista arabica brew morning bean aroma
  bread oven, proofing basket, dough scraper, loaf knife: sourdough crust flour rye baker knead hearth starter
  wok, steamer, cleaver, rice bowl: ginger sizzling noodle stirfry lotus sesame dumpling spice
Music
  electric guitar, amplifier, effects pedal, guitar strap: riff fret stage distortion solo chord blues string
  synthesizer, audio interface, studio monitor, patch cable: oscillator analog waveform filter sequencer bass \
    modular tone
  drum kit, cymbal, drum sticks, practice pad: groove snare tempo beat percussion rhythm hihat fill
Garden
  raised bed, seed tray, watering can, pruning shears: tomato herb harvest compost soil sprout greenhouse vegetable
  bonsai pot, root rake, wiring kit, display stand: juniper zen miniature maple patience branch temple ceramic
  bird feeder, nest box, binoculars, field guide: finch robin songbird feather hedge migration perch sparrow
Fitness
  yoga mat, yoga block, meditation cushion, incense holder: breath calm lotus balance mindful stretch flow serenity
  barbell, weight plates, squat rack, lifting belt: deadlift iron strength press gym muscle power heavy
  running shoes, hydration vest, headlamp, recovery roller: marathon stride pace sprint kilometre tempo track finish
Crafts
  knitting needles, merino yarn, stitch markers, blocking mat: wool cable sweater purl cosy skein pattern shawl
  watercolour set, sketchbook, brush roll, table easel: pigment wash landscape canvas gouache palette portrait paper
  wood chisel, hand plane, bench vise, honing stone: oak dovetail timber walnut joinery grain workshop shaving
Gaming
  board game, card sleeves, dice tower, game organizer: dungeon strategy meeple quest campaign hero tabletop rulebook
  mechanical keyboard, gaming mouse, headset, desk mat: switch latency esports pixel keycap polling arena reflex
  retro console, arcade stick, cartridge case, scanline screen: eightbit chiptune joystick arcade nostalgia sprite \
    cabinet coin
Travel
  carry-on suitcase, packing cubes, travel pillow, luggage tag: flight boarding terminal passport departure cabin \
    airport itinerary
  touring bicycle, pannier, bike pump, handlebar bag: gravel pedal saddle route cycling gear chain tailwind
  mirrorless camera, prime lens, tripod, camera backpack: aperture shutter bokeh exposure golden landscape focus \
    viewfinder
"""
"""Departments, and below each its interests: four products, and words."""


def _interests() -> Iterator[Interest]:
    department = ""
    for line in _INTERESTS.strip().splitlines():
        if not line.startswith(" "):
            department = line
            continue
        products, words = line.strip().split(": ")
        yield Interest(department, tuple(products.split(", ")), tuple(words.split()))


INTERESTS = tuple(_interests())
STYLES = (
    Style((238, 232, 222), (120, 96, 74), "plain"),
    Style((24, 26, 34), (0, 220, 200), "grid"),
    Style((250, 196, 72), (200, 60, 30), "stripes"),
    Style((214, 232, 214), (56, 110, 64), "waves"),
    Style((250, 214, 226), (196, 70, 130), "dots"),
    Style((200, 218, 240), (30, 70, 160), "rings"),
)

FILLERS = tuple(
    "quality everyday durable compact classic premium lightweight gift practical reliable smart popular"
    " favourite perfect easy new original handy series edition set value home trusted choice simple".split()
)
BRANDS = tuple("Norvik Ambra Kestrel Lumo Takumi Orbis Fjell Sorella Quartz Bramble Helio Rivet".split())
EVENT_TYPES = ("view", "cart", "purchase")
