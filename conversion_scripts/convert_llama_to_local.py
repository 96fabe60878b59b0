"""Llama and its relatives (Qwen, Gemma, Phi, OLMo, SmolLM, …) to sliding-window attention, in all layers or in some.

    python conversion_scripts/convert_llama_to_local.py HuggingFaceTB/SmolLM2-135M local-smollm2
    python conversion_scripts/convert_llama_to_local.py Qwen/Qwen3-0.6B my-hybrid --attention-window 1024 --exact-every 4

Each token sees the last w tokens and the first --sink-tokens. With --exact-every K every K-th layer keeps full attention, so
that the last token still hears of the first one. No tensor is added, inputs of up to w tokens are exact, and while
generating a converted layer keeps w keys instead of all. Rotary positions need no table: the longest input stays what the
source's config says.
"""

import argparse
import sys

import hf_efficient as he
from hf_efficient.corpus import offline_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="Hub id or folder of a checkpoint of Llama or a relative, with any head")
parser.add_argument("out", help="folder to write")
parser.add_argument("--attention-window", type=int, default=512, help="w, tokens that a token sees (512)")
parser.add_argument("--sink-tokens", type=int, default=4, help="first tokens that every token sees besides (4)")
parser.add_argument(
    "--exact-every", type=int, default=None, help="K: every K-th layer keeps full attention (default: none)"
)
parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
args = parser.parse_args()

result = he.convert(
    args.source,
    "local",
    attention_window=args.attention_window,
    sink_tokens=args.sink_tokens,
    exact_every=args.exact_every,
)
result.save(args.out, overwrite=args.overwrite)

# where every tensor came from; a window adds none
print(result.report)

# how close the saved checkpoint is to its source, on text from Python's documentation
if not args.no_verify:
    fidelity = he.verify(args.out, args.source, offline_texts(), progress=True)
    print(fidelity)
    sys.exit(0 if fidelity.passed else 1)
