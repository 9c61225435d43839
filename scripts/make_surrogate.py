#!/usr/bin/env python3
"""Make a model of real size from a small trained one without changing its function.

Every hidden channel, attention head, key/value head and feed-forward unit is copied k times, and the
columns of each projection are divided among the copies, so the wide layers compute copies of what the
small ones compute. Identity layers, whose output projections are zero, add depth. Extra feed-forward units
that lead nowhere and extra vocabulary rows that never win add the sizes that no multiple reaches.
Such a surrogate streams and offloads like a model of its size and writes what the small model writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safetensors import SafetensorError
from surrogate.maker import Wanted, make_surrogate
from surrogate.small_model import SurrogateError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("small", type=Path, metavar="SMALL", help="folder of the small model")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--hidden", type=int, required=True, help="hidden size, a multiple of the small one")
    parser.add_argument("--layers", type=int, help="layers in all (default: as many as the small model)")
    parser.add_argument("--feed-forward", type=int, help="feed-forward units (default: in proportion)")
    parser.add_argument("--vocab", type=int, help="tokens in all (default: as many as the small model)")
    parser.add_argument("--noise", type=float, default=0.0, help="relative noise on the copied matrices")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the identity layers")
    parser.add_argument("--shard-gb", type=float, default=1.0, help="largest weight file (default: 1 GB)")
    parser.add_argument("--force", action="store_true", help="write over another surrogate in OUT")
    options = vars(parser.parse_args(arguments))
    small, out, force = (options.pop(name) for name in ("small", "out", "force"))
    try:
        make_surrogate(small, out, Wanted(**options), force=force)
    except (SafetensorError, SurrogateError, OSError, KeyboardInterrupt) as error:
        print(f"make_surrogate: {str(error) or 'interrupted'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
