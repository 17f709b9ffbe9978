#!/usr/bin/env python3
"""Print text that a trained recurrent network makes up:

python scripts/sample.py outputs/default/belu-rnn-ptb-he-lr0.001-seed0-... --prime "the " --length 500 --temperature 0.8
"""

import argparse
import sys
from pathlib import Path

from bipolar.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--prime", default="the ", help="what the text begins with")
    parser.add_argument("--length", type=int, default=500, help="characters that are made up")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier characters; 0: the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from bipolar import sampling  # imports torch, which --help can do without

    try:
        model, vocabulary = sampling.load(args.folder)
        made = sampling.sample(model, vocabulary, args.prime, args.length, args.temperature, args.seed)
        first = next(made, "")  # what is wrong shows before anything is printed
        print(args.prime, first, sep="", end="", flush=True)
        for character in made:
            print(character, end="", flush=True)
        print()
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
