"""BART to Longformer in the encoder (what transformers calls LED): a sliding window and, if asked for, a global first token.

    python conversion_scripts/convert_bart_to_longformer.py facebook/bart-base longformer-bart-base-4096
    python conversion_scripts/convert_bart_to_longformer.py google/pegasus-xsum long-pegasus --global-tokens first

Also for mBART, PLBart, Blenderbot, Pegasus, Marian and M2M100. The decoder stays exact, with as many positions as it has:
outputs are short. The encoder's table of positions is lengthened by repeating its learned rows, so that inputs up to the old
length keep their positions; sinusoids (Pegasus, Marian, M2M100) go on by their own formula.
A global first token (BART's <s>) sees the whole text and is seen by all of it.
"""

import argparse
import sys

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a checkpoint of BART or of a relative")
parser.add_argument("out", help="folder to write")
parser.add_argument("--attention-window", type=int, default=512, help="keys per token, half on each side (512)")
parser.add_argument("--global-tokens", choices=("none", "first"), default="none", help="see above")
parser.add_argument("--max-positions", type=int, default=4096, help="longest input, in tokens (default 4096)")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

result = he.convert(
    args.source,
    "longformer",
    attention_window=args.attention_window,
    global_tokens=args.global_tokens,
    side="encoder",
    max_positions=args.max_positions,
)
result.save(args.out, overwrite=args.overwrite)

# where every tensor came from; random ones are absent from the source and must be trained
print(result.report)

# how close the saved checkpoint is to its source, on text from Python's documentation
if not args.no_verify:
    fidelity = he.verify(args.out, args.source, offline_texts(), progress=True)
    print(fidelity)
    sys.exit(0 if fidelity.passed else 1)
