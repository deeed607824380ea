"""Content of the synthetic shop: products and words of each interest, colours and pattern of each style."""

from __future__ import annotations

from typing import NamedTuple


class Interest(NamedTuple):
    """One latent interest: department, products and words."""

    department: str
    products: tuple[str, str, str, str]
    """In the order in which users with this interest buy them."""
    words: tuple[str, ...]


class Style(NamedTuple):
    """One style: colours (red, green, blue) and a pattern; visible in images, never mentioned in texts."""

    background: tuple[int, int, int]
    accent: tuple[int, int, int]
    pattern: str


def _interest(department: str, products: str, words: str) -> Interest:
    first, second, third, fourth = products.split(", ")
    return Interest(department, (first, second, third, fourth), tuple(words.split()))


INTERESTS = (
    _interest(
        "Outdoor",
        "tent, sleeping bag, camp stove, lantern",
        "trail alpine wilderness shelter basecamp ridge summit moss",
    ),
    _interest(
        "Outdoor", "rope, harness, carabiner, chalk bag", "crag boulder granite belay pitch overhang grip vertical"
    ),
    _interest("Outdoor", "fishing rod, reel, lure set, tackle box", "river trout angler cast stream lake dawn bait"),
    _interest(
        "Kitchen", "espresso machine, grinder, tamper, milk jug", "roast crema barista arabica brew morning bean aroma"
    ),
    _interest(
        "Kitchen",
        "bread oven, proofing basket, dough scraper, loaf knife",
        "sourdough crust flour rye baker knead hearth starter",
    ),
    _interest(
        "Kitchen", "wok, steamer, cleaver, rice bowl", "ginger sizzling noodle stirfry lotus sesame dumpling spice"
    ),
    _interest(
        "Music",
        "electric guitar, amplifier, effects pedal, guitar strap",
        "riff fret stage distortion solo chord blues string",
    ),
    _interest(
        "Music",
        "synthesizer, audio interface, studio monitor, patch cable",
        "oscillator analog waveform filter sequencer bass modular tone",
    ),
    _interest(
        "Music", "drum kit, cymbal, drum sticks, practice pad", "groove snare tempo beat percussion rhythm hihat fill"
    ),
    _interest(
        "Garden",
        "raised bed, seed tray, watering can, pruning shears",
        "tomato herb harvest compost soil sprout greenhouse vegetable",
    ),
    _interest(
        "Garden",
        "bonsai pot, root rake, wiring kit, display stand",
        "juniper zen miniature maple patience branch temple ceramic",
    ),
    _interest(
        "Garden",
        "bird feeder, nest box, binoculars, field guide",
        "finch robin songbird feather hedge migration perch sparrow",
    ),
    _interest(
        "Fitness",
        "yoga mat, yoga block, meditation cushion, incense holder",
        "breath calm lotus balance mindful stretch flow serenity",
    ),
    _interest(
        "Fitness",
        "barbell, weight plates, squat rack, lifting belt",
        "deadlift iron strength press gym muscle power heavy",
    ),
    _interest(
        "Fitness",
        "running shoes, hydration vest, headlamp, recovery roller",
        "marathon stride pace sprint kilometre tempo track finish",
    ),
    _interest(
        "Crafts",
        "knitting needles, merino yarn, stitch markers, blocking mat",
        "wool cable sweater purl cosy skein pattern shawl",
    ),
    _interest(
        "Crafts",
        "watercolour set, sketchbook, brush roll, table easel",
        "pigment wash landscape canvas gouache palette portrait paper",
    ),
    _interest(
        "Crafts",
        "wood chisel, hand plane, bench vise, honing stone",
        "oak dovetail timber walnut joinery grain workshop shaving",
    ),
    _interest(
        "Gaming",
        "board game, card sleeves, dice tower, game organizer",
        "dungeon strategy meeple quest campaign hero tabletop rulebook",
    ),
    _interest(
        "Gaming",
        "mechanical keyboard, gaming mouse, headset, desk mat",
        "switch latency esports pixel keycap polling arena reflex",
    ),
    _interest(
        "Gaming",
        "retro console, arcade stick, cartridge case, scanline screen",
        "eightbit chiptune joystick arcade nostalgia sprite cabinet coin",
    ),
    _interest(
        "Travel",
        "carry-on suitcase, packing cubes, travel pillow, luggage tag",
        "flight boarding terminal passport departure cabin airport itinerary",
    ),
    _interest(
        "Travel",
        "touring bicycle, pannier, bike pump, handlebar bag",
        "gravel pedal saddle route cycling gear chain tailwind",
    ),
    _interest(
        "Travel",
        "mirrorless camera, prime lens, tripod, camera backpack",
        "aperture shutter bokeh exposure golden landscape focus viewfinder",
    ),
)

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
