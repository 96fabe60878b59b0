"""T5 to Longformer in the encoder: a sliding window and, if asked for, a few global tokens.

    python conversion_scripts/convert_t5_to_longformer.py google-t5/t5-small longformer-t5-small-4096
    python conversion_scripts/convert_t5_to_longformer.py my-reader my-long-reader --global-tokens question

The decoder and its cross-attention stay exact: outputs are short. T5 has no position table, so nothing is lengthened and
--max-positions only tells the tokenizer; its relative bias holds at any distance.
Global tokens see the whole text and are seen by all of it. "first" makes the first token a place where everything meets
(T5 has no classification token). "question" does so with everything up to and including the first </s>, which suits
tokenizer(question, context) pairs; a single text has its only </s> at the end, and all of it would be global,
at full cost.
"""

import argparse
import sys

from transformers import AutoConfig

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a T5, mT5 or umT5 checkpoint")
parser.add_argument("out", help="folder to write")
parser.add_argument("--attention-window", type=int, default=512, help="keys per token, half on each side (512)")
parser.add_argument("--global-tokens", choices=("none", "first", "question"), default="none", help="see above")
parser.add_argument("--max-positions", type=int, default=4096, help="longest input, in tokens (default 4096)")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

separator = None
if args.global_tokens == "question":
    separator = AutoConfig.from_pretrained(args.source, trust_remote_code=False).eos_token_id

result = he.convert(
    args.source,
    "longformer",
    attention_window=args.attention_window,
    global_tokens=args.global_tokens,
    separator_token_id=separator,
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
