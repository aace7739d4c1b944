"""The networks that experiments start from, all built by name through `build_net`."""

from lightning_modules.nets.build import NETS, build_net

__all__ = ["NETS", "build_net"]
