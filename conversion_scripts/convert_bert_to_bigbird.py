"""BERT to BigBird: each block sees its neighbours, the first and last block, and a few random ones.

    python conversion_scripts/convert_bert_to_bigbird.py google-bert/bert-base-uncased bigbird-bert-base-4096
    python conversion_scripts/convert_bert_to_bigbird.py my-model my-long-model --block-size 32 --num-random-blocks 2

A token sees 3 + 2 + r blocks: its own and both neighbours, the two outer ones, r random ones drawn once from --seed. No
tensor is added, and inputs of up to 4 blocks are exact.
"""

import argparse
import sys

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a BERT checkpoint, with any head")
parser.add_argument("out", help="folder to write")
parser.add_argument("--block-size", type=int, default=64, help="tokens per block (64)")
parser.add_argument("--num-random-blocks", type=int, default=3, help="random blocks per block (3)")
parser.add_argument("--seed", type=int, default=0, help="of the random blocks")
parser.add_argument("--max-positions", type=int, default=4096, help="longest input, in tokens (default 4096)")
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

result = he.convert(
    args.source,
    "bigbird",
    block_size=args.block_size,
    num_random_blocks=args.num_random_blocks,
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
