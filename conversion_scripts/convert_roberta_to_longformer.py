"""RoBERTa to Longformer: a sliding window and, if asked for, a few global tokens.

    python conversion_scripts/convert_roberta_to_longformer.py FacebookAI/roberta-base longformer-roberta-base-4096
    python conversion_scripts/convert_roberta_to_longformer.py my-classifier my-long-classifier --global-tokens first
    python conversion_scripts/convert_roberta_to_longformer.py my-reader my-long-reader --global-tokens question

Global tokens see the whole text and are seen by all of it, through projections that start as copies of the pretrained
ones. Classifiers read the first token, so make that one global; readers of "question, context" pairs make the question
global: everything up to and including the first separator. Without globals it is a plain window.
RoBERTa's table has padding_idx + 1 rows before the first token's; --max-positions counts what tokens can use. The same
script serves XLM-RoBERTa and CamemBERT.
"""

import argparse
import sys

from transformers import AutoTokenizer

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a RoBERTa checkpoint, with any head")
parser.add_argument("out", help="folder to write")
parser.add_argument("--attention-window", type=int, default=512, help="keys per token, half on each side (512)")
parser.add_argument("--global-tokens", choices=("none", "first", "question"), default="none", help="see above")
parser.add_argument("--max-positions", type=int, default=4096, help="longest input, in tokens (default 4096)")
parser.add_argument("--positions", choices=("tile", "interpolate"), default="tile", help="how to lengthen the table")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

separator = None
if args.global_tokens == "question":
    separator = AutoTokenizer.from_pretrained(args.source, trust_remote_code=False).sep_token_id

result = he.convert(
    args.source,
    "longformer",
    attention_window=args.attention_window,
    global_tokens=args.global_tokens,
    separator_token_id=separator,
    max_positions=args.max_positions,
    positions=args.positions,
)
result.save(args.out, overwrite=args.overwrite)

# where every tensor came from; random ones are absent from the source and must be trained
print(result.report)

# how close the saved checkpoint is to its source, on text from Python's documentation
if not args.no_verify:
    fidelity = he.verify(args.out, args.source, offline_texts(), progress=True)
    print(fidelity)
    sys.exit(0 if fidelity.passed else 1)
