"""BERT to Performer: softmax attention estimated with random features, linear in the length.

    python conversion_scripts/convert_bert_to_performer.py google-bert/bert-base-uncased performer-bert-base-512
    python conversion_scripts/convert_bert_to_performer.py my-model my-long-model --num-features 512 --max-positions 4096

The features are drawn from --seed and saved with the checkpoint; no tensor is learned anew. The error falls with their
number, slowly: read the fidelity figures beside the control "mean of values" before using the result, and finetune it.
"""

import argparse
import sys

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a BERT checkpoint, with any head")
parser.add_argument("out", help="folder to write")
parser.add_argument("--num-features", type=int, default=256, help="M, random features per head (256)")
parser.add_argument("--seed", type=int, default=0, help="of the random features")
parser.add_argument("--max-positions", type=int, default=None, help="longest input, in tokens (default: the source's)")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

result = he.convert(
    args.source,
    "performer",
    num_features=args.num_features,
    seed=args.seed,
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
