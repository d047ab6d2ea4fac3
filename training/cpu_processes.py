"""`accelerate launch --cpu --num_processes N` without an accelerator: all N processes, not the one that accelerate starts."""

from __future__ import annotations

import os
import sys

import psutil
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from degu.training.log import logger

# What accelerate reads the number of processes from; set where several were started.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_processes() -> None:
    """Starts this script again by torchrun, in as many processes as `accelerate launch` was asked for on this machine's CPUs.

    Does nothing where there is nothing to mend. Accelerate starts several processes on CPUs by MPI alone; without a hostfile for that
    it starts one and does not tell it how many there were to be, but its command line does.
    """
    alone = "MASTER_ADDR" in os.environ and not any(name in os.environ for name in _WORLD_SIZES)
    if not alone or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return
    command = psutil.Process().parent().cmdline()
    after = next((i + 1 for i, word in enumerate(command) if word.removesuffix(".py").endswith("launch")), None)
    if after is None or not any("accelerate" in word for word in command[:after]):
        return
    asked = launch_command_parser().parse_args(command[after:])
    processes = asked.num_processes or load_config_from_file(asked.config_file).num_processes
    if (asked.num_machines or 1) > 1:
        logger.warning("This is one process, though several were asked for: on several machines start it by torchrun, or add --mpirun_hostfile.")
    elif processes > 1:
        where = ("--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"])
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), *where)
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
