"""Rows that their receivers copy out of their senders' memory: the protocol, its two machines, the dispatcher."""

from lightning_ep.moe.dispatch.copy_engine.dispatcher import CopyEngineDispatcher

__all__ = ["CopyEngineDispatcher"]
