"""English words that rules about answers know: colours, numbers, relations, and what is no object."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""From two on: what is one may be "a"."""
LEADS = _words("a an the one his her its their another several some many")
DENIALS = _words("no not without neither nor never nothing none cannot")
COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray"),
    *("silver", "golden", "gold", "beige", "tan", "turquoise", "teal", "maroon", "violet"),
)
SAME_COLOURS = (
    _words("grey gray silver white"),
    _words("grey gray black"),
    _words("gold golden yellow tan beige orange"),
    _words("red maroon orange pink"),
    _words("brown tan beige maroon orange"),
    _words("purple violet pink maroon"),
    _words("blue turquoise teal green"),
    _words("blue purple violet"),
    _words("white beige"),
)
"""Colours that one person may call by the name of another: changing one into the other may still be true."""
RELATIONS = {
    "left of": ("right of",),
    "right of": ("left of",),
    "left side of": ("right side of",),
    "right side of": ("left side of",),
    "above": ("below",),
    "below": ("above",),
    "in front of": ("behind",),
    "behind": ("in front of",),
    "on top of": ("underneath",),
    "under": ("on top of",),
    "underneath": ("on top of",),
    "beneath": ("on top of",),
    "inside": ("outside",),
    "outside": ("inside",),
    "next to": ("far away from",),
    "beside": ("far away from",),
    "close to": ("far away from",),
}
"""Relation -> those that cannot hold together with it."""
ADJECTIVES = _words(
    """
    big small large little tiny huge tall short long wide narrow thick thin old young new modern vintage antique wooden
    metal metallic plastic stone brick concrete leather paper ceramic round square rectangular oval flat open closed
    empty full clean dirty wet dry dark light bright colorful colourful busy crowded quiet calm beautiful nice cute
    happy sad different various other single same similar own main entire whole few striped decorative fresh hot cold
    parked standing sitting wearing
    """
)
NO_OBJECTS = _words(
    """
    image picture photo photograph scene background foreground view setting area side sides left right middle center
    centre top bottom front back edge corner end part piece group pair set row line variety number couple lot kind type
    way time day moment case fact ground distance sense atmosphere presence addition total color colour it they he she
    this that these those there here which who what where is are was were be been has have had do does and or but of in
    on at by for to from with near next as into onto over under above below behind up down out off very more most also
    while all both each every some any first second third last
    """
)
SAME_OBJECTS = (
    _words("person people man men woman women boy girl child kid lady guy adult human individual player"),
    _words("car vehicle truck van bus automobile taxi suv"),
    _words("bike bicycle motorcycle motorbike"),
    _words("couch sofa loveseat"),
    _words("table desk counter"),
    _words("tv television screen monitor"),
    _words("plane airplane aircraft jet"),
    _words("cup mug glass"),
    _words("plate dish bowl"),
    _words("building house"),
    _words("road street"),
    _words("food meal"),
    _words("boat ship"),
)
"""Nouns that may name the same thing."""
PLURALS = {
    **{"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese"},
    **{"foot": "feet", "tooth": "teeth", "sheep": "sheep", "knife": "knives", "loaf": "loaves", "leaf": "leaves"},
    **{"shelf": "shelves", "wolf": "wolves", "calf": "calves", "scarf": "scarves"},
}
