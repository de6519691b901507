"""Train the tiny vision-language model on rendered pictures: an AR-only stage, then AR + block diffusion.

    python examples/train_tiny/train_vision.py --output build/tiny_vlm

All parts are trained from scratch, on one CPU core in about an hour. It can be interrupted: the same command resumes
from the last saved step.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from corpus import EOS_ID
from muon import Muon
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from vision_checkpoint import export_vlm, normalized, prompt_ids, tiny_vlm_config, train_tokenizer
from vision_objective import Pictures, ar_loss, joint_loss
from vision_scenes import LONG, SHAPES, SHORT, SIZES, Scene, draw_scene, render

from vllm_nld.reference.vision_language import ReferenceVLM

NAMES = {"short": SHORT, "long": LONG}
DIFFUSION_WEIGHT = 0.5
SHARES = {(56, 56): 0.3, (84, 56): 0.25, (56, 84): 0.25, (84, 84): 0.2}
"""Of the sizes."""
HARD_WORDS = (*map(str, range(10)), *SHAPES, *(f"{shape}s" for shape in SHAPES))
HARD_WEIGHT = 6.0
"""Of these words in the AR loss: they are the hardest to see, and few of all."""
HELD_OUT_PICTURES = 100
"""Captioned whenever the state is saved."""


class Gallery:
    """Rendered pictures by size, in memory.

    Args:
        pictures: how many, of all sizes together.
        seed: of what they show and of how they are rendered.
        held_out: show the held-out combinations, instead of all others.
        file: ``.npz`` in which the pictures are kept, so that a resumed run need not render again; None: nowhere.

    Attributes:
        scenes: by size, what each picture shows.
        pixels: by size, uint8 ``[pictures, height, width, 3]``.
    """

    def __init__(self, pictures: int, seed: int, held_out: bool = False, file: Path | None = None) -> None:
        rng = random.Random(seed)
        self.scenes = {size: [draw_scene(rng, held_out) for _ in range(int(SHARES[size] * pictures))] for size in SIZES}
        if file is None or not file.is_file():
            self.pixels = {size: self._rendered(size, rng) for size in SIZES}
            if file is not None:
                np.savez(file, **{f"{width}x{height}": self.pixels[width, height] for width, height in SIZES})
        else:
            kept = np.load(file)
            self.pixels = {(width, height): kept[f"{width}x{height}"] for width, height in SIZES}

    def _rendered(self, size: tuple[int, int], rng: random.Random) -> np.ndarray:
        return np.stack([np.asarray(render(scene, size, rng)) for scene in self.scenes[size]])

    def draw(self, count: int, generator: torch.Generator) -> tuple[tuple[int, int], list[Scene], Tensor]:
        """Return random pictures of one random size: the size, what they show, and their normalized pixels."""
        size = SIZES[int(torch.multinomial(torch.tensor([SHARES[s] for s in SIZES]), 1, generator=generator))]
        chosen = torch.randint(len(self.scenes[size]), (count,), generator=generator).tolist()
        return size, [self.scenes[size][index] for index in chosen], normalized(self.pixels[size][chosen])


def answered(
    question: str, size: tuple[int, int], scenes: list[Scene], features: Tensor, tokenizer: Tokenizer, longer: int
) -> Pictures:
    """Return pictures with a question and their answers; rows are ``longer`` than the longest answer at least."""
    answers = [scene.answer(question) for scene in scenes]
    tokens = [encoded.ids for encoded in tokenizer.encode_batch(answers, add_special_tokens=False)]
    prompt = prompt_ids(tokenizer, question, *size)
    length = max(map(len, tokens)) + 1 + longer
    ids = torch.tensor([prompt + answer + [EOS_ID] * (length - len(answer)) for answer in tokens])
    weights = torch.ones(tokenizer.get_vocab_size())
    weights[[tokenizer.token_to_id(f"\u0120{word}") for word in HARD_WORDS]] = HARD_WEIGHT
    return Pictures(features, ids, weights, len(prompt), EOS_ID)


def initialize(model: ReferenceVLM) -> None:
    """Normal, with a deviation that keeps the size of what a layer gets; residual projections smaller; norms 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if "embed" in name or "head" in name else 0.6 * parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=std * (0.3 if residual else 1.0))


def make_optimizers(model: ReferenceVLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, head, patches and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and "embed" not in name and "head" not in name
        (matrices if hidden else others).append(parameter)
    return [Muon(matrices, lr, weight_decay=0.02), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0)]


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, stable, linear decay over the last 40%."""
    return min(1.0, (step + 1) / 50, max(0.02, (steps - step) / (0.4 * steps)))


def training_step(
    model: ReferenceVLM, gallery: Gallery, tokenizer: Tokenizer, step: int, args: argparse.Namespace
) -> dict[str, float]:
    """Accumulate the gradients of a batch with one of the questions, in turn; returns mean losses in nats a token."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    name, question = list(NAMES.items())[step % len(NAMES)]
    size, scenes, pixels = gallery.draw(args.batch, generator)
    # A block reaches beyond a short answer's end, by an unknown number of tokens.
    longer = int(torch.randint(model.config.block_size, (), generator=generator)) if step >= args.ar_steps else 0
    batch = answered(question, size, scenes, model.image_features(pixels), tokenizer, longer)
    if step < args.ar_steps:
        ar = total = ar_loss(model, batch)
        losses = {f"{name}_ar": ar}
    else:
        ar, diffusion = joint_loss(model, batch, generator)
        total = ar + DIFFUSION_WEIGHT * diffusion
        losses = {f"{name}_ar": ar, f"{name}_diffusion": diffusion}
    total.backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}


@torch.no_grad()
def captioned_right(model: ReferenceVLM, gallery: Gallery, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the share of a gallery's pictures whose greedy AR caption is exactly right, for each question.

    Greedy text is the answer if every token of the answer is the most probable one after those before it.
    """
    right = dict.fromkeys(NAMES, 0)
    for size, scenes in gallery.scenes.items():
        features = model.image_features(normalized(gallery.pixels[size]))
        for name, question in NAMES.items():
            batch = answered(question, size, scenes, features, tokenizer, 0)
            embedded = model.embed_features(batch.ids, features.flatten(0, 1))
            best = model.causal(batch.ids, None, embedded)[:, batch.start - 1 : -1].argmax(-1)
            right[name] += int(((best == batch.ids[:, batch.start :]) | batch.ended[:, batch.start :]).all(1).sum())
    pictures = sum(map(len, gallery.scenes.values()))
    return {f"{name}_right": count / pictures for name, count in right.items()}


def save_state(path: Path, step: int, model: ReferenceVLM, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write the resumable state and rename, so that an interrupted save does no harm."""
    temporary = path.with_suffix(".part")
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, temporary)
    temporary.replace(path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for state, log and checkpoint")
    parser.add_argument("--ar-steps", type=int, default=800, help="steps of the AR-only stage")
    parser.add_argument("--steps", type=int, default=2400, help="all steps")
    parser.add_argument("--batch", type=int, default=24, help="pictures per step")
    parser.add_argument("--pictures", type=int, default=6_000, help="rendered for training")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between saves")
    return parser.parse_args()


def main() -> None:
    """Train, resuming where the last run stopped, and export the checkpoint."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    torch.manual_seed(args.seed)
    model = ReferenceVLM(tiny_vlm_config(tokenizer.get_vocab_size()))
    initialize(model)
    optimizers, step, state_file = make_optimizers(model, args.lr), 0, args.output / "state.pt"
    if state_file.is_file():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    gallery = Gallery(args.pictures, args.seed, file=args.output / f"pictures_{args.pictures}_{args.seed}.npz")
    held_out = Gallery(HELD_OUT_PICTURES, args.seed + 1, held_out=True)
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=20)
    with (args.output / "log.jsonl").open("a") as log:
        while step < args.steps:
            started = time.process_time()
            losses = training_step(model, gallery, tokenizer, step, args)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * learning_rate_factor(step, args.steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            entry = {"step": step, "cpu_seconds": time.process_time() - started, **losses}
            if step % args.save_every == 0 or step == args.steps:
                save_state(state_file, step, model, optimizers)
                entry |= captioned_right(model, held_out, tokenizer)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
            bar.update()
    export_vlm(model, tokenizer, args.output / "checkpoint")


if __name__ == "__main__":
    main()
