"""GPT-2 to sliding-window attention: each token sees the last w tokens, itself included.

    python conversion_scripts/convert_gpt2_to_local.py openai-community/gpt2 local-gpt2-4096
    python conversion_scripts/convert_gpt2_to_local.py my-gpt2 my-hybrid --attention-window 256 --layers 0 1 2 3 4 5

--layers keeps full attention in the layers that it does not name. No tensor is added, generation works with the default
cache, and inputs of up to w tokens are exact.
"""

import argparse
import sys

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a GPT-2 checkpoint, with any head")
parser.add_argument("out", help="folder to write")
parser.add_argument("--attention-window", type=int, default=512, help="w, tokens that a token sees (512)")
parser.add_argument("--layers", type=int, nargs="+", default=None, help="layers to convert, from 0 (default: all)")
parser.add_argument("--max-positions", type=int, default=4096, help="longest input, in tokens (default 4096)")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

result = he.convert(
    args.source,
    "local",
    attention_window=args.attention_window,
    layers=args.layers,
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
