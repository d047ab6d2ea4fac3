"""Trains another personalization method, for DeGu to have as its host: with the data, loop and flags of train_cae.py.

accelerate launch training/train_host.py --method ti --pretrained_model_name_or_path BASE --instance_data_dir photos/ --class_noun dog
"""

from __future__ import annotations

from typing import Sequence

from degu.training.arguments import parse_host_args
from degu.training.cpu_processes import start_processes
from degu.training.hosts import METHODS
from degu.training.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_host_args(argv, METHODS)
    method = METHODS[args.method]
    train(args, method)
    if method.then is not None:
        train(method.then.arguments(args), method.then)


if __name__ == "__main__":
    start_processes()
    main()
