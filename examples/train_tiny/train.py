"""Train the embedded checkpoint: an AR-only stage, the joint AR + block-diffusion stage, a draft stage, an adapter.

The first two stages are the published recipe. The third trains single-pass drafts (a block's first token given, all
others masked) on the model's own greedy continuations, and keeps the causal pass unchanged. A model this small has no
capacity for mask ratios that linear self-speculation never uses, and a draft is compared with the causal pass's text,
not with human text. The last stage trains the draft adapter (``draft_adapter.py``). The released models also have one,
so that drafts agree with the causal pass; it does not change the weights themselves.

    python examples/train_tiny/train.py --output build/tiny

    python examples/train_tiny/train.py --output build/tiny --from-checkpoint FOLDER   # only the draft stage

Runs on a GPU if there is one. It can be interrupted: the same command resumes from the last saved step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from draft_adapter import train_adapter
from export import export, rope_parameters
from objective import Batch, ar_loss_sum, draft_loss_sum, draft_weights, joint_loss_sum
from safetensors.torch import load_file
from self_text import DraftStage
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.reference.model import ReferenceModel

DIFFUSION_WEIGHT = 0.3
ANCHOR_WEIGHT = 4.0


def tiny_config(vocab_size: int, block_length: int = 16) -> NemotronLabsDiffusionConfig:
    """Return the embedded checkpoint's configuration: every released feature, at a size a laptop can train."""
    return NemotronLabsDiffusionConfig(
        architectures=["NemotronLabsDiffusionModel"],
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters=rope_parameters(),
        block_size=block_length,
        mask_token_id=corpus.MASK_ID,
        bos_token_id=corpus.BOS_ID,
        eos_token_id=corpus.EOS_ID,
        pad_token_id=corpus.PAD_ID,
        dtype="bfloat16",
        ar_loss_weight=1.0,
        dlm_loss_weight=DIFFUSION_WEIGHT,
        dlm_paradigm="sbd_block_diff",
    )


def initialize(model: ReferenceModel) -> None:
    """Normal(0, initializer_range); residual projections are scaled down by the depth."""
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * model.config.num_hidden_layers) ** -0.5 if residual else 1.0
            torch.nn.init.normal_(parameter, std=std * scale)


def make_optimizers(model: ReferenceModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, head and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Warm-up, stable, linear decay over the last 35% of the first two stages; then all of this again from 0.4."""
    warmup, main_steps = 50, args.ar_steps + args.joint_steps
    if step < warmup:
        return (step + 1) / warmup
    if step < main_steps:
        return min(1.0, max(0.02, (main_steps - step) / (0.35 * main_steps)))
    draft_step = step - main_steps
    return max(0.02, 0.4 * min((draft_step + 1) / warmup, 1 - draft_step / args.draft_steps))


def training_step(model: ReferenceModel, batch: Batch, joint: bool, args: argparse.Namespace) -> dict[str, float]:
    """Accumulate gradients over a global batch; returns mean losses in nats per token."""
    count = batch.global_count(joint)
    sums = {"ar": 0.0, "diffusion": 0.0}
    device = next(model.parameters()).device
    for part in batch.split(args.micro_batch):
        part = Batch(part.ids.to(device), part.masked.to(device), part.probability.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            if joint:
                ar, diffusion = joint_loss_sum(model, part, model.config.block_size)
                loss = ar + DIFFUSION_WEIGHT * diffusion
                sums["diffusion"] += float(diffusion.detach())
            else:
                ar = loss = ar_loss_sum(model, part.ids)
        (loss / count).backward()
        sums["ar"] += float(ar.detach())
    return {key: value / batch.ids.numel() for key, value in sums.items()}


def draft_step(model: ReferenceModel, stage: DraftStage, ids: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Accumulate the draft stage's gradients over ``ids`` ``[sequences, length]``; returns means in nats per token."""
    block_length = model.config.block_size
    weights = draft_weights(ids.shape[1] - stage.prefix, block_length)
    draft_count = ids.shape[0] * float(weights.sum())
    sums = {"anchor": 0.0, "draft": 0.0}
    device = next(model.parameters()).device
    for part in ids.split(args.micro_batch):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            anchor, drafts = draft_loss_sum(model, stage.teacher, part.to(device), stage.prefix, block_length)
        anchor, drafts = anchor / ids.numel(), drafts / draft_count
        (ANCHOR_WEIGHT * anchor + drafts).backward()
        sums["anchor"] += float(anchor.detach())
        sums["draft"] += float(drafts.detach())
    return sums


def save_state(path: Path, step: int, model: ReferenceModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write the resumable state and rename, so that an interrupted save does no harm."""
    temporary = path.with_suffix(".part")
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, temporary)
    temporary.replace(path)


def prepare_data(output: Path, vocab_size: int) -> tuple[Tokenizer, np.ndarray]:
    """Return tokenizer and token stream, made once and kept next to the training state."""
    tokenizer_file, stream_file = output / "tokenizer.json", output / "stream.npy"
    if not stream_file.is_file():
        texts = corpus.documents()
        tokenizer = corpus.train_tokenizer(texts, vocab_size)
        tokenizer.save(str(tokenizer_file))
        np.save(stream_file, corpus.encode(texts, tokenizer))
    return Tokenizer.from_file(str(tokenizer_file)), np.load(stream_file)


def step_generator(step: int, args: argparse.Namespace) -> torch.Generator:
    """Return a generator that depends only on the step, so that a resumed run draws as an uninterrupted one."""
    return torch.Generator().manual_seed(args.seed * 1_000_003 + step)


def sample(stream: np.ndarray, step: int, args: argparse.Namespace) -> Batch:
    """Draw the batch of a step of the first two stages."""
    generator = step_generator(step, args)
    # Attention takes half of a long step's time, so most of the run uses twice as many sequences of half the length.
    halved = step < (args.ar_steps + args.joint_steps) * (1 - args.long_fraction)
    length, count = (args.length // 2, args.batch * 2) if halved else (args.length, args.batch)
    return Batch.draw(corpus.draw(stream, count, length, generator), generator)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for state, log and checkpoint")
    parser.add_argument("--ar-steps", type=int, default=600, help="steps of the AR-only stage")
    parser.add_argument("--joint-steps", type=int, default=1000, help="steps of the joint stage")
    parser.add_argument("--draft-steps", type=int, default=500, help="steps of the draft stage")
    parser.add_argument("--own-rows", type=int, default=3072, help="sequences of own text for the draft stage")
    parser.add_argument("--adapter-steps", type=int, default=800, help="steps of the draft adapter's stage; 0: none")
    parser.add_argument("--from-checkpoint", type=Path, help="start the draft stage from this checkpoint's weights")
    parser.add_argument("--block-length", type=int, default=16, help="diffusion block length")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences per forward")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--long-fraction", type=float, default=0.25, help="final share of steps at full length")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=25, help="steps between saves")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def prepare_model(
    args: argparse.Namespace, state_file: Path
) -> tuple[ReferenceModel, list[torch.optim.Optimizer], int]:
    """Return model, optimizers and the number of steps done: fresh, from a checkpoint, or from the last save."""
    torch.manual_seed(args.seed)
    model = ReferenceModel(tiny_config(args.vocab_size, args.block_length))
    initialize(model)
    step = 0
    if args.from_checkpoint:
        model.load_state_dict(load_file(args.from_checkpoint / "model.safetensors"))
        step = args.ar_steps + args.joint_steps
    model.to(args.device)
    optimizers = make_optimizers(model, args)
    if state_file.is_file():
        state = torch.load(state_file, map_location=args.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    return model, optimizers, step


def main() -> None:
    """Train, resuming where the last run stopped, and export the checkpoint."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer, stream = prepare_data(args.output, args.vocab_size)
    state_file = args.output / "state.pt"
    model, optimizers, step = prepare_model(args, state_file)
    main_steps = args.ar_steps + args.joint_steps
    total = main_steps + args.draft_steps
    stage: DraftStage | None = None
    bar = tqdm(total=total, initial=step, unit="step", mininterval=5)
    with (args.output / "log.jsonl").open("a") as log:
        while step < total:
            started = time.perf_counter()
            if step < main_steps:
                losses = training_step(model, sample(stream, step, args), step >= args.ar_steps, args)
            else:
                stage = stage or DraftStage.prepare(args.output / "draft_stage.pt", model, stream, args)
                ids = stage.sample(3 * args.batch // 2, step_generator(step, args))
                losses = draft_step(model, stage, ids, args)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * learning_rate_factor(step, args)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            log.write(json.dumps({"step": step, "seconds": time.perf_counter() - started, **losses}) + "\n")
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
            bar.update()
            if step % args.save_every == 0 or step == total:
                log.flush()
                save_state(state_file, step, model, optimizers)
    export(model, tokenizer, args.output / "checkpoint")
    if args.adapter_steps:
        train_adapter(args.output / "checkpoint", args.output / "adapter", args.device, steps=args.adapter_steps)


if __name__ == "__main__":
    main()
