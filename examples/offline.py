"""Complete prompts from a file, one per line, in self-speculation or in AR.

python examples/offline.py examples/prompts.txt
python examples/offline.py examples/prompts.txt --ar
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_nld.checkpoints import checkpoint_path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="text file, one prompt per line")
    parser.add_argument("--model", help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate per prompt (default: 64)")
    parser.add_argument("--ar", action="store_true", help="switch self-speculation off")
    return parser.parse_args()


def main() -> None:
    """Generate greedily; print completions and the acceptance length."""
    args = parse_arguments()
    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.model or str(checkpoint_path("tiny")),
        dtype="float32",
        max_model_len=2048,
        speculative_config=None if args.ar else {"model": "vllm_nld.SelfSpeculation"},
        disable_log_stats=False,
        kv_cache_memory_bytes=1 << 28,
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.max_tokens))
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"--- {prompt}\n{output.outputs[0].text}")
    if not args.ar:
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        drafts = metrics["vllm:spec_decode_num_drafts"].value
        accepted = metrics["vllm:spec_decode_num_accepted_tokens"].value
        print(f"--- acceptance length: {1 + accepted / drafts:.2f}" if drafts else "--- nothing was drafted")


if __name__ == "__main__":
    main()
