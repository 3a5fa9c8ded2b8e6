"""Command line that trains the demo checkpoint, part by part.

    python -m training.demo FOLDER

After an interruption, the same command resumes the training. The checkpoint is in `FOLDER/checkpoint`. The
folder also gets a log of each part and `samples.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.demo import codebook, decoder, model, prior, reading, samples, vae
from training.demo.trainer import TrainingRun

PARTS = {
    "processor": model.write_processor,
    "codebook": codebook.train,
    "vae": vae.train,
    "prior": prior.train,
    "decoder": decoder.train,
    "reading": reading.train,
    "samples": samples.paint,
}


def main() -> None:
    """Trains the parts that the command line selects."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo",
        description="Train the demo checkpoint, part by part.",
    )
    parser.add_argument("folder", type=Path, help="folder for the checkpoint, logs and samples")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="parts to train; all by default, in this order; each needs the parts before it",
    )
    parser.add_argument(
        "--minutes", type=float, default=6, help="training time of each part, interruptions not counted"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="number of processes that create batches")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(options.folder, torch.device(options.device), options.minutes, options.workers)
    for part in options.parts:
        PARTS[part](run)


if __name__ == "__main__":
    main()
