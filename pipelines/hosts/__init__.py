"""Personalization methods in a stream of their own: the interface, and those that diffusers cannot load."""

from degu.pipelines.hosts.host import Host, HostCondition
from degu.pipelines.hosts.ms_diffusion import MSAdapter, MSDiffusion
from degu.pipelines.hosts.neti import NeTI

__all__ = ["Host", "HostCondition", "MSAdapter", "MSDiffusion", "NeTI"]
