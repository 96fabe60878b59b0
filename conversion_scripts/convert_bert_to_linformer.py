"""BERT to Linformer: attention over R slots, each a learned mean of keys and values along the sequence.

    python conversion_scripts/convert_bert_to_linformer.py google-bert/bert-base-uncased linformer-bert-base-512
    python conversion_scripts/convert_bert_to_linformer.py my-model my-long-model --rank 512 --max-positions 2048

The projections are new, sized for the longest input, and start as means of equal segments. A small rank must be trained:
read the fidelity figures beside the control "mean of values" before using the result, and finetune it.
"""

import argparse
import sys

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a BERT checkpoint, with any head")
parser.add_argument("out", help="folder to write")
parser.add_argument("--rank", type=int, default=256, help="R, slots that stand for all keys (256)")
parser.add_argument(
    "--sharing", choices=("none", "headwise", "kv", "layerwise"), default="headwise", help="of projections"
)
parser.add_argument("--max-positions", type=int, default=None, help="longest input, in tokens (default: the source's)")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

result = he.convert(
    args.source,
    "linformer",
    rank=args.rank,
    sharing=args.sharing,
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
