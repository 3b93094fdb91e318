"""`mmalign data VERB`: look at preference data, import it, make pairs from it.

mmalign data check PATH                 every wrong row of a store or a source; exit code 2 if there is one
mmalign data stats PATH                 counts, ties, gaps, duplicates, what leaks between splits
mmalign data import SOURCE --out STORE  any known format or a folder of pictures into a store
mmalign data pair STORE --out FILE      the pairs that training would see, as JSON lines
mmalign data make RECIPE                a vision-language recipe's store, as its `make` section says
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmalign.cli import Parser, resolve, run_entry

VERBS = {
    "check": "mmalign.data_verbs:check",
    "stats": "mmalign.data_verbs:stats",
    "import": "mmalign.data_verbs:import_",
    "pair": "mmalign.data_verbs:pair",
    "make": "vlm.making:main",  # by name: the core imports no package that stands on it
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the words to the verb that the first one names.

    Raises:
        UserError: a mistake in the data or the command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="mmalign data", description=__doc__)
    parser.add_argument("verb", choices=list(VERBS))
    verb: str = parser.parse_args(words[:1]).verb
    return int(resolve(VERBS[verb])(words[1:]) or 0)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
